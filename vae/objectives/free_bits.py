"""Free bits: a rate that costs nothing below a floor (Kingma et al. 2016).

  loss = distortion + β Σ_j max(λ, KL_j)      per dimension, or
  loss = distortion + β max(λ, Σ_j KL_j)      per image

KL_j is a mean over the global batch (equation 15 of the paper's appendix C.8,
with one dimension for each group). Below the floor the KL has no gradient, so
that the posterior need not collapse to save it. At λ = 0 it is the ELBO.
"""

from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp

from vae import distributions, objectives
from vae.errors import UserError
from vae.objectives import Batch, elbo, static


@struct.dataclass
class Objective(elbo.Objective):
  """The β-weighted ELBO with free bits.

  Attributes:
    free_nats: λ, nats of each dimension, or of each image.
    per: what has the floor.
  """

  free_nats: float = 0.1
  per: Literal['dimension', 'image'] = static(default='dimension')

  def check(self, config) -> None:
    """Raises ValueError for settings that do not go together."""
    super().check(config)
    if self.per == 'dimension' and (
      config.model.get('posterior') == 'flow'
      or config.model.get('latent_prior', 'normal') != 'normal'
    ):
      raise ValueError(
        'per is dimension, but the KL of this model has no closed form; '
        'per=image needs none.'
      )

  def rate(self, model, batch: Batch, draws: elbo.Draws) -> jax.Array:
    """The KL above the floor, [batch]."""
    if self.per == 'image':
      return jnp.maximum(self.free_nats, draws.kl)
    terms = distributions.kl_per_dimension(draws.posterior, model.prior())
    if terms is None:
      raise UserError(
        'config.objective.per is dimension, but the KL of this model has no '
        'closed form; per=image needs none.'
      )
    # Padding of z has a KL of 0, and no floor.
    floor = self.free_nats * model.latent_mask()
    rate = jnp.maximum(floor, objectives.mean(batch, terms)).sum()
    return jnp.full(len(draws.kl), rate)
