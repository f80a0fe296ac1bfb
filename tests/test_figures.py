from etils import epath
import jax
import numpy as np
from PIL import Image
from vae.model import VAE

from vae import figures


def test_grid_puts_images_in_rows_with_white_lines():
  images = np.zeros((5, 2, 3, 3), np.uint8)
  images[:] = np.arange(5).reshape(-1, 1, 1, 1) * 10
  grid = figures.image_grid(images, columns=3, padding=1)
  assert grid.shape == (2 * 2 + 1, 3 * 3 + 2, 3)
  for index, (row, column) in enumerate(
    [(0, 0), (0, 4), (0, 8), (3, 0), (3, 4)]
  ):
    assert np.all(grid[row : row + 2, column : column + 3] == index * 10)
  assert np.all(grid[2] == 255) and np.all(grid[:, 3] == 255)
  # The place of the sixth.
  assert np.all(grid[3:, 8:] == 255)


def test_unit_range_is_clipped_and_rounded():
  values = np.array([-1, 0, 0.5, 0.998, 1, 7]).reshape(1, 1, 6, 1)
  np.testing.assert_array_equal(
    figures.to_uint8(values).ravel(), [0, 0, 128, 254, 255, 255]
  )


def test_side_by_side_alternates():
  left, right = np.zeros((2, 3, 1, 1, 1), np.uint8)
  right[:] = 1
  both = figures.side_by_side(left, right)
  np.testing.assert_array_equal(both.ravel(), [0, 1] * 3)


def test_png_holds_the_pixels(tmp_path):
  for channels in (1, 3):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels))
    image = image.astype(np.uint8)
    figures.save_png(image, figures.epath.Path(tmp_path) / 'new/a.png')
    loaded = np.asarray(Image.open(tmp_path / 'new/a.png'))
    np.testing.assert_array_equal(loaded.reshape(image.shape), image)


def test_samples_and_reconstructions_of_a_model():
  model = VAE((8, 8, 3), 2, (4,))
  images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
  variables = model.init(jax.random.key(0), images / 255)
  key = jax.random.key(1)
  np.testing.assert_allclose(
    figures.samples(model, variables, key, 9),
    model.apply(variables, key, 9, method='sample'),
    atol=1e-6,
  )
  np.testing.assert_allclose(
    figures.reconstructions(model, variables, images),
    model.apply(variables, images / np.float32(255)),
    atol=1e-6,
  )


def test_gif_shows_its_frames_in_order_for_ever(tmp_path):
  frames = [np.full((4, 6, 3), value, np.uint8) for value in (0, 80, 160, 240)]
  path = epath.Path(tmp_path / 'new' / 'a.gif')
  figures.save_gif(frames, path, frame_duration=50)
  with Image.open(path) as gif:
    assert (gif.n_frames, gif.info['loop'], gif.size) == (4, 0, (6, 4))
    for index, frame in enumerate(frames):
      gif.seek(index)
      assert gif.info['duration'] == 50
      np.testing.assert_array_equal(np.asarray(gif.convert('RGB')), frame)
