import math

import numpy as np
import pytest

from vae import tiles


@pytest.mark.parametrize(
  'shape',
  [(1, 1, 1), (8, 8, 3), (28, 28, 1), (32, 32, 1), (64, 64, 3), (5, 90, 3)],
)
def test_images_are_the_same_in_tiles(shape):
  images = np.random.default_rng(0).integers(0, 256, (7, *shape), np.uint8)
  packed = tiles.pack(images)
  rows, columns = packed.shape[1:]
  assert (rows, columns) == tiles.shape_of(shape)
  assert rows % 8 == 0 and columns == 128
  # No tile more than the image needs, and nothing but zeros behind it.
  size = math.prod(shape)
  assert 0 <= rows * columns - size < 8 * 128
  assert not packed.reshape(7, -1)[:, size:].any()
  np.testing.assert_array_equal(tiles.unpack(packed, shape), images)


def test_images_that_fill_their_tiles_are_not_copied():
  images = np.zeros((3, 64, 64, 3), np.uint8)
  assert np.shares_memory(tiles.pack(images), images)
