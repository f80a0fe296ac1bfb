"""Posteriors q(z|x) and priors p(z).

Each is a small pytree with

  sample(keys, num_samples) → [num_samples, batch, *event], by a key for each
    example, so that no draw depends on how a batch is laid over devices;
  log_prob(z) → [..., batch], nats, of z [..., batch, *event];
  mean, [batch, *event], or [*event] of a prior.

A posterior also has kl_per_dimension(prior) if there are priors for which it
knows a closed form, and a prior quantile(u) if it has one in closed form (see
the function `quantile`). Logarithms and sums are taken in at least float32,
whatever the network computes in.
"""

import functools
import math
from typing import Any

from flax import struct
import jax
from jax import lax, nn
import jax.numpy as jnp
from jax.scipy import special
import numpy as np

from vae import numerics

_LOG_2PI = math.log(2 * math.pi)

# Draws for quantiles without a closed form, and draws per call.
_NUM_DRAWS, _DRAWS_AT_ONCE = 5_000, 500


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
    return _sum_event(self.log_prob_per_dimension(z), self.mean.ndim - 1)

  def log_prob_per_dimension(self, z: jax.Array) -> jax.Array:
    """log q(z_j|x), of the shape of z and `mean` together."""
    return _normal_log_prob(z, self.mean, self.logvar)

  def kl_per_dimension(self, prior) -> jax.Array | None:
    """½ (μ² + σ² - 1 - log σ²); Kingma & Welling 2014, appendix B."""
    if not isinstance(prior, StandardNormal):
      return None
    # expm1 keeps the digits if σ is close to 1, as in a collapsed dimension.
    expected = jnp.square(self.mean) + jnp.expm1(self.logvar)
    return 0.5 * (expected - self.logvar)


@struct.dataclass
class FullNormal:
  """A Gaussian over vectors z with all covariances.

  Attributes:
    mean: [batch, latent_dim].
    scale: the Cholesky factor L of the covariance, lower triangular with a
      positive diagonal, [batch, latent_dim, latent_dim].
  """

  mean: jax.Array
  scale: jax.Array

  @classmethod
  def from_rows(cls, mean, logvar, rows) -> 'FullNormal':
    """From log L_jj² [batch, d] and the rows of L below it, [batch, ½d(d-1)].

    The rows of fewer dimensions are the first rows of more.
    """
    indices = np.tril_indices(mean.shape[-1], -1)
    scale = jax.vmap(jnp.diag)(jnp.exp(0.5 * logvar))
    return cls(mean, scale.at[:, *indices].set(rows))

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    """z = μ + L ε."""
    epsilon = _standard_normal(keys, self.mean.shape[1:], num_samples)
    return self.mean + jnp.einsum('bij,sbj->sbi', self.scale, epsilon)

  def log_prob(self, z: jax.Array) -> jax.Array:
    epsilon = _forward_substitution(self.scale, z - self.mean)
    log_scale = jnp.log(jnp.diagonal(self.scale, axis1=-2, axis2=-1))
    return -_sum_event(0.5 * (jnp.square(epsilon) + _LOG_2PI) + log_scale, 1)

  def kl_per_dimension(self, prior) -> jax.Array | None:
    """E KL(q(z_j|z_1 … z_{j-1}, x) ‖ N(0, 1)), the terms of the chain rule."""
    if not isinstance(prior, StandardNormal):
      return None
    variance = jnp.square(self.scale).sum(axis=-1)
    log_scale = jnp.log(jnp.diagonal(self.scale, axis1=-2, axis2=-1))
    return 0.5 * (jnp.square(self.mean) + variance - 1) - log_scale


@struct.dataclass
class Flow:
  """A distribution of vectors that an invertible network transforms.

  Attributes:
    base: of u, a posterior or a prior.
    network: a Flax module (`vae.flows`), u to (z, log |dz/du|).
    variables: of the network.
    context: what else it sees of each image, [batch, features], or None.
  """

  base: Any
  network: Any = struct.field(pytree_node=False)
  variables: Any
  context: jax.Array | None = None

  @property
  def mean(self) -> jax.Array:
    """The image of the base's mean under the network."""
    return self._apply(self.base.mean)[0]

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    return self._apply(self.base.sample(keys, num_samples))[0]

  def log_prob(self, z: jax.Array) -> jax.Array:
    """log p(u) - log |dz/du|; Rezende & Mohamed 2015, equation 5."""
    u, log_det = self._apply(z, method='inverse')
    return self.base.log_prob(u) + log_det

  def _apply(self, x, method='__call__'):
    return self.network.apply(self.variables, x, self.context, method=method)


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
    return _sum_event(_normal_log_prob(z, 0.0, 0.0), len(self.shape))

  def quantile(self, u: jax.Array) -> jax.Array:
    return special.ndtri(u)


@struct.dataclass
class Mixture:
  """A prior that is a mixture of diagonal Gaussians.

  Attributes:
    logits: of the components, [components].
    means: [components, *event].
    logvars: log σ², likewise.
  """

  logits: jax.Array
  means: jax.Array
  logvars: jax.Array

  @property
  def mean(self) -> jax.Array:
    return jnp.tensordot(nn.softmax(self.logits), self.means, 1)

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    of_component, of_noise = jnp.moveaxis(numerics.split(keys, 2), 1, 0)
    u = numerics.uniform(of_component, (num_samples,)).T
    cumulative = jnp.cumsum(nn.softmax(self.logits))
    # Rounding can leave the last sum below 1.
    last = len(self.logits) - 1
    chosen = jnp.minimum(jnp.searchsorted(cumulative, u, side='right'), last)
    epsilon = _standard_normal(of_noise, self.means.shape[1:], num_samples)
    return self.means[chosen] + jnp.exp(0.5 * self.logvars[chosen]) * epsilon

  def log_prob(self, z: jax.Array) -> jax.Array:
    event = self.means.ndim - 1
    z = z.reshape(*z.shape[: z.ndim - event], -1)
    means, logvars = (
      array.reshape(len(array), -1) for array in (self.means, self.logvars)
    )
    each = _log_prob_of_each(z, means, logvars)
    return special.logsumexp(each + nn.log_softmax(self.logits), axis=-1)


@struct.dataclass
class SecondStage:
  """A prior of vectors that is a VAE by itself: p(z) = ∫ p(z|u) N(u; 0, I) du.

  Attributes:
    network: a Flax module (`vae.second_stage`).
    variables: of the network.
    size: of z.
  """

  network: Any = struct.field(pytree_node=False)
  variables: Any
  size: int = struct.field(pytree_node=False)

  @property
  def mean(self) -> jax.Array:
    """The mean of p(z|u) at the mean of u."""
    return self._apply('decode', jnp.zeros(self.size))[0]

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    of_u, of_noise = jnp.moveaxis(numerics.split(keys, 2), 1, 0)
    u, noise = (
      _standard_normal(own, (self.size,), num_samples)
      for own in (of_u, of_noise)
    )
    mean, logvar = self._apply('decode', u)
    return mean + jnp.exp(0.5 * logvar) * noise

  def log_prob_by_draw(self, z: jax.Array, keys: jax.Array) -> jax.Array:
    """log p(z|u) p(u) / q(u|z) by a draw of u; its exp is p(z) in mean."""
    draws = _standard_normal(
      keys, (self.size,), z.size // keys.size // self.size
    )
    mean, logvar = self._apply('encode', z)
    u = mean + jnp.exp(0.5 * logvar) * draws.reshape(z.shape)
    of_z, of_u = Normal(*self._apply('decode', u)), Normal(mean, logvar)
    terms = of_z.log_prob_per_dimension(z) - of_u.log_prob_per_dimension(u)
    return _sum_event(terms + _normal_log_prob(u, 0.0, 0.0), 1)

  def _apply(self, method, x):
    return self.network.apply(self.variables, x, method=method)


def log_prior(prior, z: jax.Array, keys: jax.Array) -> jax.Array:
  """log p(z), [..., batch], or an estimate by draws of keys [batch].

  Where there is only an estimate, its exp has the mean p(z), so that bounds
  with it are bounds.
  """
  if isinstance(prior, SecondStage):
    return prior.log_prob_by_draw(z, keys)
  return prior.log_prob(z)


def kl(posterior, prior, z: jax.Array) -> jax.Array:
  """KL(q(z|x) ‖ p(z)), [batch], nats.

  If there is no closed form it is the Monte-Carlo estimate by the draws z
  [num_samples, batch, *event] from the posterior.
  """
  terms = kl_per_dimension(posterior, prior)
  if terms is None:
    return (posterior.log_prob(z) - prior.log_prob(z)).mean(axis=0)
  return _sum_event(terms, terms.ndim - 1)


def kl_per_dimension(posterior, prior) -> jax.Array | None:
  """The terms of the KL, [batch, *event]; None if there is no closed form."""
  closed_form = getattr(posterior, 'kl_per_dimension', lambda prior: None)
  return closed_form(prior)


def _standard_normal(
  keys: jax.Array, shape: tuple[int, ...], num_samples: int
) -> jax.Array:
  """Draws of N(0, I), [num_samples, batch, *shape].

  The first entries of the last axis do not depend on how many there are.
  """
  *positions, size = shape
  draws = numerics.normal(keys, (size, *positions, num_samples))
  return jnp.moveaxis(jnp.moveaxis(draws, 1, -2), -1, 0)


def _sum_event(values: jax.Array, event_axes: int) -> jax.Array:
  return values.sum(axis=tuple(range(-event_axes, 0)))


def _normal_log_prob(z, mean, logvar) -> jax.Array:
  """log N(z; mean, σ²) of each dimension."""
  squares = jnp.square(z - mean) * jnp.exp(-logvar)
  return -0.5 * (squares + logvar + _LOG_2PI)


@jax.custom_vjp
def _log_prob_of_each(z, means, logvars) -> jax.Array:
  """log N(z; mean, σ²) by each component, [..., components].

  Of vectors z [..., size]; means and logvars are [components, size]. The
  gradient goes by matrix products, many times as fast as the differences. The
  values would lose digits by them: where σ is small, z²/σ² and zμ/σ² are large.
  """
  # Without the barrier XLA computes each exponential again for each z.
  precisions = lax.optimization_barrier(jnp.exp(-logvars))
  squares = jnp.square(z[..., None, :] - means) * precisions
  constants = (logvars + _LOG_2PI).sum(axis=-1)
  return -0.5 * (squares.sum(axis=-1) + constants)


def _log_prob_of_each_backward(args, cotangent):
  def by_products(z, means, logvars):
    dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
    precisions = jnp.exp(-logvars)
    squares = dot(jnp.square(z), precisions.T)
    squares -= 2 * dot(z, (means * precisions).T)
    constants = jnp.square(means) * precisions + logvars + _LOG_2PI
    return -0.5 * (squares + constants.sum(axis=-1))

  return jax.vjp(by_products, *args)[1](cotangent)


_log_prob_of_each.defvjp(
  lambda *args: (_log_prob_of_each(*args), args), _log_prob_of_each_backward
)


def _forward_substitution(lower: jax.Array, b: jax.Array) -> jax.Array:
  """x of L x = b, [..., size], for lower triangular L [..., size, size].

  LAPACK's routine, which JAX calls on CPUs, waits for ever if several devices
  share a few threads.
  """
  below = jnp.tril(lower, -1)

  def subtract_column(column, x):
    value = x[..., column] / lower[..., column, column]
    x -= value[..., None] * below[..., column]
    return x.at[..., column].set(value)

  return lax.fori_loop(0, b.shape[-1], subtract_column, b)


def quantile(prior, u: np.ndarray) -> np.ndarray:
  """The inverse distribution function of each dimension, of u [..., *event].

  From draws, for priors without a closed form.
  """
  if hasattr(prior, 'quantile'):
    return np.asarray(prior.quantile(u))
  draws = draw(prior, numerics.sample_key(0), _NUM_DRAWS)
  draws = np.sort(draws.reshape(_NUM_DRAWS, -1), axis=0)
  grid = (np.arange(_NUM_DRAWS) + 0.5) / _NUM_DRAWS
  columns = np.reshape(u, (-1, draws.shape[1])).T
  values = [
    np.interp(column, grid, sorted_draws)
    for column, sorted_draws in zip(columns, draws.T, strict=True)
  ]
  return np.stack(values, axis=-1).reshape(np.shape(u))


def draw(prior, key: jax.Array, count: int) -> np.ndarray:
  """Draws from a prior, by their positions; [count, *event]."""
  size = min(count, _DRAWS_AT_ONCE)
  parts = []
  with numerics.fixed('float32'):
    for start in range(0, count, size):
      keys = numerics.example_keys(key, start + jnp.arange(size))
      parts.append(np.asarray(_sample(prior, keys)))
  return np.concatenate(parts)[:count]


@jax.jit
def _sample(prior, keys: jax.Array) -> jax.Array:
  return prior.sample(keys)[0]
