"""Posteriors q(z|x), priors p(z) and likelihoods p(x|z).

Each is a small pytree. Those over z have

  sample(keys, num_samples) → [num_samples, batch, *event], by a key for each
    example, so that no draw depends on how a batch is laid over devices;
  log_prob(z) → [..., batch], nats, of z [..., batch, *event];
  mean, [batch, *event], or [*event] of a prior.

A prior also has quantile(u), the inverse distribution function of each
dimension, for walks through its mass. Likelihoods have log_prob(images) and
mean, the image that they describe, [..., height, width, channels]. Logarithms
and sums are taken in at least float32, whatever the network computes in.
"""

import math

from flax import struct
import jax
from jax import lax, nn
import jax.numpy as jnp
from jax.scipy import special
import numpy as np

from vae import numerics

_LOG_2PI = math.log(2 * math.pi)


@struct.dataclass
class Normal:
  """A diagonal Gaussian over z; mean and logvar, log σ², [batch, *event]."""

  mean: jax.Array
  logvar: jax.Array

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    """z = μ + σ ε, so that gradients reach μ and σ; Kingma & Welling 2014.

    The noise of the first dimensions does not depend on how many there are.
    """
    epsilon = _standard_normal(keys, self.mean.shape[1:], num_samples)
    return self.mean + jnp.exp(0.5 * self.logvar) * epsilon

  def log_prob(self, z: jax.Array) -> jax.Array:
    squares = jnp.square(z - self.mean) * jnp.exp(-self.logvar)
    return -0.5 * _sum_event(
      squares + self.logvar + _LOG_2PI, self.mean.ndim - 1
    )


@struct.dataclass
class StandardNormal:
  """The prior N(0, I) of z of a shape."""

  shape: tuple[int, ...] = struct.field(pytree_node=False)

  @property
  def mean(self) -> jax.Array:
    return jnp.zeros(self.shape)

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    return _standard_normal(keys, self.shape, num_samples)

  def log_prob(self, z: jax.Array) -> jax.Array:
    return -0.5 * _sum_event(jnp.square(z) + _LOG_2PI, len(self.shape))

  def quantile(self, u: jax.Array) -> jax.Array:
    return special.ndtri(u)


@struct.dataclass
class Codes:
  """A posterior that is certain: one code, [batch, *event], for each image."""

  mean: jax.Array

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    return jnp.broadcast_to(self.mean, (num_samples, *self.mean.shape))

  def log_prob(self, z: jax.Array) -> jax.Array:
    # log 1, of its own code.
    return jnp.zeros(z.shape[: z.ndim - self.mean.ndim + 1])


@struct.dataclass
class UniformCodes:
  """The uniform prior over a grid of codes, [*positions, len(levels)].

  `levels` has the number of values in each dimension of the last axis.
  """

  shape: tuple[int, ...] = struct.field(pytree_node=False)
  levels: tuple[int, ...] = struct.field(pytree_node=False)

  @property
  def mean(self) -> jax.Array:
    return jnp.zeros(self.shape)

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    u = numerics.uniform(keys, (*self.shape, num_samples))
    return self.quantile(jnp.moveaxis(u, -1, 0))

  def log_prob(self, z: jax.Array) -> jax.Array:
    """-log of the number of codes."""
    positions = math.prod(self.shape[:-1])
    log_count = positions * sum(map(math.log, self.levels))
    return jnp.full(z.shape[: z.ndim - len(self.shape)], -log_count)

  def quantile(self, u: jax.Array) -> jax.Array:
    levels = np.array(self.levels)
    index = jnp.clip(jnp.floor(u * levels), 0, levels - 1)
    return (index - levels // 2) / (levels // 2)


def quantise(z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """Finite scalar quantisation (Mentzer et al. 2023, section 3 and appendix A).

  Each dimension of z [..., len(levels)] is squashed to its number of levels, at
  least 2, and rounded to codes within [-1, 1]; the gradient passes the rounding
  as if it were not there.
  """
  counts = np.array(levels)
  half = (counts - 1) * (1 + 1e-3) / 2
  offset = np.where(counts % 2 == 0, 0.5, 0.0)
  bounded = jnp.tanh(z + np.arctanh(offset / half)) * half - offset
  rounded = bounded + lax.stop_gradient(jnp.round(bounded) - bounded)
  return rounded / (counts // 2)


def kl(posterior, prior) -> jax.Array | None:
  """KL(q(z|x) ‖ p(z)), [batch], nats; None if there is no closed form."""
  terms = _doubled_kl(posterior, prior)
  return terms if terms is None else 0.5 * _sum_event(terms, terms.ndim - 1)


def kl_per_dimension(posterior, prior) -> jax.Array | None:
  """The terms of `kl`, one of each latent dimension; [batch, *event]."""
  terms = _doubled_kl(posterior, prior)
  return terms if terms is None else 0.5 * terms


def _doubled_kl(posterior, prior) -> jax.Array | None:
  match posterior, prior:
    case Normal(), StandardNormal():
      # μ² + σ² - 1 - log σ²; Kingma & Welling 2014, appendix B. expm1 keeps the
      # digits if σ is close to 1, as in a collapsed dimension.
      mean, logvar = posterior.mean, posterior.logvar
      return jnp.square(mean) + jnp.expm1(logvar) - logvar
    case Codes(), UniformCodes():
      log_levels = np.log(np.array(prior.levels, np.float32))
      return jnp.broadcast_to(2 * log_levels, posterior.mean.shape)
  return None


@struct.dataclass
class Gaussian:
  """Images in [0, 1] with independent Gaussian noise of one σ around a mean."""

  mean: jax.Array
  sigma: jax.Array | float

  def log_prob(self, images: jax.Array) -> jax.Array:
    """log N(images; mean, σ² I), constant included; [...], nats per image."""
    dimensions = math.prod(images.shape[-3:])
    squares = jnp.sum(jnp.square(images - self.mean), axis=(-3, -2, -1))
    log_normalizer = dimensions * (jnp.log(self.sigma) + 0.5 * _LOG_2PI)
    return -0.5 * squares / jnp.square(self.sigma) - log_normalizer


@struct.dataclass
class Bernoulli:
  """Images whose grey values are probabilities, given their logits."""

  logits: jax.Array

  @property
  def mean(self) -> jax.Array:
    return nn.sigmoid(self.logits)

  def log_prob(self, images: jax.Array) -> jax.Array:
    """Σ x log p + (1 - x) log(1 - p); [...], nats per image.

    For grey values between 0 and 1 this is the customary cross-entropy, not the
    density of a distribution: it has no normaliser (Loaiza-Ganem & Cunningham
    2019).
    """
    return jnp.sum(
      images * self.logits - nn.softplus(self.logits), axis=(-3, -2, -1)
    )


def _standard_normal(
  keys: jax.Array, shape: tuple[int, ...], num_samples: int
) -> jax.Array:
  """Draws of N(0, I), [num_samples, batch, *shape]."""
  return jnp.moveaxis(numerics.normal(keys, (*shape, num_samples)), -1, 0)


def _sum_event(values: jax.Array, event_axes: int) -> jax.Array:
  return values.sum(axis=tuple(range(-event_axes, 0)))
