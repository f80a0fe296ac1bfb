"""Likelihoods p(x|z) of images in [0, 1].

Each is a small pytree with log_prob(images), [...], nats per image, and mean,
the image that it describes, [..., height, width, channels]. `is_mass` says
whether log_prob is that of a probability of 8-bit images, not of a density.

`from_outputs` builds one from a network's outputs, `num_outputs` for each
pixel. Sums are over the last three axes.
"""

import math
from typing import get_args, Literal

from flax import struct
import jax
from jax import nn
import jax.numpy as jnp
from jax.scipy import special

Name = Literal[
  'gaussian',
  'gaussian_per_pixel',
  'laplace',
  'bernoulli',
  'continuous_bernoulli',
  'logistic',
  'logistic_mixture',
]
NAMES = get_args(Name)

# Those with a single σ, fixed or learned.
WITH_SIGMA = 'gaussian', 'laplace'

_LOG_2PI = math.log(2 * math.pi)

# The smallest scales, about 0.6 and 0.2 of a grey level: images have no finer
# detail.
_MIN_LOG_SIGMA = -6.0
_MIN_LOG_SCALE = -7.0

# Grey levels, and the half of the step between two.
_LEVELS, _HALF_STEP = 256, 1 / 510

# Components of a logistic mixture.
_COMPONENTS = 10


def num_outputs(name: str, channels: int) -> int:
  """The number of a network's outputs for each pixel."""
  if name == 'logistic_mixture':
    return _COMPONENTS * (1 + 2 * channels + channels * (channels - 1) // 2)
  return channels * (2 if name in ('gaussian_per_pixel', 'logistic') else 1)


def from_outputs(name: str, outputs: jax.Array, channels: int, sigma):
  """The likelihood of a name, from outputs [..., height, width, num_outputs].

  `sigma` is the standard deviation of those `WITH_SIGMA`.
  """
  match name:
    case 'gaussian':
      return Gaussian(outputs, sigma)
    case 'laplace':
      return Laplace(outputs, sigma)
    case 'bernoulli':
      return Bernoulli(outputs)
    case 'continuous_bernoulli':
      return ContinuousBernoulli(outputs)
    case 'gaussian_per_pixel':
      mean, log_sigma = jnp.split(outputs, 2, axis=-1)
      return Gaussian(mean, jnp.exp(_soft_floor(log_sigma, _MIN_LOG_SIGMA)))
    case 'logistic':
      mean, log_scale = jnp.split(outputs, 2, axis=-1)
      return Logistic(mean, _soft_floor(log_scale, _MIN_LOG_SCALE))
  return LogisticMixture.from_outputs(outputs, channels)


def _soft_floor(x: jax.Array, floor: float) -> jax.Array:
  """Never below `floor`, with a gradient everywhere."""
  return floor + nn.softplus(x - floor)


def _flat(x: jax.Array) -> jax.Array:
  """The axes of an image in one, [..., pixels].

  On a CPU XLA computes sums over short last axes number by number.
  """
  return x.reshape(*x.shape[:-3], -1)


@jax.custom_jvp
def _softplus(x: jax.Array) -> jax.Array:
  """log(1 + e^x), which vectorises, unlike `nn.softplus` on a CPU."""
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


_softplus.defjvps(lambda tangent, value, x: tangent * nn.sigmoid(x))


@struct.dataclass
class Gaussian:
  """Independent Gaussian noise around a mean, of one σ or one of each pixel."""

  mean: jax.Array
  sigma: jax.Array | float
  is_mass = False

  def log_prob(self, images: jax.Array) -> jax.Array:
    """log N(images; mean, σ²), constant included."""
    squares = jnp.square(_flat(images) - _flat(self.mean))
    if jnp.ndim(self.sigma):
      sigma = _flat(jnp.asarray(self.sigma))
      terms = squares / jnp.square(sigma) + 2 * jnp.log(sigma) + _LOG_2PI
      return -0.5 * terms.sum(axis=-1)
    dimensions = math.prod(images.shape[-3:])
    log_normalizer = dimensions * (jnp.log(self.sigma) + 0.5 * _LOG_2PI)
    return -0.5 * squares.sum(axis=-1) / jnp.square(self.sigma) - log_normalizer


@struct.dataclass
class Laplace:
  """Independent Laplace noise of one standard deviation σ around a mean."""

  mean: jax.Array
  sigma: jax.Array | float
  is_mass = False

  def log_prob(self, images: jax.Array) -> jax.Array:
    """-√2 |x - mean| / σ - log(√2 σ), summed."""
    scale = self.sigma / math.sqrt(2)
    dimensions = math.prod(images.shape[-3:])
    errors = jnp.abs(_flat(images) - _flat(self.mean)).sum(axis=-1)
    return -errors / scale - dimensions * jnp.log(2 * scale)


@struct.dataclass
class Bernoulli:
  """Pixels that are black or white, given the logits of white."""

  logits: jax.Array
  is_mass = True

  @property
  def mean(self) -> jax.Array:
    return nn.sigmoid(self.logits)

  def log_prob(self, images: jax.Array) -> jax.Array:
    """Σ x log p + (1 - x) log(1 - p).

    For grey values between 0 and 1 this is the customary cross-entropy, not the
    density of a distribution: it has no normaliser (Loaiza-Ganem & Cunningham
    2019).
    """
    logits = _flat(self.logits)
    return (_flat(images) * logits - _softplus(logits)).sum(axis=-1)


@struct.dataclass
class ContinuousBernoulli:
  """A density on [0, 1], C(λ) λ^x (1 - λ)^(1 - x), given the logits of λ.

  Loaiza-Ganem & Cunningham 2019, equations 5 to 8. The mean is λ / (2λ - 1) +
  1 / (2 artanh(1 - 2λ)): with l the logit, 1 / (1 - e^-l) - 1 / l.
  """

  logits: jax.Array
  is_mass = False

  @property
  def mean(self) -> jax.Array:
    is_small, logit = self._split()
    size = jnp.abs(logit)
    above = 1 / -jnp.expm1(-size) - 1 / size  # Of white; at most 1.
    exact = jnp.where(logit > 0, above, 1 - above)
    return jnp.where(is_small, 0.5 + self.logits / 12, exact)

  def log_prob(self, images: jax.Array) -> jax.Array:
    """The cross-entropy, and the log of its normaliser."""
    # C = l (1 + e^l) / (e^l - 1) = 2 · (l/2) / tanh(l/2).
    is_small, logit = self._split()
    exact = jnp.log(logit / jnp.tanh(logit / 2))
    taylor = math.log(2) + jnp.square(self.logits) / 12
    log_normalizer = jnp.where(is_small, taylor, exact)
    entropy = Bernoulli(self.logits).log_prob(images)
    return entropy + _flat(log_normalizer).sum(axis=-1)

  def _split(self) -> tuple[jax.Array, jax.Array]:
    """Marks logits too small to divide by; returns logits safe to divide by."""
    is_small = jnp.abs(self.logits) < 0.03
    return is_small, jnp.where(is_small, 1.0, self.logits)


@struct.dataclass
class Logistic:
  """A logistic of each pixel, integrated over the bins of 256 grey levels.

  Kingma et al. 2016, appendix C.1; the first and the last bin have the tails.
  The scale is √3 / π of the standard deviation.
  """

  mean: jax.Array
  log_scale: jax.Array
  is_mass = True

  def log_prob(self, images: jax.Array) -> jax.Array:
    arrays = map(_flat, (images, self.mean, self.log_scale))
    return _log_bin(*arrays).sum(axis=-1)


def _log_bin(images, mean, log_scale) -> jax.Array:
  """log of a logistic's probability of the bin around each grey value."""
  inverse = jnp.exp(-log_scale)
  upper = (images + _HALF_STEP - mean) * inverse
  lower = (images - _HALF_STEP - mean) * inverse
  below, above = nn.log_sigmoid(upper), nn.log_sigmoid(-lower)
  # σ(a) - σ(b) = σ(a) σ(-b) (1 - e^(b - a)).
  inside = below + above + jnp.log(-jnp.expm1(-2 * _HALF_STEP * inverse))
  middle = 0.5 / (_LEVELS - 1)
  edges = jnp.where(images > 1 - middle, above, inside)
  return jnp.where(images < middle, below, edges)


@struct.dataclass
class LogisticMixture:
  """A mixture of discretised logistics of a pixel (Salimans et al. 2017).

  Its components are those of all channels together; within one, the mean of a
  channel is linear in the channels before it (section 2.2).

  Attributes:
    logits: of the components, [..., height, width, components].
    means: [..., height, width, components, channels].
    log_scales: likewise.
    slopes: of channels by those before them, row by row, [..., height, width,
      components, ½ channels (channels - 1)].
  """

  logits: jax.Array
  means: jax.Array
  log_scales: jax.Array
  slopes: jax.Array
  is_mass = True

  @classmethod
  def from_outputs(cls, outputs: jax.Array, channels: int):
    """From outputs [..., height, width, num_outputs]."""
    logits, others = jnp.split(outputs, [_COMPONENTS], axis=-1)
    others = others.reshape(*outputs.shape[:-1], _COMPONENTS, -1)
    means, log_scales, slopes = jnp.split(
      others, [channels, 2 * channels], axis=-1
    )
    # Components that start alike would stay alike.
    spread = (jnp.arange(_COMPONENTS) + 0.5) / _COMPONENTS
    return cls(
      logits,
      means + spread[:, None],
      _soft_floor(log_scales - 2, _MIN_LOG_SCALE),
      jnp.tanh(slopes),
    )

  @property
  def mean(self) -> jax.Array:
    conditional = self._conditional_means(None)
    weights = nn.softmax(self.logits)[..., None]
    return jnp.sum(weights * conditional, axis=-2)

  def log_prob(self, images: jax.Array) -> jax.Array:
    x = images[..., None, :]
    means = self._conditional_means(x)
    each = _log_bin(x, means, self.log_scales).sum(axis=-1)
    log_weights = nn.log_softmax(self.logits)
    return special.logsumexp(each + log_weights, axis=-1).sum(axis=(-2, -1))

  def _conditional_means(self, x: jax.Array | None) -> jax.Array:
    """Means of each channel given those before it, or given their means."""
    known: list[jax.Array] = []
    conditional, row = [], 0
    for channel in range(self.means.shape[-1]):
      mean = self.means[..., channel]
      for index, before in enumerate(known):
        mean = mean + self.slopes[..., row + index] * before
      row += channel
      conditional.append(mean)
      # What the next channels see is relative to the middle.
      known.append((mean if x is None else x[..., channel]) - 0.5)
    return jnp.stack(jnp.broadcast_arrays(*conditional), axis=-1)
