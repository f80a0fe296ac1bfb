"""`generate.py`: within this process, and once as a user has it."""

import pathlib
import shutil

from absl import flags
from absl.testing import flagsaver
import numpy as np
from PIL import Image
import pytest

from evaluation import plots
import generate
from tests.preloaded import run
import vae
from vae import figures
from vae import splits
from vae.errors import UserError

SIDE = 16
STEP = SIDE + 2  # With the white line between images.


@pytest.fixture
def make(trained_run, tmp_path):
  """Runs a command into a folder of its own; returns that folder."""

  def make(command, workdir=trained_run, **settings):
    if not flags.FLAGS.is_parsed():
      flags.FLAGS(['generate'])
    folder = tmp_path / command
    with flagsaver.flagsaver(
      workdir=str(workdir), output=str(folder), **settings
    ):
      generate.main(command)
    return folder

  return make


@pytest.fixture(scope='module')
def model(trained_run):
  return vae.load(trained_run)


def cells(path, columns):
  """The images of a grid, uint8 [rows · columns, SIDE, SIDE, 3]."""
  with Image.open(path) as image:
    pixels = np.asarray(image)
  rows = (pixels.shape[0] + 2) // STEP
  assert pixels.shape == (rows * STEP - 2, columns * STEP - 2, 3)
  return np.stack(
    [
      pixels[r * STEP : r * STEP + SIDE, c * STEP : c * STEP + SIDE]
      for r in range(rows)
      for c in range(columns)
    ]
  )


def read_each(folder, count):
  files = sorted(folder.glob('0*.png'))
  assert len(files) == count
  return np.stack([np.asarray(Image.open(file)) for file in files])


def test_samples_are_the_models_as_grid_and_files(make, model):
  folder = make('sample', num_images=6, seed=3, temperature=0.5)
  expected = figures.to_uint8(model.sample(6, seed=3, temperature=0.5))
  np.testing.assert_array_equal(read_each(folder, 6), expected)
  np.testing.assert_array_equal(cells(folder / 'grid.png', 3), expected)


def test_mixture_samples_where_the_images_are(make, model, capsys):
  folder = make('sample', num_images=200, prior='mixture', components=2, seed=1)
  assert 'fitting the mixture …\n' in capsys.readouterr().out
  images = read_each(folder, 200).astype(np.float32)
  spread = images.std(axis=0).mean()
  assert spread > 0
  np.testing.assert_array_equal(
    images,
    read_each(
      make('sample', num_images=200, prior='mixture', components=2, seed=1), 200
    ),
  )


def test_mixture_of_more_components_than_images_is_refused(make):
  with pytest.raises(UserError, match='--components=41: there are only 40'):
    make('sample', prior='mixture', components=41)


@pytest.fixture
def photos(tmp_path):
  """Image files of other sizes and kinds, and one that fits."""
  generator = np.random.default_rng(0)

  def save(name, shape, **options):
    pixels = generator.integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(tmp_path / name, **options)
    return str(tmp_path / name)

  return [
    save('fits.png', (SIDE, SIDE, 3)),
    save('wide.jpg', (40, 90, 3), quality=95),
    save('grey.png', (33, 33)),
    save('clear.png', (20, 30, 4)),
  ]


def test_own_images_are_reconstructed_and_resizing_is_said(
  make, model, photos, capsys
):
  folder = make('reconstruct', images=photos)
  said = capsys.readouterr().out
  assert 'fits.png' not in said
  assert f'{photos[1]}: 90×40, cut to its central 40×40 and resized' in said
  pairs = cells(folder / 'grid.png', 4)
  original = np.asarray(Image.open(photos[0]))
  np.testing.assert_array_equal(pairs[0], original)
  expected = figures.to_uint8(model.reconstruct(pairs[::2]))
  np.testing.assert_array_equal(pairs[1::2], expected)
  np.testing.assert_array_equal(read_each(folder, 4), expected)


def test_wide_images_lose_their_sides(make, tmp_path):
  pixels = np.zeros((32, 96, 3), np.uint8)
  pixels[:, 32:64] = 200
  pixels[:, 64:] = 90
  Image.fromarray(pixels).save(tmp_path / 'wide.png')
  folder = make('reconstruct', images=[str(tmp_path / 'wide.png')])
  assert np.all(cells(folder / 'grid.png', 2)[0] == 200)


def test_image_file_cut_as_in_training_is_the_image_of_the_split(
  make, celeba_dir
):
  file = celeba_dir / 'img_align_celeba' / '000041.jpg'
  own = make('reconstruct', images=[str(file)], crop_size=148)
  first = cells(own / 'grid.png', 2)[0].astype(int)
  split = make('reconstruct', num_images=1, split='validation')
  difference = first - cells(split / 'grid.png', 2)[0]
  assert np.abs(difference).mean() < 1


def test_split_is_reconstructed_in_order(make, model, celeba_dir):
  folder = make('reconstruct', num_images=3, split='validation')
  pairs = cells(folder / 'grid.png', 4)
  # The first image of the validation split, by another decoder.
  with Image.open(celeba_dir / 'img_align_celeba' / '000041.jpg') as image:
    box = (15, 35, 163, 183)
    expected = image.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
  difference = pairs[0].astype(int) - np.asarray(expected)
  assert np.abs(difference).mean() < 3


@pytest.mark.parametrize(
  ('name', 'content', 'says'),
  [
    ('gone.png', None, 'there is no such file'),
    ('text.png', b'hello', 'cannot be read as an image'),
    ('empty.jpg', b'', 'cannot be read as an image'),
  ],
)
def test_what_is_no_image_is_refused(make, tmp_path, name, content, says):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=f'{name}.*{says}') as error:
    make('reconstruct', images=[str(path)])
  assert '\n' not in str(error.value)


def test_truncated_image_is_refused(make, photos, tmp_path):
  whole = (tmp_path / 'wide.jpg').read_bytes()
  (tmp_path / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match='cut.jpg cannot be read as an image'):
    make('reconstruct', images=[str(tmp_path / 'cut.jpg')])


def test_interpolation_goes_from_image_to_image_both_ways(make, model, photos):
  folder = make('interpolate', images=photos[:3], steps=5)
  rows = cells(folder / 'grid.png', 5).reshape(4, 5, SIDE, SIDE, 3)
  originals = cells(make('reconstruct', images=photos[:3]) / 'grid.png', 4)[::2]
  ends = figures.to_uint8(model.reconstruct(originals[:3])).astype(int)
  for row, (start, end) in zip(
    rows.astype(int), ((0, 1), (0, 1), (1, 2), (1, 2)), strict=True
  ):
    # To a grey value: the latents went through double precision.
    assert np.abs(row[0] - ends[start]).max() <= 1
    assert np.abs(row[-1] - ends[end]).max() <= 1


def test_16_bit_grey_is_not_cut_off(make, tmp_path):
  grey = np.full((SIDE, SIDE), 128 * 257, np.uint16)
  Image.fromarray(grey).save(tmp_path / 'deep.png')
  folder = make('reconstruct', images=[str(tmp_path / 'deep.png')])
  assert np.all(cells(folder / 'grid.png', 2)[0] == 128)


def test_no_call_deletes_or_overwrites_what_another_made(
  trained_run, photos, tmp_path, monkeypatch, capsys
):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['generate'])
  # Another file of the same name.
  (tmp_path / 'other').mkdir()
  shutil.copy(photos[1], tmp_path / 'other' / 'fits.png')
  calls = [
    ('sample', '.', {'num_images': 5}),
    ('sample', '.', {'num_images': 2}),
    ('sample', '.', {'num_images': 2, 'prior': 'mixture', 'components': 1}),
    ('sample', '.', {'num_images': 2, 'seed': 1}),
    ('sample', '.', {'num_images': 2, 'temperature': 0.5}),
    ('sample', '.', {'num_images': 2, 'checkpoint': '10'}),
    ('reconstruct', '.', {'num_images': 5}),
    ('reconstruct', '.', {'num_images': 5, 'split': 'train'}),
    ('reconstruct', '.', {'images': ['fits.png']}),
    ('reconstruct', 'other', {'images': ['fits.png']}),
    ('reconstruct', '.', {'images': ['fits.png', 'grey.png']}),
    ('reconstruct', '.', {'images': ['wide.jpg'], 'crop_size': 30}),
    ('interpolate', '.', {'steps': 3}),
    ('interpolate', '.', {'steps': 4}),
    ('traverse', '.', {'steps': 3}),
    ('traverse', '.', {'steps': 3, 'reach': 1.0}),
    ('traverse', '.', {'steps': 3, 'dimensions': 1}),
    ('manifold', '.', {'side': 2}),
    ('manifold', '.', {'side': 2, 'label': 'Smiling'}),
  ]
  generated = pathlib.Path(trained_run) / 'generated'

  def files():
    return {p: p.read_bytes() for p in generated.rglob('*') if p.is_file()}

  def call(command, folder, settings):
    monkeypatch.chdir(tmp_path / folder)
    with flagsaver.flagsaver(workdir=str(trained_run), **settings):
      generate.main(command)

  before = files()
  for command, folder, settings in calls:
    call(command, folder, settings)
    after = files()
    assert before.items() < after.items(), (command, settings)
    before = after
  # The same call makes the same files.
  call(*calls[1])
  assert files() == before
  assert 'note' not in capsys.readouterr().out


def test_pictures_of_an_earlier_call_in_a_named_folder_are_noted(make, capsys):
  folder = make('sample', num_images=5)
  assert 'note' not in capsys.readouterr().out
  assert make('sample', num_images=2) == folder
  note = f'note: {folder}/0002.png and those after it are of an earlier call.'
  assert note in capsys.readouterr().out
  read_each(folder, 5)


def test_traversal_from_several_images_is_refused(make, photos):
  with pytest.raises(UserError, match='from one image'):
    make('traverse', images=photos[:2])


def test_interpolation_needs_two_images(make, photos):
  with pytest.raises(UserError, match='two images'):
    make('interpolate', images=photos[:1])


def test_traversals_go_through_the_prior_and_move_in_a_gif(make, model, capsys):
  folder = make('traverse', steps=5, reach=2.0, dimensions=7)
  # It has but two dimensions.
  rows = cells(folder / 'grid.png', 5).reshape(2, 5, SIDE, SIDE, 3)
  first = int(capsys.readouterr().out.split('from the top: ')[1].split(' ')[0])
  z = np.zeros((5, 2))
  z[:, first] = [-2, -1, 0, 1, 2]
  np.testing.assert_array_equal(rows[0], figures.to_uint8(model.decode(z)))
  np.testing.assert_array_equal(rows[0, 2], rows[1, 2])
  with Image.open(folder / 'traversals.gif') as gif:
    # There and back: the ends once each.
    assert gif.n_frames == 8
    assert gif.size == (2 * STEP - 2, SIDE)


def test_traversal_may_start_from_an_image(make, model, photos):
  folder = make('traverse', images=photos[:1], steps=3, dimensions=1)
  row = cells(folder / 'grid.png', 3)
  mean, _ = model.encode(np.asarray(Image.open(photos[0]))[None])
  decoded = [
    figures.to_uint8(
      model.decode(np.where(np.arange(2) == dimension, 0.0, mean))
    )[0]
    for dimension in (0, 1)
  ]
  # In the middle the dimension that moves is 0, and the other the image's.
  assert any(np.array_equal(row[1], image) for image in decoded)


def test_manifold_covers_the_plane_and_shows_the_labels(make, model):
  folder = make('manifold', side=3, label='Smiling')
  grid = cells(folder / 'grid.png', 3)
  center = figures.to_uint8(model.decode(np.zeros((1, 2))))[0]
  assert np.abs(grid[4].astype(int) - center).max() <= 1
  with Image.open(folder / 'means.png') as image:
    assert min(image.size) > 300
  with pytest.raises(UserError, match='the labels are: Bald, Eyeglasses'):
    make('manifold', side=3, label='Hat')


def test_class_that_cannot_be_written_is_printed(make, monkeypatch, capsys):
  names = ['有', '無']
  monkeypatch.setattr(splits.Labels, 'class_names', lambda self, key: names)
  monkeypatch.setattr(plots, '_fonts', lambda text: None)
  make('manifold', side=2)
  said = capsys.readouterr().out
  for index, name in enumerate(names):
    assert f'note: class {index} is {name}, for which there is no font.' in said


def test_as_a_user_has_it(trained_run, tmp_path):
  code, out, err = run(
    'sample',
    f'--workdir={trained_run}',
    '--num_images=2',
    f'--output={tmp_path}',
    script='generate.py',
  )
  assert (code, err) == (0, '')
  assert out == f'  {tmp_path}/grid.png\n  {tmp_path}/0000.png\n'
  code, _, err = run('paint', f'--workdir={trained_run}', script='generate.py')
  assert code == 2 and 'the command is paint; it must be' in err


def test_manifold_of_more_dimensions_is_refused(make, tmp_path, small_config):
  import input_pipeline
  from runs import progress
  import train

  small_config.train.num_epochs = 1
  data = input_pipeline.load(small_config)
  workdir = tmp_path / 'run'
  train.train_and_evaluate(small_config, workdir, data, progress.NullWriter())
  with pytest.raises(UserError, match='needs a model with 2 latent dimensions'):
    make('manifold', workdir=workdir)
