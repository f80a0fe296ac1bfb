"""DIP-VAE: the covariance of z is drawn to the identity (Kumar et al. 2018).

  loss = -ELBO + λ_od Σ_{i≠j} C_ij² + λ_d Σ_i (C_ii - 1)²

C is the covariance over the global batch of the posterior means (DIP-VAE-I,
equation 6 of the paper) or of z itself (DIP-VAE-II, equation 7). Without the
weights it is the ELBO.
"""

from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp

from vae import objectives
from vae.objectives import Batch, elbo, static


@struct.dataclass
class Objective(elbo.Objective):
  """The ELBO with a penalty on the covariance of z.

  Attributes:
    covariance_of: `mean` for DIP-VAE-I, `z` for DIP-VAE-II.
    off_diagonal: λ_od.
    diagonal: λ_d.
  """

  covariance_of: Literal['mean', 'z'] = static(default='mean')
  off_diagonal: float = 10.0
  diagonal: float = 100.0

  def check(self, config) -> None:
    """Raises ValueError for settings that do not go together."""
    super().check(config)
    objectives.check_diagonal(config)

  def penalties(self, model, batch: Batch, draws: elbo.Draws) -> dict[str, Any]:
    """Squares of the covariances, the same for each example."""
    posterior = draws.posterior
    mean = posterior.mean.reshape(len(posterior.mean), -1)
    centered = mean - objectives.mean(batch, mean)
    products = centered[:, :, None] * centered[:, None]
    covariance = objectives.mean(batch, products)
    if self.covariance_of == 'z':
      variance = jnp.exp(posterior.logvar).reshape(mean.shape)
      covariance += jnp.diag(objectives.mean(batch, variance))
    mask = jnp.broadcast_to(model.latent_mask(), posterior.mean.shape[1:])
    diagonal = (jnp.diag(covariance) - 1) * mask.ravel()
    off_diagonal = covariance - jnp.diag(jnp.diag(covariance))

    def squares(x: jax.Array) -> jax.Array:
      return jnp.full(len(mean), jnp.square(x).sum())

    return {
      'off_diagonal': (self.off_diagonal, squares(off_diagonal)),
      'diagonal': (self.diagonal, squares(diagonal)),
    }
