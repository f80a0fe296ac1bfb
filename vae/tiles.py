"""Images as a device keeps them: in the tiles of a TPU's memory.

An array on a TPU lies in tiles of 8 × 128 numbers of its last two axes. Images
of other shapes are interleaved, or padded, and a program that picks some of
them first copies all into another layout. As [num_images, 8·k, 128], with zeros
behind the last pixel, each image is k whole tiles, of any size, and is picked
where it lies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_ROWS, _COLUMNS = 8, 128


def shape_of(image_shape: tuple[int, int, int]) -> tuple[int, int]:
  """The shape of an image in tiles, (8·k, 128)."""
  num_tiles = -(-math.prod(image_shape) // (_ROWS * _COLUMNS))
  return _ROWS * num_tiles, _COLUMNS


def pack(images: np.ndarray) -> np.ndarray:
  """Images [n, height, width, channels] as tiles [n, 8·k, 128].

  Nothing is copied if the images fill their tiles.
  """
  flat = images.reshape(len(images), -1)
  shape = shape_of(images.shape[1:])
  missing = math.prod(shape) - flat.shape[1]
  if missing:
    flat = np.pad(flat, ((0, 0), (0, missing)))
  return flat.reshape(len(images), *shape)


def unpack(tiles: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
  """The inverse of `pack`."""
  flat = jnp.reshape(tiles, (len(tiles), -1))
  return flat[:, : math.prod(image_shape)].reshape(len(tiles), *image_shape)
