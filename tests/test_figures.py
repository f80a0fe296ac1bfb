import io

from etils import epath
import numpy as np
from PIL import Image
import pytest
from scipy import stats

from vae import discrete, distributions, figures

A, B = np.array([3.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])


def test_grid_puts_images_in_rows_with_white_lines():
  images = np.zeros((5, 2, 3, 3), np.uint8)
  images[:] = np.arange(5).reshape(-1, 1, 1, 1) * 10
  grid = figures.image_grid(images, columns=3, padding=1)
  assert grid.shape == (2 * 2 + 1, 3 * 3 + 2, 3)
  places = [(0, 0), (0, 4), (0, 8), (3, 0), (3, 4)]
  for index, (row, column) in enumerate(places):
    assert np.all(grid[row : row + 2, column : column + 3] == index * 10)
  assert np.all(grid[2] == 255) and np.all(grid[:, 3] == 255)
  # The place of the sixth.
  assert np.all(grid[3:, 8:] == 255)


def test_unit_range_is_clipped_and_rounded_and_nan_black():
  values = np.array([-1, 0, 0.5, 0.998, 1, 7, np.nan]).reshape(1, 1, 7, 1)
  np.testing.assert_array_equal(
    figures.to_uint8(values).ravel(), [0, 0, 128, 254, 255, 255, 0]
  )


def test_png_of_one_channel_holds_the_pixels(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 1), np.uint8)
  figures.save_png(image, epath.Path(tmp_path) / 'new/a.png')
  loaded = np.asarray(Image.open(tmp_path / 'new/a.png'))
  np.testing.assert_array_equal(loaded.reshape(image.shape), image)


def test_gif_shows_its_frames_in_order_for_ever():
  frames = [np.full((4, 6, 3), value, np.uint8) for value in (0, 80, 160, 240)]
  content = figures.gif(frames, frame_duration=50)
  with Image.open(io.BytesIO(content)) as gif:
    assert (gif.n_frames, gif.info['loop'], gif.size) == (4, 0, (6, 4))
    for index, frame in enumerate(frames):
      gif.seek(index)
      assert gif.info['duration'] == 50
      np.testing.assert_array_equal(np.asarray(gif.convert('RGB')), frame)


def test_linear_path_is_straight_and_even():
  z = figures.interpolate(A, B, 5, 'linear')
  np.testing.assert_allclose(z[[0, -1]], [A, B], atol=1e-12)
  np.testing.assert_allclose(np.diff(z, axis=0), np.tile((B - A) / 4, (4, 1)))


def test_spherical_path_turns_evenly_and_keeps_to_the_shell():
  z = figures.interpolate(A, B, 5, 'spherical')
  np.testing.assert_allclose(z[[0, -1]], [A, B], atol=1e-12)
  np.testing.assert_allclose(np.linalg.norm(z, axis=1), [3, 2.5, 2, 1.5, 1])
  directions = z / np.linalg.norm(z, axis=1, keepdims=True)
  angles = np.arccos(np.sum(directions[1:] * directions[:-1], axis=1))
  np.testing.assert_allclose(angles, np.pi / 8)


@pytest.mark.parametrize('end', [2 * A, -A, 0 * A])
def test_spherical_path_without_a_plane_is_the_linear_one(end):
  np.testing.assert_allclose(
    figures.interpolate(A, end, 5, 'spherical'),
    figures.interpolate(A, end, 5, 'linear'),
  )


def test_traversal_moves_one_dimension_at_a_time():
  center = np.array([0.5, -1.0, 2.0])
  prior = distributions.StandardNormal((3,))
  values = figures.prior_values(prior, reach=3.0, steps=5)
  z = figures.traverse(center, [2, 0], values)
  assert z.shape == (2, 5, 3)
  for walk, dimension in zip(z, (2, 0), strict=True):
    np.testing.assert_allclose(
      walk[:, dimension], [-3, -1.5, 0, 1.5, 3], atol=1e-4
    )
    others = np.arange(3) != dimension
    np.testing.assert_allclose(walk[:, others], np.tile(center[others], (5, 1)))


def test_traversal_of_codes_is_through_their_levels():
  prior = discrete.UniformCodes((2, 2, 2), levels=(3, 4))
  values = figures.prior_values(prior, reach=3.0, steps=50)
  assert values.shape == (50, 8)
  for dimension in range(8):
    expected = [-1, 0, 1] if dimension % 2 == 0 else [-1, -0.5, 0, 0.5]
    np.testing.assert_array_equal(np.unique(values[:, dimension]), expected)


def test_manifold_is_even_in_probability():
  z = figures.manifold(distributions.StandardNormal((2,)), 9)
  grid = stats.norm.cdf(z).reshape(9, 9, 2)
  line = np.linspace(0.02, 0.98, 9)
  np.testing.assert_allclose(grid[0, :, 0], line, atol=1e-5)
  # Pictures are laid out from the top: the second dimension falls.
  np.testing.assert_allclose(grid[:, 0, 1], line[::-1], atol=1e-5)
