import contextlib
import csv
import errno
import os
import re
import shutil
import socket
import sys
import time

from etils import epath
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from data import cartoon_faces
from data import celeba
from data import crops
from data import sources
import input_pipeline
from runs import memory
from tests.celeba_builder import CelebA
from tests.conftest import SPLIT_SIZES
from tests.conftest import write_faces
from vae import devices
from vae import splits
from vae import tiles
from vae.errors import UserError

SPLITS = ('train', 'validation', 'test')


def everything(split):
  batches = split.batches(np.arange(split.num_examples), 16)
  return np.concatenate(list(batches))


def with_pil(path, crop=148, size=64, mode='RGB'):
  """Crop and antialiased resize by another library."""
  image = Image.open(path).convert(mode)
  side = min(crop, *image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  return np.asarray(image.resize((size, size), Image.BILINEAR)).astype(int)


def assert_same_labels(a, b):
  assert a.labels().names == b.labels().names
  np.testing.assert_array_equal(a.labels().values, b.labels().values)


def copy(celeba_dir, tmp_path):
  return shutil.copytree(celeba_dir, tmp_path / 'celeba')


# Decoding.


def test_crop_and_resize_are_pils(celeba_dir, small_config):
  small_config.data.image_size = 64
  data = input_pipeline.load(small_config)
  images = everything(data.train)
  assert images.dtype == np.uint8 and images.shape == (40, 64, 64, 3)
  for index in range(40):
    path = celeba_dir / 'img_align_celeba' / f'{index + 1:06d}.jpg'
    difference = np.abs(images[index] - with_pil(path))
    # PIL rounds between its two passes.
    assert difference.max() <= 2 and difference.mean() < 0.3


@pytest.mark.parametrize(
  ('mode', 'suffix', 'size'),
  [
    ('RGB', 'png', (100, 60)),
    ('L', 'png', (70, 70)),
    ('L', 'jpg', (178, 218)),
    ('RGBA', 'png', (90, 95)),
    ('RGB', 'bmp', (200, 151)),
  ],
)
@pytest.mark.parametrize('channels', [1, 3])
def test_other_formats_and_sizes(tmp_path, mode, suffix, size, channels):
  pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4))
  image = Image.fromarray(pixels.astype(np.uint8), 'RGBA').convert(mode)
  image = image.resize((20, 20)).resize(size)
  image.save(tmp_path / f'a.{suffix}')
  crop = crops.Crop(148, 32, channels)
  encoded = tf.io.read_file(str(tmp_path / f'a.{suffix}'))
  decoded = crop.decode(encoded).numpy()
  wanted = {1: 'L', 3: 'RGB'}[channels]
  expected = with_pil(tmp_path / f'a.{suffix}', 148, 32, wanted)
  difference = np.abs(decoded.astype(int) - expected.reshape(decoded.shape))
  assert difference.max() <= 3


# Where the data is and how it is kept.


def test_official_and_kaggle_layouts_are_the_same_data(
  celeba_dir, small_config, tmp_path
):
  official = input_pipeline.load(small_config)
  folder = tmp_path / 'kaggle'
  inner = folder / 'img_align_celeba' / 'img_align_celeba'
  shutil.copytree(celeba_dir / 'img_align_celeba', inner)
  rows = [
    line.split()
    for line in (celeba_dir / 'list_eval_partition.txt')
    .read_text()
    .splitlines()
  ]
  with open(folder / 'list_eval_partition.csv', 'w', newline='') as file:
    csv.writer(file).writerows([['image_id', 'partition'], *rows])
  small_config.data.dir = str(folder)
  kaggle = input_pipeline.load(small_config)
  for name, size in zip(SPLITS, SPLIT_SIZES, strict=True):
    a, b = getattr(official, name), getattr(kaggle, name)
    assert a.num_examples == size
    np.testing.assert_array_equal(everything(a), everything(b))


def test_cache_changes_nothing(small_config):
  order = np.random.default_rng(0).permutation(40)[:37]
  results = []
  for cache in ('none', 'host', 'device', 'auto'):
    small_config.data.cache = cache
    train = input_pipeline.load(small_config).train
    if cache == 'device':
      np.testing.assert_array_equal(
        tiles.unpack(train.tiles, train.image_shape), everything(train)
      )
    results.append(list(train.batches(order, 8)))
  for batches in results:
    assert [len(b) for b in batches] == [8, 8, 8, 8, 5]
    for a, b in zip(batches, results[0], strict=True):
      np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(
    np.concatenate(results[0]), everything(train)[order]
  )


def test_auto_caches_what_fits(small_config, monkeypatch):
  class Memory:
    available = 0

  monkeypatch.setattr(memory.psutil, 'virtual_memory', lambda: Memory)
  num_bytes = sum(SPLIT_SIZES) * 16 * 16 * 3
  # There an image of 768 bytes takes a tile.
  on_device = sum(SPLIT_SIZES) * 1024
  streamed, cached = input_pipeline.StreamedSplit, input_pipeline.CachedSplit
  for available, free_on_device, kind in (
    (2 * num_bytes, None, streamed),
    (2 * num_bytes, 10 * on_device, streamed),
    (2 * num_bytes + 2, None, cached),
    (2 * num_bytes + 2, 2 * on_device, cached),
    (2 * num_bytes + 2, 2 * on_device + 2, splits.DeviceSplit),
  ):
    Memory.available = available
    monkeypatch.setattr(
      devices, 'free_memory', lambda free=free_on_device: free
    )
    assert type(input_pipeline.load(small_config).train) is kind
  small_config.data.cache = 'device'
  monkeypatch.setattr(devices, 'free_memory', lambda: on_device - 1)
  fails(small_config, 'cache is device, but .* use host or auto')


def test_what_does_not_fit_the_host_is_told(small_config, monkeypatch):
  num_bytes = sum(SPLIT_SIZES) * 16 * 16 * 3
  monkeypatch.setattr(memory, 'free', lambda: num_bytes)
  small_config.data.cache = 'host'
  input_pipeline.load(small_config)
  monkeypatch.setattr(memory, 'free', lambda: num_bytes - 1)
  fails(small_config, 'cache is host, but .* use none or auto')
  # Of a dispatch: 40 images, however many steps it may have.
  small_config.data.cache = 'none'
  small_config.train.steps_per_dispatch = 10**9
  input_pipeline.load(small_config)
  monkeypatch.setattr(memory, 'free', lambda: 40 * 16 * 16 * 3 - 1)
  fails(small_config, 'steps_per_dispatch is 1000000000, .* lower it')
  small_config.train.steps_per_dispatch = 4
  input_pipeline.load(small_config)


def test_steps_must_be_countable(small_config):
  small_config.train.batch_size = 40
  small_config.train.num_epochs = 2**31 - 1
  input_pipeline.load(small_config)
  small_config.train.num_epochs = 2**31
  fails(small_config, 'num_epochs is 2147483648; .* 2,147,483,648 steps')


def decode_nothing(monkeypatch):
  def refuse(*args):
    raise AssertionError('decoded again')

  monkeypatch.setattr(crops.Crop, 'decode', refuse)


@pytest.fixture
def kept_config(small_config, celeba_dir, tmp_path):
  """Has its own copy of the images, and keeps them decoded."""
  small_config.data.dir = str(copy(celeba_dir, tmp_path))
  small_config.data.decoded_dir = str(tmp_path / 'new' / 'decoded')
  return small_config


@pytest.mark.parametrize('cache', ['host', 'device'])
def test_the_second_run_decodes_nothing(
  kept_config, monkeypatch, capsys, cache
):
  first = everything(input_pipeline.load(kept_config).train)
  decode_nothing(monkeypatch)
  kept_config.data.cache = cache
  second = everything(input_pipeline.load(kept_config).train)
  np.testing.assert_array_equal(first, second)
  assert re.search(
    'train: decoded 40 .*\ntrain: read 40 ', capsys.readouterr().out
  )


def test_decoded_images_of_tfds_are_kept(
  celeba_dir, kept_config, tmp_path, monkeypatch
):
  CelebA.folder = celeba_dir
  CelebA(data_dir=tmp_path / 'tfds').download_and_prepare()
  kept_config.data.dir = str(tmp_path / 'tfds')
  first = everything(input_pipeline.load(kept_config).test)
  decode_nothing(monkeypatch)
  np.testing.assert_array_equal(
    everything(input_pipeline.load(kept_config).test), first
  )


def replace_image(config):
  images = epath.Path(config.data.dir) / 'img_align_celeba'
  (images / '000002.jpg').write_bytes((images / '000041.jpg').read_bytes())


def cut_kept_file(config):
  for path in epath.Path(config.data.decoded_dir).glob('*.npy'):
    path.write_bytes(path.read_bytes()[:-100])


def empty_kept_file(config):
  for path in epath.Path(config.data.decoded_dir).glob('*.npy'):
    path.write_bytes(b'')


def exchange_kept_file(config):
  for path in epath.Path(config.data.decoded_dir).glob('*.npy'):
    np.save(path, np.zeros((40, 16, 16, 1), np.uint8))


def crop_otherwise(config):
  config.data.crop_size = 100


@pytest.mark.parametrize(
  'change',
  [
    replace_image,
    cut_kept_file,
    empty_kept_file,
    exchange_kept_file,
    crop_otherwise,
  ],
)
def test_what_is_kept_is_used_only_where_it_is_right(kept_config, change):
  everything(input_pipeline.load(kept_config).train)
  change(kept_config)
  second = everything(input_pipeline.load(kept_config).train)
  kept_config.data.cache = 'none'
  streamed = everything(input_pipeline.load(kept_config).train)
  np.testing.assert_array_equal(second, streamed)


def test_streaming_keeps_nothing(kept_config):
  kept_config.data.cache = 'none'
  everything(input_pipeline.load(kept_config).train)
  assert not os.path.exists(kept_config.data.decoded_dir)


def no_folder(config, monkeypatch):
  epath.Path(config.data.decoded_dir).parent.write_text('a file')


def no_room(config, monkeypatch):
  usage = shutil.disk_usage('/')._replace(free=1 << 20)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)


def disk_fills(config, monkeypatch):
  def save(file, array, allow_pickle):
    file.write(b'the first bytes')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(np, 'save', save)


@pytest.mark.parametrize('fault', [no_folder, no_room, disk_fills])
def test_what_cannot_be_kept_is_said_in_a_line(
  kept_config, monkeypatch, capsys, fault
):
  fault(kept_config, monkeypatch)
  train = input_pipeline.load(kept_config).train
  assert len(everything(train)) == len(everything(train)) == 40
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and 'config.data.decoded_dir' in said
  # Nothing half written stays.
  assert not list(epath.Path(kept_config.data.decoded_dir).glob('*'))


def test_tfds_and_the_folder_are_the_same_data(
  celeba_dir, small_config, tmp_path
):
  CelebA.folder = celeba_dir
  CelebA(data_dir=tmp_path).download_and_prepare()
  from_folder = input_pipeline.load(small_config)
  small_config.data.dir = str(tmp_path)
  order = np.random.default_rng(0).permutation(40)
  for cache in ('none', 'host'):
    small_config.data.cache = cache
    from_tfds = input_pipeline.load(small_config)
    for name in SPLITS:
      np.testing.assert_array_equal(
        everything(getattr(from_tfds, name)),
        everything(getattr(from_folder, name)),
      )
      assert_same_labels(getattr(from_tfds, name), getattr(from_folder, name))
    np.testing.assert_array_equal(
      next(from_tfds.train.batches(order, 40)),
      next(from_folder.train.batches(order, 40)),
    )


def test_embedded_faces_go_through_tfds(small_config, tmp_path, monkeypatch):
  monkeypatch.setattr(
    cartoon_faces, '_SPLIT_SIZES', {'train': 20, 'validation': 6, 'test': 5}
  )
  small_config.data.source = 'cartoon_faces'
  small_config.data.dir = str(tmp_path)
  # A copy that someone made is no version.
  (tmp_path / 'cartoon_faces' / '1.0.0_old').mkdir(parents=True)
  (tmp_path / 'cartoon_faces' / '1.0.0_old' / 'dataset_info.json').touch()
  data = input_pipeline.load(small_config)
  images = everything(data.validation)
  factors = cartoon_faces.sample_factors('validation', 6)
  for image, row in zip(images, factors, strict=True):
    labels = dict(zip(cartoon_faces.FACTORS, map(int, row), strict=True))
    cartoon_faces.render(labels).save(tmp_path / 'a.png')
    expected = with_pil(tmp_path / 'a.png', size=16)
    assert np.abs(image - expected).mean() < 2  # JPEG's loss.
  # Its factors lie beside each image.
  labels = data.validation.labels()
  assert labels.names == tuple(cartoon_faces.FACTORS)
  np.testing.assert_array_equal(labels.values, factors)


@pytest.fixture
def few_cartoon_faces(monkeypatch):
  sizes = {'train': 20, 'validation': 6, 'test': 5}
  monkeypatch.setattr(cartoon_faces, '_SPLIT_SIZES', sizes)


def files_in(folder):
  return sorted(path.relative_to(folder) for path in folder.rglob('*'))


@pytest.mark.parametrize('name', ['a.jpg', 'cat/a.jpg', 'cat/1.0/a.jpg'])
def test_nothing_is_rendered_into_a_folder_of_images(
  small_config, tmp_path, few_cartoon_faces, name
):
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  write_faces(tmp_path, [name])
  before = files_in(tmp_path)
  small_config.data.source = 'cartoon_faces'
  small_config.data.dir = str(tmp_path)
  message = fails(small_config, f'data.dir is {tmp_path}, .*data.source')
  assert '--config.data.source=folder' in message and '\n' not in message
  assert files_in(tmp_path) == before


def test_no_folder_is_made_for_a_user_who_is_not_there(
  small_config, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  small_config.data.source = 'cartoon_faces'
  small_config.data.dir = '~nobody_of_this_name/x'
  fails(small_config, 'data.dir is ~nobody_of_this_name/x; .* no such user')
  assert not files_in(tmp_path)


@pytest.mark.parametrize(
  'beside',
  [
    None,  # Not even the folder itself.
    '',
    '.DS_Store',
    'mnist/3.0.1/dataset_info.json',
    'cartoon_faces/1.0.0.incompleteXYZ/part',  # Of a run that was killed.
  ],
)
def test_cartoon_faces_are_rendered_where_asked_and_nothing_else(
  small_config, tmp_path, few_cartoon_faces, beside
):
  folder = tmp_path / 'new'
  if beside is not None:
    folder.mkdir()
  if beside:
    (folder / beside).parent.mkdir(parents=True, exist_ok=True)
    (folder / beside).touch()
  before = files_in(folder)
  small_config.data.source = 'cartoon_faces'
  small_config.data.dir = str(folder)
  data = input_pipeline.load(small_config)
  assert data.train.num_examples == 20
  added = set(files_in(folder)) - set(before)
  assert {path.parts[0] for path in added} == {'cartoon_faces'}
  # Found the next time.
  again = input_pipeline.load(small_config)
  np.testing.assert_array_equal(everything(again.test), everything(data.test))


PATTERNS = ('cf[1]', 'a[!b]', 'a**', 'a?', 'a\\b', '{a,b}')


@pytest.mark.parametrize('name', PATTERNS)
def test_names_of_folders_are_no_patterns(
  celeba_dir, small_config, tmp_path, monkeypatch, name
):
  expected = everything(input_pipeline.load(small_config).test)
  folder = shutil.copytree(celeba_dir, tmp_path / name / 'celeba')
  small_config.data.dir = str(folder)
  small_config.data.decoded_dir = str(tmp_path / name / 'decoded')
  found = everything(input_pipeline.load(small_config).test)
  np.testing.assert_array_equal(found, expected)
  with monkeypatch.context() as patched:
    decode_nothing(patched)
    found = everything(input_pipeline.load(small_config).test)
  np.testing.assert_array_equal(found, expected)
  small_config.data.source = 'folder'
  data = input_pipeline.load(small_config)
  assert sum(len(everything(getattr(data, name))) for name in SPLITS) == 56


def test_prepared_data_is_found_below_any_name(
  celeba_dir, small_config, tmp_path
):
  expected = everything(input_pipeline.load(small_config).test)
  CelebA.folder = celeba_dir
  CelebA(data_dir=tmp_path / 'tfds').download_and_prepare()
  for name in PATTERNS:
    folder = shutil.copytree(tmp_path / 'tfds', tmp_path / name / 'tfds')
    small_config.data.dir = str(folder)
    found = everything(input_pipeline.load(small_config).test)
    np.testing.assert_array_equal(found, expected)


def test_cartoon_faces_are_rendered_below_any_name(
  small_config, tmp_path, few_cartoon_faces, capsys
):
  small_config.data.source = 'cartoon_faces'
  for name in ('cf[1]', 'a**'):
    small_config.data.dir = str(tmp_path / name / 'faces')
    first = everything(input_pipeline.load(small_config).train)
    capsys.readouterr()
    second = everything(input_pipeline.load(small_config).train)
    np.testing.assert_array_equal(first, second)
    assert 'Rendering' not in capsys.readouterr().out


# Which images they are.


def test_names_say_which_images_a_run_sees(tmp_path, small_config):
  folder = tmp_path / 'a'
  (folder / 'b').mkdir(parents=True)
  write_faces(folder / 'b', [f'{i}.jpg' for i in range(50)])
  small_config.data.source = 'folder'
  small_config.train.batch_size = 1

  def identity(folder=folder, **settings):
    config = small_config.copy_and_resolve_references()
    config.data.dir = str(folder)
    config.data.update(settings)
    return input_pipeline.load(config).identity()

  first = identity()
  encoded = sources.find('folder', str(folder))
  assert [first[s] for s in ('train', 'validation')] == [
    encoded[s].num_examples for s in ('train', 'validation')
  ]
  assert first['train_names'] != first['validation_names']
  # Wherever they lie and are kept, and whenever they were written.
  shutil.copytree(folder, tmp_path / 'elsewhere', copy_function=shutil.copy)
  assert identity(tmp_path / 'elsewhere') == first
  for cache in ('none', 'host', 'device'):
    assert identity(cache=cache) == first
  # Another name changes what there is, and its place may be in any split.
  for split in ('train', 'validation'):
    path = encoded[split].name(0)
    os.rename(path, path + '.png')
    changed = identity()
    assert changed[f'{split}_names'] != first[f'{split}_names']
    os.rename(path + '.png', path)
  # One is added where one was removed.
  shutil.copy(encoded['train'].name(0), folder / 'b' / 'new.jpg')
  os.remove(encoded['train'].name(0))
  assert identity()['train_names'] != first['train_names']


def test_names_and_their_order_count_with_lists(
  small_config, celeba_dir, tmp_path
):
  folder = copy(celeba_dir, tmp_path)
  first = input_pipeline.load(small_config).identity()
  small_config.data.dir = str(folder)
  assert input_pipeline.load(small_config).identity() == first
  partition = folder / 'list_eval_partition.txt'
  lines = partition.read_text().splitlines(keepends=True)
  partition.write_text(''.join([lines[1], lines[0], *lines[2:]]))
  changed = input_pipeline.load(small_config).identity()
  assert changed == first | {'train_names': changed['train_names']} != first


def test_images_that_are_skipped_do_not_count(
  small_config, celeba_dir, tmp_path
):
  small_config.data.skip_corrupt = True
  small_config.data.dir = str(copy(celeba_dir, tmp_path))
  images = epath.Path(small_config.data.dir) / 'img_align_celeba'
  found = []
  for name in ('000004.jpg', '000005.jpg'):
    whole = (images / name).read_bytes()
    (images / name).write_bytes(b'')
    found.append(input_pipeline.load(small_config).identity())
    (images / name).write_bytes(whole)
  assert [each['train'] for each in found] == [39, 39]
  assert found[0]['train_names'] != found[1]['train_names']
  assert found[0]['validation_names'] == found[1]['validation_names']


def test_records_are_told_by_the_name_and_version_of_their_data_set(
  small_config, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    cartoon_faces, '_SPLIT_SIZES', {'train': 20, 'validation': 6, 'test': 5}
  )
  small_config.data.source = 'cartoon_faces'
  found = []
  for folder, version in (('a', '1.0.0'), ('b', '1.0.0'), ('c', '1.1.0')):
    (tmp_path / folder).mkdir()
    small_config.data.dir = str(tmp_path / folder)
    version = tfds.core.Version(version)
    monkeypatch.setattr(cartoon_faces.CartoonFaces, 'VERSION', version)
    found.append(input_pipeline.load(small_config).identity())
  assert found[0] == found[1] and found[0]['train'] == 20
  changed = {key for key in found[0] if found[0][key] != found[2][key]}
  assert changed == {'train_names', 'validation_names'}


# Labels.


def attributes_in(celeba_dir):
  """The fixture's list, int [num_images, num_attributes]."""
  lines = (celeba_dir / 'list_attr_celeba.txt').read_text().splitlines()
  rows = [[int(sign) for sign in line.split()[1:]] for line in lines[2:]]
  return (np.array(rows) + 1) // 2


def as_csv(text):
  """Kaggle's form of the official list."""
  _, names, *rows = text.splitlines()
  return '\n'.join([f'image_id {names}', *rows]).replace(' ', ',') + '\n'


def test_attributes_are_those_of_the_images(celeba_dir, small_config, tmp_path):
  data = input_pipeline.load(small_config)
  factors = cartoon_faces.sample_factors('tests', sum(SPLIT_SIZES))
  column = list(cartoon_faces.FACTORS).index('glasses')
  first = 0
  for name, size in zip(SPLITS, SPLIT_SIZES, strict=True):
    labels = getattr(data, name).labels()
    assert labels.names == (
      'Bald',
      'Eyeglasses',
      'Mouth_Slightly_Open',
      'Smiling',
    )
    part = slice(first, first + size)
    np.testing.assert_array_equal(
      labels.values, attributes_in(celeba_dir)[part]
    )
    np.testing.assert_array_equal(labels.values[:, 1], factors[part, column])
    first += size


@pytest.mark.parametrize('mark', ['', '\ufeff'])
@pytest.mark.parametrize('newline', ['\n', '\r\n'])
@pytest.mark.parametrize('suffix', ['txt', 'csv'])
def test_attributes_as_tools_write_them(
  celeba_dir, tmp_path, suffix, newline, mark
):
  text = (celeba_dir / 'list_attr_celeba.txt').read_text()
  if suffix == 'csv':
    text = as_csv(text)
  path = tmp_path / f'list.{suffix}'
  path.write_bytes((mark + text.replace('\n', newline)).encode())
  # The images' order, not the list's.
  labels = celeba._read_attributes(
    epath.Path(path), ['000005.jpg', '000002.jpg', '000056.jpg']
  )
  assert labels.names[1] == 'Eyeglasses'
  np.testing.assert_array_equal(
    labels.values, attributes_in(celeba_dir)[[4, 1, 55]]
  )


@pytest.mark.parametrize(
  ('partition', 'attributes'),
  [
    ('list_eval_partition.txt', 'list_attr_celeba.csv'),
    ('list_eval_partition.txt', 'Anno/list_attr_celeba.txt'),
    ('Eval/list_eval_partition.txt', 'Anno/list_attr_celeba.txt'),
    ('Eval/list_eval_partition.txt', 'Eval/list_attr_celeba.csv'),
  ],
)
def test_where_the_list_of_attributes_may_be(
  celeba_dir, small_config, tmp_path, partition, attributes
):
  expected = input_pipeline.load(small_config)
  folder = copy(celeba_dir, tmp_path)
  text = (folder / 'list_attr_celeba.txt').read_text()
  (folder / 'list_attr_celeba.txt').unlink()
  for path in (partition, attributes):
    (folder / path).parent.mkdir(exist_ok=True)
  (folder / 'list_eval_partition.txt').rename(folder / partition)
  (folder / attributes).write_text(
    as_csv(text) if attributes.endswith('csv') else text
  )
  small_config.data.dir = str(folder)
  assert_same_labels(input_pipeline.load(small_config).test, expected.test)


def test_without_a_list_there_are_no_labels(celeba_dir, small_config, tmp_path):
  folder = copy(celeba_dir, tmp_path)
  (folder / 'list_attr_celeba.txt').unlink()
  small_config.data.dir = str(folder)
  for cache in ('none', 'host'):
    small_config.data.cache = cache
    assert input_pipeline.load(small_config).train.labels() is None


@pytest.mark.parametrize('source', ['celeba', 'folder'])
def test_labels_are_read_when_asked_for(
  celeba_dir, small_config, tmp_path, source
):
  folder = copy(celeba_dir, tmp_path)
  (folder / 'list_attr_celeba.txt').write_text('not a list')
  small_config.data.source = source
  small_config.data.dir = str(folder)
  train = input_pipeline.load(small_config).train
  everything(train)
  if source == 'celeba':
    with pytest.raises(UserError, match='list_attr_celeba.txt: line 1 must be'):
      train.labels()
  else:  # One sub-folder is no classes.
    assert train.labels() is None


def change_line(number, line):
  def change(text):
    lines = text.splitlines()
    lines[number - 1] = line
    return '\n'.join(lines)

  return change


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (change_line(1, ''), ': line 1 must be the number of images'),
    (change_line(2, '000001.jpg -1'), 'line 3: .* each of 2 attributes'),
    (change_line(4, '000002.jpg 1 1 -1'), 'line 4: .* each of 4 attributes'),
    (change_line(4, '000002.jpg 1 1 -1 1 1'), 'line 4: '),
    (change_line(5, '000003.jpg 1 1 -1 2'), 'line 5: '),
    (change_line(5, '000003.jpg 1 1 -1 x'), 'line 5: '),
    (change_line(6, ''), 'lacks .* of 1 images: 000004.jpg'),
    (lambda text: text[:400], 'line'),
    (lambda text: '', ' cannot be read .it is empty'),
    (lambda text: ' ', ': line 1 must be'),
    (lambda text: '56\n', ': line 1 must be .* line 2 the names'),
    (as_csv, ': line 1 must be the number'),
  ],
)
def test_damaged_attributes(celeba_dir, small_config, tmp_path, change, said):
  folder = copy(celeba_dir, tmp_path)
  path = folder / 'list_attr_celeba.txt'
  path.write_text(change(path.read_text()))
  small_config.data.dir = str(folder)
  train = input_pipeline.load(small_config).train
  with pytest.raises(UserError, match=f'{path}.*{said}') as caught:
    train.labels()
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'text', [' ', 'image_id\n', '000001.jpg,1,-1\n', 'image_id,Bald\na.jpg\n']
)
def test_damaged_csv_attributes(tmp_path, text):
  path = tmp_path / 'list.csv'
  path.write_text(text)
  with pytest.raises(UserError, match='list.csv.*line [12]'):
    celeba._read_attributes(epath.Path(path), ['a.jpg'])


@pytest.mark.parametrize('cache', ['none', 'host'])
def test_labels_of_skipped_images_are_left_out(
  small_config, celeba_dir, tmp_path, cache
):
  folder = copy(celeba_dir, tmp_path)
  small_config.data.dir = str(folder)
  small_config.data.cache = cache
  small_config.data.skip_corrupt = True
  for number in (4, 40):
    (folder / 'img_align_celeba' / f'{number:06d}.jpg').write_bytes(b'')
  labels = input_pipeline.load(small_config).train.labels()
  np.testing.assert_array_equal(
    labels.values, np.delete(attributes_in(celeba_dir)[:40], [3, 39], axis=0)
  )


def test_sub_folders_are_classes(tmp_path, small_config):
  names = [f'{i}.jpg' for i in range(10)]
  for folder in ('cat', 'bird/small', 'bird/large', 'ant'):
    (tmp_path / folder).mkdir(parents=True)
    write_faces(tmp_path / folder, names)
  (tmp_path / 'empty').mkdir()
  encoded = sources.find('folder', str(tmp_path))
  for split in encoded.values():
    labels = split.labels()
    assert labels.names == ('class',)
    folders = [
      os.path.relpath(split.name(i), tmp_path).split('/')[0]
      for i in range(split.num_examples)
    ]
    assert [('ant', 'bird', 'cat')[i] for i in labels.values[:, 0]] == folders
  # The test split need not have them all to count them as the others do.
  small_config.data.source = 'folder'
  small_config.data.dir = str(tmp_path)
  train = input_pipeline.load(small_config).train
  np.testing.assert_array_equal(
    train.labels().values, encoded['train'].labels().values
  )
  # An image beside the folders has no class, so that they are none.
  write_faces(tmp_path, ['0.jpg'])
  assert sources.find('folder', str(tmp_path))['train'].labels() is None


# What is wrong with the data.


def fails(config, match):
  with pytest.raises(UserError, match=match) as caught:
    data = input_pipeline.load(config)
    for name in SPLITS:
      everything(getattr(data, name))
  return str(caught.value)


def test_missing_folder(small_config):
  small_config.data.dir = '/nowhere/celeba'
  fails(small_config, 'data.dir is /nowhere/celeba; there is no such folder')


def test_folder_without_celeba_says_the_two_ways(small_config, tmp_path):
  small_config.data.dir = str(tmp_path)
  message = fails(small_config, 'holds neither img_align_celeba')
  assert 'kaggle datasets download' in message and 'tfds.load' in message


def test_images_without_lists(small_config, celeba_dir, tmp_path):
  folder = copy(celeba_dir, tmp_path)
  (folder / 'list_eval_partition.txt').unlink()
  small_config.data.dir = str(folder)
  fails(small_config, 'no list_eval_partition.*data.source=folder')


def test_lists_that_name_missing_files(small_config, celeba_dir, tmp_path):
  folder = copy(celeba_dir, tmp_path)
  small_config.data.dir = str(folder)
  for number in (3, 5, 7, 11, 13):
    (folder / 'img_align_celeba' / f'{number:06d}.jpg').unlink()
  message = fails(small_config, 'names 5 files that are not in')
  assert '000003.jpg, 000005.jpg, 000007.jpg and 2 more' in message


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    ('000001.jpg 3', "'000001.jpg 3'"),
    ('000001.jpg', "'000001.jpg'"),
    ('000001.jpg 12', "'000001.jpg 12'"),
    ('000001.jpg 01', "'000001.jpg 01'"),
    ('../../secret.jpg 0', "'../../secret.jpg 0'"),
  ],
)
def test_lists_with_a_wrong_line(
  small_config, celeba_dir, tmp_path, line, said
):
  folder = copy(celeba_dir, tmp_path)
  small_config.data.dir = str(folder)
  partition = folder / 'list_eval_partition.txt'
  partition.write_text(line + '\n' + partition.read_text())
  assert said in fails(small_config, 'line 1')


@pytest.mark.parametrize(
  'text',
  [
    'image_id,partition\n000001.jpg,0\n',
    '000001.jpg,0\n',
    'image_id,partition\r\n000001.jpg, 0\r\n\r\n',
    '\ufeffimage_id,partition\n000001.jpg,0',
  ],
)
def test_csv_lists_as_tools_write_them(tmp_path, text):
  path = tmp_path / 'list.csv'
  path.write_bytes(text.encode())
  files = celeba._read_partition(epath.Path(path))
  assert files == {'train': ['000001.jpg'], 'validation': [], 'test': []}


@pytest.mark.parametrize('content', [b'000001.jpg,\n', b'\xff\xfe\x00'])
def test_damaged_csv_lists(tmp_path, content):
  path = tmp_path / 'list.csv'
  path.write_bytes(content)
  with pytest.raises(UserError, match='list.csv'):
    celeba._read_partition(epath.Path(path))


def test_split_of_which_nothing_is_left(small_config, celeba_dir, tmp_path):
  folder = copy(celeba_dir, tmp_path)
  small_config.data.dir = str(folder)
  small_config.data.skip_corrupt = True
  for number in range(41, 52):
    (folder / 'img_align_celeba' / f'{number:06d}.jpg').write_bytes(b'')
  fails(small_config, 'the validation split of .* has no images')
  small_config.train.batch_size = 40
  (folder / 'img_align_celeba' / '000001.jpg').write_bytes(b'')
  shutil.copy(
    folder / 'img_align_celeba' / '000002.jpg',
    folder / 'img_align_celeba' / '000041.jpg',
  )
  fails(small_config, 'the train split has only 39 images')


def test_names_that_are_not_utf8(tmp_path, small_config):
  write_faces(tmp_path, [f'{i}.jpg' for i in range(12)])
  odd = os.fsencode(tmp_path) + b'/\xff\xfe.jpg'
  os.rename(tmp_path / '0.jpg', odd)
  small_config.data.source = 'folder'
  small_config.data.dir = str(tmp_path)
  data = input_pipeline.load(small_config)
  assert sum(len(everything(getattr(data, name))) for name in SPLITS) == 12


def test_split_without_images(small_config, celeba_dir, tmp_path):
  folder = copy(celeba_dir, tmp_path)
  small_config.data.dir = str(folder)
  partition = folder / 'list_eval_partition.txt'
  partition.write_text(partition.read_text().replace(' 1\n', ' 0\n'))
  fails(small_config, 'the validation split of .* has no images')


def test_batch_larger_than_the_split(small_config):
  small_config.train.batch_size = 48
  fails(small_config, 'batch_size is 48, but the train split has only 40')


@pytest.mark.parametrize('cache', ['none', 'host'])
def test_corrupt_images_are_named(small_config, celeba_dir, tmp_path, cache):
  folder = copy(celeba_dir, tmp_path)
  small_config.data.dir = str(folder)
  small_config.data.cache = cache
  images = folder / 'img_align_celeba'
  (images / '000004.jpg').write_bytes(b'not a JPEG')
  whole = (images / '000009.jpg').read_bytes()
  (images / '000009.jpg').write_bytes(whole[: len(whole) // 2])
  message = fails(small_config, 'cannot be decoded')
  assert '000004.jpg' in message and '000009.jpg' in message
  assert 'skip_corrupt=True' in message


@pytest.mark.parametrize('cache', ['none', 'host'])
def test_corrupt_images_are_skipped_where_told(
  small_config, celeba_dir, tmp_path, cache, capsys
):
  sound = everything(input_pipeline.load(small_config).train)
  folder = copy(celeba_dir, tmp_path)
  small_config.data.dir = str(folder)
  small_config.data.cache = cache
  small_config.data.skip_corrupt = True
  (folder / 'img_align_celeba' / '000004.jpg').write_bytes(b'')
  train = input_pipeline.load(small_config).train
  assert train.num_examples == 39
  np.testing.assert_array_equal(everything(train), np.delete(sound, 3, axis=0))
  said = capsys.readouterr().err
  assert 'skipped 1 of 40' in said and '000004.jpg' in said


def test_corrupt_images_are_looked_for_once(kept_config, monkeypatch):
  kept_config.data.skip_corrupt = True
  images = epath.Path(kept_config.data.dir) / 'img_align_celeba'
  (images / '000004.jpg').write_bytes(b'')
  first = input_pipeline.load(kept_config)
  for name in SPLITS:
    everything(getattr(first, name))
  decode_nothing(monkeypatch)
  second = input_pipeline.load(kept_config)
  assert second.train.num_examples == 39
  for name in SPLITS:
    np.testing.assert_array_equal(
      everything(getattr(second, name)), everything(getattr(first, name))
    )


@pytest.mark.parametrize('source', ['celeba', 'cartoon_faces'])
def test_a_log_that_cannot_be_written_stops_no_data(
  kept_config, monkeypatch, tmp_path, source
):
  """As where the disk that it lies on is full, or its reader has gone."""
  if source == 'cartoon_faces':
    sizes = {'train': 20, 'validation': 6, 'test': 5}
    monkeypatch.setattr(cartoon_faces, '_SPLIT_SIZES', sizes)
    kept_config.data.dir = str(tmp_path / 'rendered')
    (tmp_path / 'rendered').mkdir()
  else:
    images = epath.Path(kept_config.data.dir) / 'img_align_celeba'
    (images / '000004.jpg').write_bytes(b'')
  kept_config.data.source = source
  kept_config.data.skip_corrupt = True
  # Where nothing can be kept, which is told too.
  kept_config.data.decoded_dir = '/dev/null/decoded'
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stdout', full)
    monkeypatch.setattr(sys, 'stderr', full)
    train = input_pipeline.load(kept_config).train
    images = everything(train)
    monkeypatch.undo()
    with contextlib.suppress(OSError):
      full.close()
  assert len(images) == (39 if source == 'celeba' else 20)


def test_without_network_the_message_comes_at_once(
  small_config, tmp_path, monkeypatch
):
  def refuse(*args, **kwargs):
    raise OSError('Network is unreachable')

  monkeypatch.setattr(socket, 'create_connection', refuse)
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  small_config.data.dir = ''
  start = time.monotonic()
  message = fails(small_config, 'cannot be reached')
  assert time.monotonic() - start < 30  # TFDS alone takes minutes.
  assert 'kaggle datasets download' in message and 'tfds.load' in message
