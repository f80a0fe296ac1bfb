"""`generate.py`: within this process, and once as a user has it."""

import pathlib
import shutil

from absl import flags
from absl.testing import flagsaver
import numpy as np
from PIL import Image
import pytest

import generate
from tests import test_measure
from tests.preloaded import run
from vae import figures, loading
from vae.errors import UserError

SIDE = 16
STEP = SIDE + 2  # With the white line between images.


@pytest.fixture(scope='module')
def model(trained_run):
  return loading.load(trained_run)


@pytest.fixture
def make(trained_run, tmp_path):
  """Runs a command into a folder of its own; returns that folder."""

  def make(command, **settings):
    if not flags.FLAGS.is_parsed():
      flags.FLAGS(['generate'])
    folder = tmp_path / command
    with flagsaver.flagsaver(
      workdir=str(trained_run), output=str(folder), **settings
    ):
      generate.main(command)
    return folder

  return make


def cells(path, columns):
  """The images of a grid, uint8 [rows · columns, SIDE, SIDE, 3]."""
  pixels = np.pad(np.asarray(Image.open(path)), ((0, 2), (0, 2), (0, 0)))
  assert pixels.shape[0] % STEP == 0 and pixels.shape[1] == columns * STEP
  grid = pixels.reshape(-1, STEP, columns, STEP, 3).swapaxes(1, 2)
  return grid[:, :, :SIDE, :SIDE].reshape(-1, SIDE, SIDE, 3)


def read_each(folder, count):
  files = sorted(folder.glob('0*.png'))
  assert len(files) == count
  return np.stack([np.asarray(Image.open(file)) for file in files])


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


def test_samples_are_the_models_as_grid_and_files(make, model):
  folder = make('sample', num_images=6, seed=3, temperature=0.5)
  expected = figures.to_uint8(model.sample(6, seed=3, temperature=0.5))
  np.testing.assert_array_equal(read_each(folder, 6), expected)
  np.testing.assert_array_equal(cells(folder / 'grid.png', 3), expected)


def test_mixture_is_sampled_by_its_seed(make):
  settings = {'num_images': 50, 'prior': 'mixture'}
  images = read_each(make('sample', seed=1, **settings), 50)
  assert images.astype(np.float32).std(axis=0).mean() > 0
  again = read_each(make('sample', seed=1, **settings), 50)
  np.testing.assert_array_equal(images, again)
  assert (read_each(make('sample', seed=2, **settings), 50) != images).any()


def test_own_images_are_reconstructed_and_resizing_is_noted(
  make, model, photos, capsys
):
  folder = make('reconstruct', images=photos)
  out = capsys.readouterr().out
  assert 'fits.png' not in out
  assert f'{photos[1]}: 90×40, cut to its central 40×40 and resized' in out
  pairs = cells(folder / 'grid.png', 4)
  original = np.asarray(Image.open(photos[0]))
  np.testing.assert_array_equal(pairs[0], original)
  expected = figures.to_uint8(model.reconstruct(pairs[::2]))
  np.testing.assert_array_equal(pairs[1::2], expected)
  np.testing.assert_array_equal(read_each(folder, 4), expected)


def test_split_is_reconstructed_in_order(make, celeba_dir):
  folder = make('reconstruct', num_images=3, split='validation')
  pairs = cells(folder / 'grid.png', 4).astype(int)
  # The first image of the validation split, by another decoder.
  file = celeba_dir / 'img_align_celeba' / '000041.jpg'
  with Image.open(file) as image:
    box = (15, 35, 163, 183)
    expected = image.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
  assert np.abs(pairs[0] - np.asarray(expected)).mean() < 3
  own = make('reconstruct', images=[str(file)], crop_size=148)
  assert np.abs(pairs[0] - cells(own / 'grid.png', 2)[0]).mean() < 1


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
  with pytest.raises(UserError, match='two images'):
    make('interpolate', images=photos[:1])


def test_traversals_go_through_the_prior_and_move_in_a_gif(make, model, capsys):
  folder = make('traverse', steps=7, dimensions=7)
  # It has but two dimensions.
  rows = cells(folder / 'grid.png', 7).reshape(2, 7, SIDE, SIDE, 3).astype(int)
  first = int(capsys.readouterr().out.split('from the top: ')[1].split(' ')[0])
  z = np.zeros((7, 2))
  z[:, first] = range(-3, 4)
  assert np.abs(rows[0] - figures.to_uint8(model.decode(z))).max() <= 1
  np.testing.assert_array_equal(rows[0, 3], rows[1, 3])
  with Image.open(folder / 'traversals.gif') as gif:
    # There and back: the ends once each.
    assert gif.n_frames == 12
    assert gif.size == (2 * STEP - 2, SIDE)


def test_manifold_covers_the_plane_and_shows_the_labels(make, model):
  folder = make('manifold', side=3, label='Smiling')
  grid = cells(folder / 'grid.png', 3)
  center = figures.to_uint8(model.decode(np.zeros((1, 2))))[0]
  assert np.abs(grid[4].astype(int) - center).max() <= 1
  with Image.open(folder / 'means.png') as image:
    assert min(image.size) > 300
  with pytest.raises(UserError, match='the labels are: Bald, Eyeglasses'):
    make('manifold', side=3, label='Hat')


def test_manifold_of_more_dimensions_is_refused(make, model, monkeypatch):
  monkeypatch.setattr(generate.run_flags, 'restore', lambda: model)
  monkeypatch.setattr(model, 'latent_shape', (2, 2))
  with pytest.raises(UserError, match='2 latent dimensions; this one has 4'):
    make('manifold')


def test_codes_without_a_gaussian_posterior(make, celeba_dir, monkeypatch):
  codes = test_measure.make_codes(celeba_dir)
  monkeypatch.setattr(generate.run_flags, 'restore', lambda: codes)
  for command, columns in (('sample', 2), ('interpolate', 3), ('traverse', 3)):
    folder = make(command, num_images=4, steps=3, dimensions=2)
    assert cells(folder / 'grid.png', columns).std() > 0
  with pytest.raises(UserError, match='temperature is 0.5'):
    make('sample', num_images=4, temperature=0.5)


def test_no_call_overwrites_the_pictures_of_another(
  trained_run, photos, tmp_path, monkeypatch
):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['generate'])
  # Another file of the same name.
  (tmp_path / 'other').mkdir()
  shutil.copy(photos[1], tmp_path / 'other' / 'fits.png')
  calls = [
    ('sample', '.', {'num_images': 5}),
    ('sample', '.', {'num_images': 2}),
    ('sample', '.', {'num_images': 2, 'checkpoint': '10'}),
    ('reconstruct', '.', {'num_images': 5, 'split': 'train'}),
    ('reconstruct', '.', {'images': ['fits.png']}),
    ('reconstruct', 'other', {'images': ['fits.png']}),
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


def test_a_latent_is_decoded_by_its_numbers(make, model):
  folder = make('decode', z=['0.5', '-1.25'])
  expected = figures.to_uint8(model.decode(np.array([[0.5, -1.25]])))
  np.testing.assert_array_equal(read_each(folder, 1), expected)
  for wrong in (None, ['1'], ['1', 'two'], ['1', 'nan']):
    with pytest.raises(UserError, match='--z'):
      make('decode', z=wrong)
