"""Regularised autoencoders, without sampling (Ghosh et al. 2020).

  loss = distortion + β ½‖z‖² + λ · regulariser of the decoder

(equation 11 of the paper). z is the posterior's mean, and new images come from
a distribution that is fitted to z afterwards (`generate.py sample
--prior=mixture`). The regulariser is the L2 norm of the decoder's parameters,
or the norm of its Jacobian (sections 3.1 and 3.2). Without the weights it is
the plain autoencoder.
"""

from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp

from vae import numerics
from vae.objectives import Batch, elbo, static


@struct.dataclass
class Objective(elbo.Objective):
  """Distortion, the norm of z, and a regulariser of the decoder.

  Attributes:
    beta: weight of ½‖z‖².
    regulariser: `parameters`, Σ θ² of the decoder; or `gradient`, ‖dx̂/dz‖² of
      all pixels and dimensions, estimated without bias along a random direction
      (Hutchinson 1990).
    regulariser_weight: λ.
  """

  beta: float = 1.0
  sample_posterior: bool = static(default=False)
  regulariser: Literal['parameters', 'gradient'] = static(default='parameters')
  regulariser_weight: float = 1e-4

  def rate(self, model, batch: Batch, draws: elbo.Draws) -> jax.Array:
    """½‖z‖², [batch]."""
    z = draws.z[0] * model.latent_mask()
    return 0.5 * jnp.square(z).sum(axis=tuple(range(1, z.ndim)))

  def penalties(self, model, batch: Batch, draws: elbo.Draws) -> dict[str, Any]:
    """The regulariser, [batch]."""
    if self.regulariser == 'parameters':
      leaves = jax.tree.leaves(model.variables['params']['decoder'])
      norm = sum(jnp.square(leaf).sum() for leaf in leaves)
      values = jnp.full(len(batch.mask), norm)
    else:
      module, variables = model.unbind()

      def decode(z):
        likelihood, _ = module.apply(
          variables, z, batch.train, method='decode', mutable=True
        )
        return likelihood.mean

      z = draws.z[0]
      images, pull_back = jax.vjp(decode, z)
      # Other draws than the noise on the input.
      keys = numerics.fold_in(batch.noise_keys, 1)
      direction = numerics.normal(keys, images.shape[1:])
      (change,) = pull_back(direction.astype(images.dtype))
      values = jnp.square(change).sum(axis=tuple(range(1, z.ndim)))
    return {self.regulariser: (self.regulariser_weight, values)}
