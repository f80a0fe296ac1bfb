"""Data sets of TFDS: a tiny one, CelebA and the cartoon faces."""

import itertools
import shutil
import struct

from etils import epath
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from data import cartoon_faces, SPLITS
from data import tfds as source
from data.cartoon_faces import FACTORS
import input_pipeline
from runs import schema
from tests.celeba_builder import CelebA
from tests.conftest import everything, make_small_config
from vae.errors import UserError

NAMES = ['ant', 'bee', 'cat']
SIZES = {'train': 12, 'test': 5}


def stamps(count):
  return np.random.default_rng(count).integers(
    0, 256, (count, 20, 20, 1), np.uint8
  )


class TinyStamps(tfds.core.GeneratorBasedBuilder):
  """Twelve and five grey images of 20×20 with two labels and a mask."""

  VERSION = tfds.core.Version('1.2.3')
  FEATURES = {
    'a_mask': tfds.features.Image(shape=(20, 20, 1)),
    'image': tfds.features.Image(shape=(20, 20, 1)),
    'kind': tfds.features.ClassLabel(names=NAMES),
    'text': tfds.features.Text(),
    'facts': {
      'worn': np.bool_,
      'size': tfds.features.ClassLabel(num_classes=4),
    },
  }

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(self.FEATURES),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(n) for split, n in SIZES.items()}

  def _generate_examples(self, count):
    for i, image in enumerate(stamps(count)):
      example = {
        'a_mask': 255 - image,
        'image': image,
        'kind': i % 3,
        'text': 'x' * i,
        'facts': {'worn': i % 2 == 0, 'size': i % 4},
      }
      yield i, {name: example[name] for name in self.FEATURES}


class TinyTexts(TinyStamps):
  """Their texts alone."""

  FEATURES = {'text': tfds.features.Text()}


def config_of(folder, **settings):
  config = make_small_config(folder)
  config.data.source, config.data.name = 'tfds', 'tiny_stamps'
  config.data.image_size, config.data.channels = 20, 1
  config.train.batch_size = 4
  config.data.train, config.data.validation = 'train[:8]', 'train[8:]'
  config.data.update(settings)
  schema.validate(config)
  return config


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  # TFDS's own code prepares it, without a network.
  source.prepare('tiny_stamps', str(folder), downloads=False)
  return folder


@pytest.mark.parametrize('cache', ['none', 'host'])
def test_any_data_set_is_a_config(prepared, cache):
  found = input_pipeline.load(config_of(prepared, cache=cache))
  expected = stamps(12)[:8], stamps(12)[8:], stamps(5)
  for name, images in zip(SPLITS, expected, strict=True):
    split = getattr(found, name)
    np.testing.assert_array_equal(everything(split), images)
    order = np.arange(len(images))[::-1]
    backwards = next(split.batches(order, len(images)))
    np.testing.assert_array_equal(backwards, images[::-1])
  labels = found.validation.labels()
  assert labels.names == ('kind', 'size', 'worn')
  values = [[i % 3, i % 4, i % 2 == 0] for i in range(8, 12)]
  np.testing.assert_array_equal(labels.values, values)
  assert labels.class_names('kind') == NAMES
  assert labels.class_names('worn') == ['worn 0', 'worn 1']


def test_identity_is_of_name_version_split_and_positions(prepared, tmp_path):
  def identity(folder, train):
    config = config_of(folder, cache='none', train=train)
    return input_pipeline.load(config).identity()

  copy = shutil.copytree(prepared, tmp_path / 'copy')
  first, other = identity(prepared, 'train[:8]'), identity(copy, 'train[4:]')
  assert identity(copy, 'train[:8]') == first
  assert other == first | {'train_names': other['train_names']} != first


@pytest.mark.parametrize(
  ('settings', 'match'),
  [
    ({'validation': ''}, "data.validation is 'validation', but tiny_stamps/1"),
    ({'test': 'test[:'}, r"data.test is 'test\[:', but .* splits train, test;"),
    ({'name': 'tiny_texts'}, 'tiny_texts/1.2.3 has no images .* are text'),
    ({'name': 'no_such_set'}, 'TFDS cannot prepare no_such_set in .*no_such'),
    ({'name': ''}, 'data.name is empty'),
    ({'source': 'folder'}, "data.name is 'tiny_stamps'; it goes with"),
  ],
)
def test_mistakes_are_one_line(prepared, settings, match):
  source.prepare('tiny_texts', str(prepared), downloads=False)
  with pytest.raises(UserError, match=match) as caught:
    input_pipeline.load(config_of(prepared, **settings))
  assert str(caught.value).isprintable()


def test_without_a_network_the_message_comes_at_once(tmp_path, monkeypatch):
  """TFDS alone would retry for minutes."""

  def refuse(*args, **kwargs):
    raise OSError('Network is unreachable')

  monkeypatch.setattr(source.socket, 'create_connection', refuse)
  monkeypatch.setattr(source.urllib.request, 'getproxies', dict)
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  with pytest.raises(UserError, match='prepare tiny_stamps .*unreachable'):
    input_pipeline.load(config_of(''))


def first_record(content):
  # Its length, and another 16 bytes for that and two checksums.
  return content[: struct.unpack('<Q', content[:8])[0] + 16]


def flipped(content):
  place = len(content) // 2
  return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize('damage', [first_record, flipped])
def test_damaged_records_are_refused(prepared, tmp_path, damage):
  folder = shutil.copytree(prepared, tmp_path / 'copy')
  [path] = folder.glob('tiny_stamps/*/*-train.*')
  path.write_bytes(damage(path.read_bytes()))
  for settings in ({'cache': 'none'}, {'skip_corrupt': True}):
    with pytest.raises(UserError, match='records of the train.*are damaged'):
      everything(input_pipeline.load(config_of(folder, **settings)).train)


def test_damaged_description_is_refused(prepared, tmp_path):
  folder = shutil.copytree(prepared, tmp_path / 'copy')
  [path] = folder.glob('tiny_stamps/*/features.json')
  path.write_text('{')
  with pytest.raises(UserError, match='tiny_stamps holds no intact data set'):
    input_pipeline.load(config_of(folder))


def test_celeba_of_tfds_is_that_of_the_folder(celeba_dir, tmp_path):
  CelebA.folder = celeba_dir
  CelebA(data_dir=tmp_path).download_and_prepare()
  ours = input_pipeline.load(make_small_config(celeba_dir))
  theirs = input_pipeline.load(make_small_config(tmp_path))
  for name in SPLITS:
    a, b = getattr(ours, name), getattr(theirs, name)
    np.testing.assert_array_equal(everything(a), everything(b))
    assert a.labels().names == b.labels().names
    np.testing.assert_array_equal(a.labels().values, b.labels().values)


@pytest.fixture
def faces_config(monkeypatch, tmp_path):
  sizes = {'train': 20, 'validation': 6, 'test': 5}
  monkeypatch.setattr(cartoon_faces, '_SPLIT_SIZES', sizes)
  config = make_small_config(tmp_path / 'new [1]')
  config.data.source = 'cartoon_faces'
  return config


def test_cartoon_faces_are_rendered_once(faces_config, capsys):
  folder = epath.Path(faces_config.data.dir)
  (folder / 'mnist' / '3.0.1').mkdir(parents=True)
  (folder / '.DS_Store').touch()
  first = input_pipeline.load(faces_config)
  assert 'Preparing cartoon_faces' in capsys.readouterr().out
  second = input_pipeline.load(faces_config)
  assert 'Preparing' not in capsys.readouterr().out
  factors = cartoon_faces.sample_factors('validation', 6)
  images = everything(first.validation)
  np.testing.assert_array_equal(images, everything(second.validation))
  for image, row in zip(images, factors, strict=True):
    labels = dict(zip(FACTORS, map(int, row), strict=True))
    face = cartoon_faces.render(labels).crop((15, 35, 163, 183))
    expected = np.asarray(face.resize((16, 16), Image.BILINEAR), int)
    assert np.abs(image - expected).mean() < 2  # JPEG's loss.
  labels = first.validation.labels()
  assert labels.names == tuple(FACTORS)
  np.testing.assert_array_equal(labels.values, factors)
  assert labels.class_names('glasses') == ['glasses 0', 'glasses 1']


def test_factors_are_uniform_and_independent():
  factors = cartoon_faces.sample_factors('train', 4000)
  for column, values in zip(factors.T, FACTORS.values(), strict=True):
    shares = np.bincount(column, minlength=len(values)) / len(column)
    np.testing.assert_allclose(shares, 1 / len(values), rtol=0.25)
  correlations = np.corrcoef(factors.T) - np.eye(len(FACTORS))
  # Four standard errors.
  assert np.abs(correlations).max() < 4 / 4000**0.5


def test_splits_are_fixed_and_differ():
  train, first, test = (
    list(map(tuple, cartoon_faces.sample_factors(split, count)))
    for split, count in (('train', 500), ('train', 100), ('test', 500))
  )
  assert train[:100] == first and not set(train) & set(test)


@pytest.mark.parametrize('name', list(FACTORS))
def test_every_factor_shows(name):
  """Each value gives another picture, within the part that is cut out."""
  # A face that has hair, so that its colour shows.
  labels = {factor: len(v) // 2 for factor, v in FACTORS.items()}
  pictures = []
  for value in range(len(FACTORS[name])):
    picture = np.asarray(cartoon_faces.render(labels | {name: value}))
    assert picture.shape == (218, 178, 3)
    pictures.append(picture[35:183, 15:163].astype(int))
  for a, b in itertools.combinations(pictures, 2):
    # Hundreds of grey levels: more than a pixel's edge.
    assert np.abs(a - b).sum() > 500
