"""Bounds on the likelihood of images, and the units they are told in.

log p(x) of an image is bounded from below by the ELBO, and more tightly by
the importance-weighted bound. All are nats per image.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np


def optimal_sigma(mse: float) -> float:
  """The shared σ of a Gaussian likelihood that maximises the ELBO.

  For fixed reconstructions σ² is the mean squared error; Rybkin et al. 2021,
  section 3.2.

  Args:
    mse: mean over images, pixels and draws of z.
  """
  # A perfect reconstruction would have an infinite density.
  return float(np.sqrt(max(mse, np.finfo(np.float32).tiny)))


def gaussian_distortion(
  squared_errors: np.ndarray, dimensions: int, sigma: float
) -> np.ndarray:
  """-log N(x; x̂, σ² I) from ‖x - x̂‖², nats."""
  return squared_errors / (2 * sigma**2) + dimensions * (
    np.log(sigma) + 0.5 * np.log(2 * np.pi)
  )


def dequantise(images: jax.Array, uniform: jax.Array) -> jax.Array:
  """8-bit images as draws from a density on [0, 1): y = (x + u) / 256.

  The density of y in a bin integrates to the probability of its grey value,
  so that -log p(y) bounds the cost of coding the image (Theis et al. 2016,
  section 3.1).

  Args:
    images: uint8.
    uniform: u in [0, 1), shaped as `images`.
  """
  return (images + uniform) / 256


def bits_per_dimension(log_prob, dimensions: int):
  """Bits that an 8-bit image costs under a density of dequantised images.

  bpd = -log p(y) / (D ln 2) + 8.

  Args:
    log_prob: log p(y), or a lower bound on it, nats per image.
    dimensions: D, pixels × channels.
  """
  return -log_prob / (dimensions * np.log(2)) + 8


@struct.dataclass
class WeightSums:
  """Running sums of importance weights w, of any shape.

  Relative to the greatest so far, as log w of a large image has so many nats
  that float32 could not add to the logarithm of a sum.

  Attributes:
    count: K, how many weights.
    log_maximum: log max w.
    total: Σ w / max w.
    total_of_squares: Σ (w / max w)².
  """

  count: jax.Array
  log_maximum: jax.Array
  total: jax.Array
  total_of_squares: jax.Array

  @classmethod
  def none(cls, shape: tuple[int, ...], dtype=jnp.float32) -> 'WeightSums':
    """Of no weights."""
    zeros = jnp.zeros(shape, dtype)
    return cls(jnp.zeros((), jnp.int32), zeros - jnp.inf, zeros, zeros)

  def add(self, log_weights: jax.Array, counts: jax.Array) -> 'WeightSums':
    """Adds a chunk.

    Args:
      log_weights: [chunk, …], finite.
      counts: bool [chunk], which of them count; the first chunk's first does.
    """
    number = counts.sum(dtype=jnp.int32)
    counts = counts.reshape(-1, *(1,) * (log_weights.ndim - 1))
    chunk = jnp.where(counts, log_weights, -jnp.inf)
    chunk = chunk.astype(self.log_maximum.dtype)
    log_maximum = jnp.maximum(self.log_maximum, chunk.max(axis=0))
    before = jnp.exp(self.log_maximum - log_maximum)
    added = jnp.exp(chunk - log_maximum)
    return WeightSums(
      self.count + number,
      log_maximum,
      self.total * before + added.sum(axis=0),
      self.total_of_squares * before**2 + (added**2).sum(axis=0),
    )

  def merge(self) -> 'WeightSums':
    """The sums over the first axis as well, [n, …] to […]."""
    log_maximum = self.log_maximum.max(axis=0)
    scale = jnp.exp(self.log_maximum - log_maximum)
    return WeightSums(
      self.count.sum(axis=0),
      log_maximum,
      (self.total * scale).sum(axis=0),
      (self.total_of_squares * scale**2).sum(axis=0),
    )

  def bound(self) -> jax.Array:
    """L_K = log (1/K) Σ_k w_k; Burda et al. 2016, equation 8."""
    return self.log_maximum + jnp.log(self.total / self.count)

  def effective_sample_size(self) -> jax.Array:
    """(Σ w)² / Σ w², from 1 to K: how many equal weights say as much."""
    return self.total**2 / self.total_of_squares


def monte_carlo_variance(half_bounds: np.ndarray) -> np.ndarray:
  """Variance of L_K over draws of z, at most, from the bounds of two halves.

  Half the square of their difference is expected to be the variance of L_K/2,
  up to twice that of L_K. Unlike the delta method, 1 / (effective sample size)
  - 1 / K, this holds if a single weight outweighs all others too.

  Args:
    half_bounds: L_K/2 of either half of the draws, [..., 2].

  Returns:
    [...], nats².
  """
  return np.square(np.diff(half_bounds, axis=-1))[..., 0] / 2


class PixelGaussian:
  """Each pixel an independent Gaussian: what any model should beat.

  Mean and variance are those of the dequantised training images.
  """

  # Variance of the dequantisation noise, u/256.
  _NOISE = 1 / (12 * 256**2)

  def __init__(self):
    self._count, self._sum, self._squares = 0, 0.0, 0.0

  def add(self, images: np.ndarray) -> None:
    """Takes more training images, uint8 [batch, height, width, channels]."""
    images = images.astype(np.float64)
    self._count += len(images)
    self._sum += images.sum(axis=0)
    self._squares += np.square(images).sum(axis=0)

  def log_prob(self, images: np.ndarray) -> np.ndarray:
    """E_u log p((x + u) / 256) of uint8 images; [batch], nats."""
    mean = self._sum / self._count
    variance = (self._squares / self._count - mean**2) / 256**2 + self._NOISE
    mean = (mean + 0.5) / 256
    squares = ((images + 0.5) / 256 - mean) ** 2 + self._NOISE
    density = squares / variance + np.log(2 * np.pi * variance)
    return -0.5 * density.sum(axis=(1, 2, 3))
