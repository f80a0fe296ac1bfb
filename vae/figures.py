"""Pictures: grids of images, as arrays and as PNG files."""

import io

from etils import epath
import numpy as np
from PIL import Image

_BACKGROUND = 255


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Images in [0, 1] as uint8, clipped and rounded; uint8 is left alone.

  What is no number, of a run that diverged, is black.
  """
  images = np.asarray(images)
  if images.dtype == np.uint8:
    return images
  numbers = np.nan_to_num(np.clip(images, 0, 1).astype(np.float32))
  return np.round(numbers * 255).astype(np.uint8)


def image_grid(
  images: np.ndarray, columns: int, padding: int = 2
) -> np.ndarray:
  """Lays images out in rows, from the top left.

  Args:
    images: [n, height, width, channels], uint8 or in [0, 1].
    columns: images in a row; the last row may be shorter.
    padding: width in pixels of the white lines between images.

  Returns:
    uint8 [grid_height, grid_width, channels].
  """
  images = to_uint8(images)
  count, height, width, channels = images.shape
  rows = -(-count // columns)
  grid = np.full(
    (
      rows * (height + padding) - padding,
      columns * (width + padding) - padding,
      channels,
    ),
    _BACKGROUND,
    np.uint8,
  )
  for i, image in enumerate(images):
    top = i // columns * (height + padding)
    left = i % columns * (width + padding)
    grid[top : top + height, left : left + width] = image
  return grid


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Interleaves two batches, so that a grid of even width pairs them.

  Args:
    left: [n, height, width, channels], uint8 or in [0, 1].
    right: likewise.

  Returns:
    uint8 [2n, height, width, channels].
  """
  pairs = np.stack([to_uint8(left), to_uint8(right)], axis=1)
  return pairs.reshape(-1, *pairs.shape[2:])


def save_png(image: np.ndarray, path: epath.Path) -> None:
  """Writes uint8 [height, width, 1 or 3] as PNG; makes the folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  _to_pillow(image).save(buffer, format='PNG')
  path.write_bytes(buffer.getvalue())


def save_gif(
  frames: list[np.ndarray], path: epath.Path, frame_duration: int
) -> None:
  """Writes an animation that repeats for ever; makes the folder.

  Args:
    frames: uint8 [height, width, 1 or 3] each, of one size.
    path: of the GIF.
    frame_duration: milliseconds.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  first, *others = map(_to_pillow, frames)
  buffer = io.BytesIO()
  first.save(
    buffer,
    format='GIF',
    save_all=True,
    append_images=others,
    duration=frame_duration,
    loop=0,
  )
  path.write_bytes(buffer.getvalue())


def _to_pillow(image: np.ndarray) -> Image.Image:
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
