"""FactorVAE: the total correlation, by a discriminator (Kim & Mnih 2018).

  loss = -ELBO + γ · KL(q(z) ‖ Π q(z_j))

(equation 2 of the paper). A discriminator D learns which draws are from q(z)
and which have each dimension permuted over the batch; its logit estimates the
log density ratio (equation 3). Both are trained in one step by one optimiser:
the penalty has no gradient in D, nor D's own loss in the model. At γ = 0 it is
the ELBO.
"""

import math
from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from vae import numerics, objectives, registry
from vae.objectives import Batch, elbo, static


@struct.dataclass
class Objective(elbo.Objective):
  """The ELBO with a penalty on the total correlation.

  Attributes:
    gamma: its weight, γ.
    critic_sizes: widths of the discriminator's layers.
  """

  gamma: float = 10.0
  critic_sizes: tuple[int, ...] = static(default=(1000,) * 6)

  def check(self, config) -> None:
    """Raises ValueError for settings that do not go together."""
    super().check(config)
    registry.check_at_least(1, critic_sizes=self.critic_sizes)

  def critic(self, model) -> nn.Module:
    """The discriminator."""
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    return Discriminator(self.critic_sizes, dtype)

  def critic_input(self, model) -> tuple[int, ...]:
    """The shape of what it sees, without the batch."""
    return (math.prod(model.latent_shape),)

  def penalties(self, model, batch: Batch, draws: elbo.Draws) -> dict[str, Any]:
    """The total correlation; in training also D's loss."""
    z = draws.z[0] * model.latent_mask()
    z = z.reshape(len(z), -1)
    network, params = self.critic(model), model.variables['params']['critic']

    def critic(params, z) -> Any:
      return network.apply({'params': params}, z)

    total_correlation = critic(lax.stop_gradient(params), z)
    values = {'total_correlation': (self.gamma, total_correlation)}
    if batch.train:
      z = lax.stop_gradient(z)
      of_permuted = critic(params, permuted(batch, z))
      loss = nn.softplus(-critic(params, z)) + nn.softplus(of_permuted)
      values['discriminator_loss'] = (1.0, 0.5 * loss)
    return values


class Discriminator(nn.Module):
  """The logit of z [batch, latent_dim] being from q(z), [batch]."""

  sizes: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, z):
    options = {'dtype': self.dtype, 'param_dtype': self.dtype}
    for size in self.sizes:
      z = nn.leaky_relu(nn.Dense(size, **options)(z), 0.2)
    return nn.Dense(1, **options)(z)[:, 0]


def permuted(batch: Batch, z: jax.Array) -> jax.Array:
  """z [batch, latent_dim], each dimension permuted over the global batch."""
  # Other draws than the noise on the input.
  keys = numerics.fold_in(batch.noise_keys, 1)
  draws = numerics.uniform(keys, z.shape[1:])
  order, everyone = objectives.gather(batch, (draws, z))
  order = jnp.argsort(order, axis=0)
  own = numerics.global_positions(batch.axis_name, len(z))
  return jnp.take_along_axis(everyone, order[own], axis=0)
