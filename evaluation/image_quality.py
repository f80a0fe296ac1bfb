"""How close a reconstruction is to its original: PSNR and SSIM.

Images are [batch, height, width, channels] with values in [0, 1]; results are
[batch], one number per image.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Wang et al. 2004, section III: an 11×11 Gaussian window, and the constants
# that keep the ratios stable where an image is flat.
WINDOW = 11
_WINDOW_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def mean_squared_error(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean over pixels and channels."""
  return jnp.mean(jnp.square(a - b), axis=(-3, -2, -1))


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio, 10 log10(1 / MSE), in decibels.

  Infinite for equal images.
  """
  return -10 * jnp.log10(mean_squared_error(a, b))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
  """Structural similarity, 1 for equal images; Wang et al. 2004, equation 13.

  The mean over channels and over all positions where the window lies within
  the image.

  Raises:
    ValueError: if the images are smaller than the window of 11×11.
  """
  height, width = a.shape[-3:-1]
  if min(height, width) < WINDOW:
    raise ValueError(
      f'SSIM needs images of at least {WINDOW}×{WINDOW}, not {height}×{width}.'
    )
  rows, columns = _window_matrix(height), _window_matrix(width)

  def blur(x):
    # As two matrix products, the separable window is fast on every backend.
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum('ih,bhwc,jw->bijc', rows, x, columns, precision=highest)

  mean_a, mean_b = blur(a), blur(b)
  variance_a = blur(jnp.square(a)) - jnp.square(mean_a)
  variance_b = blur(jnp.square(b)) - jnp.square(mean_b)
  covariance = blur(a * b) - mean_a * mean_b
  c1, c2 = _K1**2, _K2**2
  similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
  similarity /= jnp.square(mean_a) + jnp.square(mean_b) + c1
  similarity /= variance_a + variance_b + c2
  return similarity.mean(axis=(-3, -2, -1))


def _window_matrix(side: int) -> np.ndarray:
  """The window at each position along a side, [side - 10, side]."""
  offsets = np.arange(WINDOW) - WINDOW // 2
  weights = np.exp(-0.5 * (offsets / _WINDOW_SIGMA) ** 2)
  weights /= weights.sum()
  matrix = np.zeros((side - WINDOW + 1, side), np.float32)
  for i, row in enumerate(matrix):
    row[i : i + WINDOW] = weights
  return matrix
