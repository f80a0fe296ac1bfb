"""InfoVAE: q(z) is drawn to p(z) by its MMD (Zhao et al. 2019).

  loss = distortion + β · KL + λ · MMD²(q(z), p(z))

(equation 6 of the paper, with β = 1 - α and λ for its α + λ - 1). The squared
maximum mean discrepancy is the unbiased estimate over the global batch
(Gretton et al. 2012, equation 4). Without its weight it is the ELBO.
"""

from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp

from vae import numerics, objectives
from vae.objectives import Batch, elbo, static


@struct.dataclass
class Objective(elbo.Objective):
  """The ELBO with a penalty on the MMD of q(z) and p(z).

  Attributes:
    mmd_weight: λ, nats for each unit of the kernel.
    kernel: of the squared distance d² of two z of D dimensions: exp(-d² / 2D),
      or the inverse multiquadric 2D / (2D + d²).
  """

  beta: float = 0.0
  mmd_weight: float = 1000.0
  kernel: Literal['gaussian', 'multiquadric'] = static(default='gaussian')

  def penalties(self, model, batch: Batch, draws: elbo.Draws) -> dict[str, Any]:
    """The terms of the estimate that are of each example."""
    mask = model.latent_mask()
    ours = (draws.z[0] * mask).reshape(len(batch.mask), -1)
    # Other draws than the noise on the input.
    keys = numerics.fold_in(batch.noise_keys, 1)
    theirs = model.prior().sample(keys)[0] * mask
    size = jnp.broadcast_to(mask, draws.z.shape[2:]).sum()
    value = mmd(batch, ours, theirs.reshape(ours.shape), size, self.kernel)
    return {'mmd': (self.mmd_weight, value)}


def mmd(
  batch: Batch, ours: jax.Array, theirs: jax.Array, size, kernel: str
) -> jax.Array:
  """Terms [batch], whose mean over the global batch estimates MMD².

  Of draws [batch, latent_dim] of two distributions, for a kernel of `size`
  dimensions.
  """
  all_ours, all_theirs, counts = objectives.gather(
    batch, (ours, theirs, batch.mask)
  )
  own = numerics.global_positions(batch.axis_name, len(ours))[:, None]
  is_other = (jnp.arange(len(counts)) != own) & counts
  num_others = jnp.maximum(counts.sum() - 1, 1)

  def mean_kernel(a, b):
    """Over pairs of different positions, as those of one are not used."""
    squares = jnp.square(a[:, None] - b).sum(axis=-1) / (2 * size)
    values = jnp.exp(-squares) if kernel == 'gaussian' else 1 / (1 + squares)
    return jnp.where(is_other, values, 0).sum(axis=1) / num_others

  across = mean_kernel(ours, all_theirs) + mean_kernel(theirs, all_ours)
  return mean_kernel(ours, all_ours) + mean_kernel(theirs, all_theirs) - across
