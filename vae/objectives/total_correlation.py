"""β-TCVAE: a weight on the total correlation alone (Chen et al. 2018).

  loss = -ELBO + (w - 1) · KL(q(z) ‖ Π q(z_j))

(equation 4 of the paper with α = γ = 1 and β = w). q(z) and q(z_j) are
estimated from the global batch, by minibatch-weighted or -stratified sampling
(its appendices C.1 and C.2). At w = 1 it is the ELBO.
"""

from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from vae import distributions, numerics, objectives
from vae.objectives import Batch, elbo, static


@struct.dataclass
class Objective(elbo.Objective):
  """The ELBO with a weight on the total correlation.

  Attributes:
    tc_weight: β of the paper.
    sampling: of the batch; `stratified` is unbiased for q(z) itself.
  """

  tc_weight: float = 6.0
  sampling: Literal['weighted', 'stratified'] = static(default='weighted')

  def check(self, config) -> None:
    """Raises ValueError for settings that do not go together."""
    super().check(config)
    objectives.check_diagonal(config)

  def penalties(self, model, batch: Batch, draws: elbo.Draws) -> dict[str, Any]:
    """log q(z) - Σ log q(z_j) at the first draw of each example."""
    value = total_correlation(
      draws.z[0], draws.posterior, batch, model.latent_mask(), self.sampling
    )
    return {'total_correlation': (self.tc_weight - 1, value)}


def total_correlation(
  z: jax.Array,
  posterior: distributions.Normal,
  batch: Batch,
  latent_mask: jax.Array | float,
  sampling: str,
) -> jax.Array:
  """Estimates log q(z) - Σ_j log q(z_j), [batch], at a draw of each example.

  Args:
    z: draws, [batch, *event].
    posterior: that they are of.
    batch: its part of the global batch.
    latent_mask: 0 for dimensions that are padding.
    sampling: `weighted` or `stratified`.
  """
  means, logvars, counts = objectives.gather(
    batch, (posterior.mean, posterior.logvar, batch.mask)
  )
  each = distributions.Normal(means, logvars).log_prob_per_dimension(z[:, None])
  each = each * latent_mask
  log_weights = _log_weights(batch, counts, sampling)
  joint = each.sum(axis=tuple(range(2, each.ndim)))
  log_joint = logsumexp(joint + log_weights, axis=1)
  log_weights = log_weights.reshape(*log_weights.shape, *[1] * (z.ndim - 1))
  marginals = logsumexp(each + log_weights, axis=1) * latent_mask
  return log_joint - marginals.sum(axis=tuple(range(1, z.ndim)))


def _log_weights(batch: Batch, counts: jax.Array, sampling: str) -> jax.Array:
  """The weight of each example of the global batch for each of this device's.

  [batch, global batch]; padding has none.
  """
  size, num_valid = len(counts), counts.sum()
  own = numerics.global_positions(batch.axis_name, len(batch.mask))[:, None]
  others = jnp.arange(size)
  total = batch.num_train_examples
  if sampling == 'weighted':
    weights = jnp.full((len(own), size), 1 / (num_valid * total))
  else:
    # The example itself, and one other that stands for those not drawn.
    num_others = jnp.maximum(num_valid - 1, 1)
    rest = jnp.maximum(total - num_others, 0) / (total * num_others)
    weights = jnp.where(others == own, 1 / total, 1 / num_others)
    weights = jnp.where(others == (own + 1) % num_valid, rest, weights)
  return jnp.log(jnp.where(counts, weights, 0))
