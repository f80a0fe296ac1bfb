"""The objective: distortion + β · rate, in nats per image.

  loss = E_q(z|x)[-log p(x|z)] + β · KL(q(z|x) ‖ N(0, I))

At β = 1 it is the negative ELBO (Kingma & Welling 2014, equation 3); β weighs
the KL and nothing else (Higgins et al. 2017). With β = 0 and no sampling it is
the plain autoencoder, with noise on the input the denoising one.
"""

from flax import struct
import jax
import jax.numpy as jnp

from vae import likelihoods
from vae.model import VAE


@struct.dataclass
class Objective:
  """What is minimised, apart from the model.

  Attributes:
    beta: weight of the KL.
    num_samples: Monte-Carlo samples of z per image, L in the article.
    sample_posterior: whether z is drawn from q(z|x), or is its mean.
    input_noise: standard deviation of the Gaussian noise that is added to the
      encoder's input while training; the target stays clean.
  """

  beta: float
  num_samples: int = struct.field(pytree_node=False, default=1)
  sample_posterior: bool = struct.field(pytree_node=False, default=True)
  input_noise: float = struct.field(pytree_node=False, default=0.0)


def from_config(config) -> Objective:
  """The objective that `config.objective` describes."""
  return Objective(**config.objective)


def kl_to_standard_normal(mean: jax.Array, logvar: jax.Array) -> jax.Array:
  """KL(N(mean, exp(logvar)) ‖ N(0, I)), summed over the last axis.

  ½ Σ_j (μ_j² + σ_j² - 1 - log σ_j²); Kingma & Welling 2014, appendix B.

  Args:
    mean: [..., latent_dim].
    logvar: [..., latent_dim], log σ².

  Returns:
    [...], nats.
  """
  # expm1 keeps the digits where σ is close to 1, as in a collapsed dimension.
  return 0.5 * jnp.sum(jnp.square(mean) + jnp.expm1(logvar) - logvar, axis=-1)


def reparameterize(
  mean: jax.Array, logvar: jax.Array, epsilon: jax.Array
) -> jax.Array:
  """z = μ + σ ε, so that gradients reach μ and σ; Kingma & Welling 2014, §2.4.

  Args:
    mean: [batch, latent_dim].
    logvar: [batch, latent_dim], log σ².
    epsilon: [..., batch, latent_dim], drawn from N(0, I).

  Returns:
    [..., batch, latent_dim].
  """
  return mean + jnp.exp(0.5 * logvar) * epsilon


def terms(
  model: VAE,
  objective: Objective,
  images: jax.Array,
  inputs: jax.Array,
  epsilon: jax.Array | None,
  train: bool,
) -> dict[str, jax.Array]:
  """The objective and its parts; call it through `model.apply`.

  Args:
    model: a bound `VAE`.
    objective: the weights of the parts.
    images: what is to be explained, [batch, height, width, channels], [0, 1].
    inputs: what the encoder sees, shaped as `images`.
    epsilon: [num_samples, batch, latent_dim] drawn from N(0, I), or None for
      z = μ.
    train: whether BatchNorm uses, and remembers, the statistics of the batch.

  Returns:
    [batch] each: `loss`, `elbo`, `distortion` (-log p(x|z)), `kl`, in nats per
    image, and `mse`, the mean over pixels; also `sigma`, where it is learned.
  """
  mean, logvar = model.encode(inputs, train=train)
  if epsilon is None:
    z = mean[None]
  else:
    z = reparameterize(mean, logvar, epsilon)
  outputs = model.decode_outputs(z.reshape(-1, z.shape[-1]), train=train)
  outputs = outputs.reshape(*z.shape[:-1], *outputs.shape[1:])
  distortion = -model.log_prob(images, outputs).mean(axis=0)
  kl = kl_to_standard_normal(mean, logvar)
  errors = jnp.square(likelihoods.mean(model.likelihood, outputs) - images)
  values = {
    'loss': distortion + objective.beta * kl,
    'elbo': -distortion - kl,
    'distortion': distortion,
    'kl': kl,
    'mse': errors.mean(axis=(0, -3, -2, -1)),
  }
  if model.learn_sigma:
    values['sigma'] = jnp.full_like(kl, model.current_sigma())
  return values
