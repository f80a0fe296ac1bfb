"""Importance-weighted bounds of K draws, and their gradients.

  L_K = E log (1/K) Σ_k w_k,   w = p(x|z) p(z) / q(z|x)

(Burda et al. 2016, equation 8). Of M bounds the mean is taken (MIWAE). With
PIWAE the encoder has the gradient of this mean, and the rest of the model that
of L_MK; CIWAE adds the ELBO (Rainforth et al. 2018, equations 10 to 12). The
doubly reparameterised gradient of the encoder has less variance, and for large
K does not lose its signal (DReG; Tucker et al. 2019, equation 8). At K = 1 all
are the ELBO.
"""

from typing import Any, Literal

from flax import struct
import jax
from jax import lax, nn
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from vae import registry
from vae.objectives import Batch, static


@struct.dataclass
class Objective:
  """-L_K, nats per image.

  Attributes:
    num_samples: draws of z of each bound, K.
    num_bounds: M.
    gradient: `plain`, by differentiating the bound; `dreg`; or `piwae`.
    elbo_weight: β of CIWAE: β · ELBO + (1 - β) · L_K.
  """

  num_samples: int = static(default=5)
  num_bounds: int = static(default=1)
  gradient: Literal['plain', 'dreg', 'piwae'] = static(default='plain')
  elbo_weight: float = 0.0

  def check(self, config) -> None:
    """Raises ValueError for settings that do not go together."""
    registry.check_at_least(
      1, num_samples=self.num_samples, num_bounds=self.num_bounds
    )
    if not 0 <= self.elbo_weight <= 1:
      raise ValueError(f'elbo_weight is {self.elbo_weight}; it must be 0 to 1.')
    if self.elbo_weight and self.gradient != 'plain':
      raise ValueError(
        f'elbo_weight is {self.elbo_weight}; it needs gradient=plain.'
      )

  def __call__(self, model, batch: Batch) -> dict[str, jax.Array]:
    """Metrics of each example, [batch].

    `loss`, `elbo`, the `bound`, `distortion` and `kl`, nats per image, and
    `mse` as a mean over pixels, of all draws.
    """
    posterior, prior = model.encode(batch.images, batch.train), model.prior()
    z = posterior.sample(batch.keys, self.num_bounds * self.num_samples)
    gradient = self.gradient if batch.train else 'plain'
    frozen_posterior, frozen_decode = _frozen(posterior), _decoder(model, batch)

    def log_weights(likelihood, prior, posterior, z):
      log_p = likelihood.log_prob(batch.images) + prior.log_prob(z)
      log_w = log_p - posterior.log_prob(z)  # [M · K, batch]
      return log_w.reshape(self.num_bounds, self.num_samples, -1)

    if gradient == 'plain':
      likelihood = model.decode(z, batch.train)
      log_w = log_weights(likelihood, prior, posterior, z)
      bound = _bound(log_w)
    elif gradient == 'dreg':
      log_w = log_weights(frozen_decode(z), prior, posterior, z)
      weights = lax.stop_gradient(nn.softmax(log_w, axis=1))
      # The path through z has the weights twice, all else once.
      z = _scale_gradient(z, weights.reshape(*z.shape[:2]))
      likelihood = model.decode(z, batch.train)
      log_w = log_weights(likelihood, prior, frozen_posterior, z)
      bound = _bound(_frozen(log_w)) + _of_gradient(
        jnp.sum(weights * log_w, axis=1)
      )
    else:
      of_encoder = log_weights(frozen_decode(z), _frozen(prior), posterior, z)
      z = _frozen(z)
      likelihood = model.decode(z, batch.train)
      log_w = log_weights(likelihood, prior, frozen_posterior, z)
      together = _bound(log_w.reshape(1, -1, log_w.shape[-1]))
      bound = together + _of_gradient(_bound(of_encoder))
    elbo, bound = log_w.mean(axis=(0, 1)), bound.mean(axis=0)
    distortion = -likelihood.log_prob(batch.images).mean(axis=0)
    errors = jnp.square(likelihood.mean - batch.images)
    return {
      'loss': -self.elbo_weight * elbo - (1 - self.elbo_weight) * bound,
      'bound': bound,
      'elbo': elbo,
      'distortion': distortion,
      'kl': -elbo - distortion,
      'mse': errors.mean(axis=(0, -3, -2, -1)),
    }


def _bound(log_w: jax.Array) -> jax.Array:
  """log (1/K) Σ w of log w [M, K, batch]."""
  return logsumexp(log_w, axis=1) - jnp.log(log_w.shape[1])


def _frozen(tree: Any) -> Any:
  return jax.tree.map(lax.stop_gradient, tree)


def _of_gradient(x: jax.Array) -> jax.Array:
  """0, with the gradient of x."""
  return x - lax.stop_gradient(x)


def _scale_gradient(z: jax.Array, factor: jax.Array) -> jax.Array:
  """z [samples, batch, *event], with a factor [samples, batch] on gradients."""
  factor = factor.reshape(*factor.shape, *[1] * (z.ndim - factor.ndim))
  return lax.stop_gradient(z) + _of_gradient(z * factor)


def _decoder(model, batch: Batch):
  """p(x|z), without a gradient in the parameters or new statistics."""
  module, variables = model.unbind()

  def decode(z):
    likelihood, _ = module.apply(
      _frozen(variables), z, batch.train, method='decode', mutable=True
    )
    return likelihood

  return decode
