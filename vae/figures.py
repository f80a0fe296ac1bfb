"""Grids of images as PNG and GIF, and walks through the latent space.

Walks are latents to decode, in the order of the pictures, with all axes of z in
one: [..., latent_dim].
"""

from collections.abc import Sequence
import io
import statistics

from etils import epath
import numpy as np
from PIL import Image

from vae import distributions

PATHS = ('linear', 'spherical')

_BACKGROUND = 255

# The manifold's outermost lines are these quantiles of the prior.
_MANIFOLD_QUANTILES = (0.02, 0.98)


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Images in [0, 1] as uint8, clipped and rounded; uint8 stays as it is.

  NaN, of a run that diverged, is black.
  """
  images = np.asarray(images)
  if images.dtype == np.uint8:
    return images
  numbers = np.nan_to_num(np.clip(images, 0, 1).astype(np.float32))
  return np.round(numbers * 255).astype(np.uint8)


def image_grid(
  images: np.ndarray, columns: int, padding: int = 2
) -> np.ndarray:
  """Lays images [n, height, width, channels] out in rows, from the top left.

  The last row may be shorter. The white lines between images are `padding`
  pixels wide. Returns uint8 [grid_height, grid_width, channels].
  """
  images = to_uint8(images)
  rows = -(-len(images) // columns)
  missing = ((0, rows * columns - len(images)), *((0, 0),) * 3)
  images = np.pad(images, missing, constant_values=_BACKGROUND)
  lines = ((0, 0), (0, padding), (0, padding), (0, 0))
  images = np.pad(images, lines, constant_values=_BACKGROUND)
  _, height, width, channels = images.shape
  grid = images.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
  grid = grid.reshape(rows * height, columns * width, channels)
  return grid[: rows * height - padding, : columns * width - padding]


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Interleaves two batches to uint8 [2n, …], so that even grids pair them."""
  pairs = np.stack([to_uint8(left), to_uint8(right)], axis=1)
  return pairs.reshape(-1, *pairs.shape[2:])


def save_png(image: np.ndarray, path: epath.Path) -> None:
  """Writes uint8 [height, width, 1 or 3] as PNG; makes the folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(png(image))


def png(image: np.ndarray) -> bytes:
  """The PNG of an image, uint8 [height, width, 1 or 3]."""
  return _encoded([image], format='PNG')


def gif(frames: Sequence[np.ndarray], frame_duration: int) -> bytes:
  """An animation that repeats for ever.

  Frames are uint8 [height, width, 1 or 3], shown for so many milliseconds.
  """
  options = dict(save_all=True, duration=frame_duration, loop=0)
  return _encoded(frames, format='GIF', **options)


def _encoded(images, **options) -> bytes:
  first, *others = (
    Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in images
  )
  if others:
    options['append_images'] = others
  buffer = io.BytesIO()
  first.save(buffer, **options)
  return buffer.getvalue()


def interpolate(
  start: np.ndarray, end: np.ndarray, steps: int, path: str
) -> np.ndarray:
  """From one latent to another, both included, [steps, latent_dim].

  Linear: (1 - t) a + t b. Spherical: along the great circle, White 2016, with
  the length going linearly from ‖a‖ to ‖b‖; it stays in the shell in which the
  mass of N(0, I) lies. It is linear if a and b are on one line through 0.
  """
  t = np.linspace(0, 1, steps)[:, None]
  weights: Sequence[np.ndarray] = (1 - t, t)
  lengths = np.linalg.norm(start), np.linalg.norm(end)
  if path == 'spherical' and min(lengths) > 0:
    cosine = np.clip(start @ end / np.prod(lengths), -1, 1)
    angle = np.arccos(cosine)
    if np.sin(angle) >= 1e-6:
      length = (1 - t) * lengths[0] + t * lengths[1]
      weights = [
        length / of_end * np.sin(weight * angle) / np.sin(angle)
        for weight, of_end in zip(weights, lengths, strict=True)
      ]
  return weights[0] * start + weights[1] * end


def traverse(
  center: np.ndarray, dimensions: Sequence[int], values: np.ndarray
) -> np.ndarray:
  """Each dimension alone through its values, [dimensions, steps, latent_dim].

  From `center` [latent_dim], with `values` [steps, latent_dim].
  """
  walks = np.tile(center, (len(dimensions), len(values), 1))
  for walk, dimension in zip(walks, dimensions, strict=True):
    walk[:, dimension] = values[:, dimension]
  return walks


def prior_values(prior, reach: float, steps: int) -> np.ndarray:
  """Values of each dimension through its prior, [steps, latent_dim].

  They are the quantiles at which N(0, 1) has evenly spaced values from -reach
  to reach.
  """
  cdf = statistics.NormalDist().cdf
  u = np.array([cdf(x) for x in np.linspace(-reach, reach, steps)])
  u = u.reshape(-1, *[1] * prior.mean.ndim)
  u = np.broadcast_to(u, (steps, *prior.mean.shape))
  values = distributions.quantile(prior, u)
  return np.asarray(values).reshape(steps, -1)


def manifold(prior, side: int) -> np.ndarray:
  """A grid over the mass of a two-dimensional prior, [side², 2].

  Equally spaced in probability; Kingma & Welling 2014, figure 4. By rows from
  the top left: the first dimension grows to the right, the second upwards.
  """
  line = np.linspace(*_MANIFOLD_QUANTILES, side)
  x, y = np.meshgrid(line, line[::-1])
  u = np.stack([x.ravel(), y.ravel()], axis=-1)
  values = distributions.quantile(prior, u.reshape(-1, *prior.mean.shape))
  return np.asarray(values).reshape(-1, 2)
