"""Discrete latents: codes of a grid or a table, posteriors and priors of them.

The distributions have what `vae.distributions` describes.
"""

import math
from typing import Any

from flax import struct
import jax
from jax import lax, nn
import jax.numpy as jnp
import numpy as np

from vae import numerics


@struct.dataclass
class Codes:
  """A posterior that is certain: one code, [batch, *event], for each image."""

  mean: jax.Array

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    return jnp.broadcast_to(self.mean, (num_samples, *self.mean.shape))

  def log_prob(self, z: jax.Array) -> jax.Array:
    # log 1, of its own code.
    return jnp.zeros(z.shape[: z.ndim - self.mean.ndim + 1])

  def kl_per_dimension(self, prior) -> jax.Array | None:
    """The logarithm of each dimension's number of values."""
    if not isinstance(prior, UniformCodes):
      return None
    log_levels = np.log(np.array(prior.levels, np.float32))
    return jnp.broadcast_to(log_levels, self.mean.shape)


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


@struct.dataclass
class NearestCodes(Codes):
  """Codes of a table, the nearest to what the encoder has put out.

  `mean` is the code, through which the gradient reaches `encoded` as if they
  were the same (van den Oord et al. 2017, section 3.2); `code` has a gradient
  in the table.
  """

  encoded: jax.Array
  code: jax.Array


@struct.dataclass
class CodePrior:
  """Codes of a table at each position, uniform or one after another.

  Attributes:
    table: [num_codes, size].
    shape: of z, [*positions, size].
    network: a Flax module (`vae.autoregressive`), codes' numbers [batch,
      positions] to logits of each position's, given those before it; None for
      uniform codes.
    variables: of the network.
  """

  table: jax.Array
  shape: tuple[int, ...] = struct.field(pytree_node=False)
  network: Any = struct.field(pytree_node=False, default=None)
  variables: Any = None

  @property
  def mean(self) -> jax.Array:
    return jnp.broadcast_to(self.table.mean(axis=0), self.shape)

  def log_prob(self, z: jax.Array) -> jax.Array:
    leading = z.shape[: z.ndim - len(self.shape)]
    positions = math.prod(self.shape[:-1])
    if self.network is None:
      return jnp.full(leading, -positions * math.log(len(self.table)))
    codes = nearest(z.reshape(-1, positions, z.shape[-1]), self.table)
    log_probs = nn.log_softmax(self.network.apply(self.variables, codes))
    chosen = jnp.take_along_axis(log_probs, codes[..., None], axis=-1)
    return chosen.sum(axis=(-2, -1)).reshape(leading)

  def sample(self, keys: jax.Array, num_samples: int = 1) -> jax.Array:
    positions, num_codes = math.prod(self.shape[:-1]), len(self.table)

    def draw(index):
      own = numerics.fold_in(keys, index)

      def at(position, codes):
        u = numerics.uniform(numerics.fold_in(own, position), (num_codes,))
        logits: jax.Array = jnp.zeros(num_codes)
        if self.network is not None:
          logits = self.network.apply(self.variables, codes)[:, position]
        # The largest of logits with Gumbel noise is a draw.
        chosen = jnp.argmax(logits - jnp.log(-jnp.log(u)), axis=-1)
        return codes.at[:, position].set(chosen)

      codes = jnp.zeros((len(keys), positions), jnp.int32)
      return lax.fori_loop(0, positions, at, codes)

    codes = lax.map(draw, jnp.arange(num_samples))
    return self.table[codes].reshape(num_samples, len(keys), *self.shape)


def nearest(z: jax.Array, table: jax.Array) -> jax.Array:
  """The number of the nearest code of a table [num_codes, size] to each z."""
  squares = jnp.square(table).sum(axis=-1)
  # By default an accelerator rounds the factors by more than codes differ.
  products = jnp.matmul(z, table.T, precision=lax.Precision.HIGHEST)
  return jnp.argmin(squares - 2 * products, axis=-1)


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
