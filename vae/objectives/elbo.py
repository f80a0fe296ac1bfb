"""The ELBO: distortion + β · rate, in nats per image.

  loss = E_q(z|x)[-log p(x|z)] + β · KL(q(z|x) ‖ p(z))

At β = 1 it is the negative ELBO (Kingma & Welling 2014, equation 3); β weighs
the KL and nothing else (Higgins et al. 2017). With β = 0 and no sampling it is
the plain autoencoder, with noise on the input the denoising one.
"""

from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from vae import distributions, numerics, registry
from vae.objectives import Batch, static


class Draws(NamedTuple):
  """The draws of an objective for a batch, and what follows from them.

  Attributes:
    posterior: q(z|x).
    z: its draws, [num_samples, batch, *latent_shape].
    likelihood: p(x|z) of each.
    kl: KL(q(z|x) ‖ p(z)), [batch], nats.
  """

  posterior: Any
  z: jax.Array
  likelihood: Any
  kl: jax.Array


@struct.dataclass
class Objective:
  """The β-weighted ELBO.

  Attributes:
    beta: weight of the KL.
    num_samples: Monte-Carlo samples of z per image, L in the article.
    sample_posterior: whether z is drawn from q(z|x), or is its mean.
    input_noise: standard deviation of the Gaussian noise that is added to the
      encoder's input while training; the target stays clean.
    kl_warmup_epochs: over which the weight of the KL rises linearly from 0 to
      `beta` (Sønderby et al. 2016); validation has the full weight.
  """

  beta: float = 1.0
  num_samples: int = static(default=1)
  sample_posterior: bool = static(default=True)
  input_noise: float = static(default=0.0)
  kl_warmup_epochs: float = static(default=0.0)

  def check(self, config) -> None:
    """Raises ValueError for settings that do not go together.

    `config` is complete, with those of the model. No float may be negative,
    a subclass's included.
    """
    floats = {k: v for k, v in vars(self).items() if isinstance(v, float)}
    registry.check_at_least(0, **floats)
    registry.check_at_least(1, num_samples=self.num_samples)
    if self.num_samples > 1 and not self.sample_posterior:
      raise ValueError(
        f'num_samples is {self.num_samples}; without sampling '
        '(sample_posterior=False) it must be 1.'
      )

  def __call__(self, model, batch: Batch) -> dict[str, jax.Array]:
    """The objective and its parts, [batch] each.

    `loss`, `elbo`, `distortion` (-log p(x|z)) and `kl` in nats per image; `mse`
    as a mean over pixels; `sigma`, if it is learned.
    """
    inputs = batch.images
    if batch.train and self.input_noise:
      noise = numerics.normal(batch.noise_keys, inputs.shape[1:])
      inputs = inputs + self.input_noise * noise
    posterior = model.encode(inputs, train=batch.train)
    if self.sample_posterior:
      z = posterior.sample(batch.keys, self.num_samples)
    else:
      z = posterior.mean[None]
    likelihood = model.decode(z, train=batch.train)
    distortion = -likelihood.log_prob(batch.images).mean(axis=0)
    kl = distributions.kl(posterior, model.prior(), z)
    errors = jnp.square(likelihood.mean - batch.images)
    values = {
      'elbo': -distortion - kl,
      'distortion': distortion,
      'kl': kl,
      'mse': errors.mean(axis=(0, -3, -2, -1)),
    }
    if getattr(model, 'learn_sigma', False):
      values['sigma'] = jnp.full_like(kl, likelihood.sigma)
    draws = Draws(posterior, z, likelihood, kl)
    rate = self.rate(model, batch, draws)
    loss = distortion + self.weight(batch) * rate
    for name, (weight, value) in self.penalties(model, batch, draws).items():
      loss += weight * value
      values[name] = value
    return {'loss': loss, **values}

  def weight(self, batch: Batch) -> jax.Array | float:
    """The weight of the rate, by the epoch."""
    if batch.train and self.kl_warmup_epochs:
      return self.beta * jnp.minimum(batch.epoch / self.kl_warmup_epochs, 1)
    return self.beta

  def rate(self, model, batch: Batch, draws: Draws) -> jax.Array:
    """The rate that the weight multiplies, [batch]; here the KL."""
    return draws.kl

  def penalties(self, model, batch: Batch, draws: Draws) -> dict[str, Any]:
    """The other terms of the loss: pairs of a weight and values [batch].

    The values are logged under their names.
    """
    return {}
