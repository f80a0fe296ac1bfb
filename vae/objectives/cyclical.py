"""The ELBO with a weight of the KL that rises again and again (Fu et al. 2019).

In each cycle of epochs the weight rises linearly from 0 to β, and stays there
for the rest of it (equation 6 of the paper); validation has the full weight.
"""

from flax import struct
import jax
import jax.numpy as jnp

from vae import registry
from vae.objectives import Batch, elbo, static


@struct.dataclass
class Objective(elbo.Objective):
  """The β-weighted ELBO with cyclical warm-up.

  Attributes:
    cycle_epochs: length of a cycle; the paper has four in a run.
    rising_share: of a cycle, R in the paper.
  """

  cycle_epochs: float = static(default=5.0)
  rising_share: float = static(default=0.5)

  def check(self, config) -> None:
    """Raises ValueError for settings that do not go together."""
    super().check(config)
    if self.kl_warmup_epochs:
      raise ValueError(
        f'kl_warmup_epochs is {self.kl_warmup_epochs:g}; it must be 0, as the '
        'cycles are the warm-up.'
      )
    if self.rising_share > 1:
      raise ValueError(
        f'rising_share is {self.rising_share:g}; it must be at most 1.'
      )
    registry.check_at_least(
      1e-6, cycle_epochs=self.cycle_epochs, rising_share=self.rising_share
    )

  def weight(self, batch: Batch) -> jax.Array | float:
    """The weight of the KL, by the epoch."""
    if not batch.train:
      return self.beta
    share = batch.epoch / self.cycle_epochs % 1
    return self.beta * jnp.minimum(share / self.rising_share, 1)
