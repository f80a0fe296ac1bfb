import numpy as np
import pytest
from scipy import stats

from vae import walks

A, B = np.array([3.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])


@pytest.mark.parametrize('path', walks.PATHS)
def test_paths_begin_and_end_where_they_should(path):
  z = walks.interpolate(A, B, 7, path)
  assert z.shape == (7, 3)
  np.testing.assert_allclose(z[[0, -1]], [A, B], atol=1e-12)


def test_linear_path_is_straight_and_even():
  z = walks.interpolate(A, B, 5, 'linear')
  np.testing.assert_allclose(np.diff(z, axis=0), np.tile((B - A) / 4, (4, 1)))


def test_spherical_path_turns_evenly_and_keeps_to_the_shell():
  z = walks.interpolate(A, B, 5, 'spherical')
  np.testing.assert_allclose(np.linalg.norm(z, axis=1), [3, 2.5, 2, 1.5, 1])
  directions = z / np.linalg.norm(z, axis=1, keepdims=True)
  angles = np.arccos(np.sum(directions[1:] * directions[:-1], axis=1))
  np.testing.assert_allclose(angles, np.pi / 8)


@pytest.mark.parametrize('end', [2 * A, -A, 0 * A])
def test_spherical_path_without_a_plane_is_the_linear_one(end):
  np.testing.assert_allclose(
    walks.interpolate(A, end, 5, 'spherical'),
    walks.interpolate(A, end, 5, 'linear'),
  )


def test_traversal_moves_one_dimension_at_a_time():
  center = np.array([0.5, -1.0, 2.0])
  z = walks.traverse(center, np.array([2, 0]), reach=3.0, steps=5)
  assert z.shape == (2, 5, 3)
  np.testing.assert_allclose(z[0, :, 2], [-3, -1.5, 0, 1.5, 3])
  np.testing.assert_allclose(z[1, :, 0], [-3, -1.5, 0, 1.5, 3])
  np.testing.assert_allclose(z[0, :, :2], np.tile(center[:2], (5, 1)))
  np.testing.assert_allclose(z[1, :, 1:], np.tile(center[1:], (5, 1)))


def test_manifold_is_even_in_probability():
  z = walks.manifold(9)
  grid = stats.norm.cdf(z).reshape(9, 9, 2)
  line = np.linspace(0.02, 0.98, 9)
  np.testing.assert_allclose(grid[0, :, 0], line, atol=1e-5)
  # Pictures are laid out from the top: the second dimension falls.
  np.testing.assert_allclose(grid[:, 0, 1], line[::-1], atol=1e-5)
