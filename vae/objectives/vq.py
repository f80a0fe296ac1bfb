"""The loss of a VQ-VAE (van den Oord et al. 2017, equation 3).

  loss = distortion + w ‖z_e - sg(e)‖² + ‖sg(z_e) - e‖² - log p(codes)

z_e is what the encoder puts out, e the nearest code, and sg stops a gradient.
The third term is there if the table is learned by gradient; the last one trains
an autoregressive prior, and has no gradient in the rest of the model.
"""

from typing import Any

from flax import struct
from jax import lax
import jax.numpy as jnp

from vae.objectives import Batch, elbo


@struct.dataclass
class Objective(elbo.Objective):
  """Distortion, commitment to the codes, and the prior's cost of them.

  Attributes:
    commitment: w, β in the paper, nats for each unit of ‖z_e - e‖².
  """

  commitment: float = 0.25

  def penalties(self, model, batch: Batch, draws: elbo.Draws) -> dict[str, Any]:
    """Squared distances of encodings and codes, [batch]."""
    encoded, code = draws.posterior.encoded, draws.posterior.code

    def distance(a, b):
      return jnp.square(a - b).sum(axis=tuple(range(1, a.ndim)))

    near = distance(encoded, lax.stop_gradient(code))
    values = {'commitment': (self.commitment, near)}
    if getattr(model, 'table', '') == 'gradient':
      values['codebook'] = (1.0, distance(lax.stop_gradient(encoded), code))
    return values
