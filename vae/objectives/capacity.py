"""A rate that is held at a capacity, which grows (Burgess et al. 2018).

  loss = distortion + β |KL - C|, with the KL as a mean over the global batch

(equation 8 of the paper, whose γ is β here). At C = 0 it is the ELBO.
"""

from flax import struct
import jax
import jax.numpy as jnp

from vae import objectives
from vae.objectives import Batch, elbo, static


@struct.dataclass
class Objective(elbo.Objective):
  """The ELBO with a target for the rate.

  Attributes:
    capacity: C at the end, nats per image.
    capacity_epochs: over which C rises linearly from 0.
  """

  beta: float = 100.0
  capacity: float = 25.0
  capacity_epochs: float = static(default=10.0)

  def rate(self, model, batch: Batch, draws: elbo.Draws) -> jax.Array:
    """The distance of the rate from the capacity, [batch]."""
    capacity: jax.Array | float = self.capacity
    if self.capacity_epochs:
      capacity *= jnp.minimum(batch.epoch / self.capacity_epochs, 1)
    distance = jnp.abs(objectives.mean(batch, draws.kl) - capacity)
    return jnp.full_like(draws.kl, distance)
