"""The base of models with one latent: an encoder, a decoder, the prior N(0, I).

Images are [batch, height, width, channels] in [0, 1]. What leaves the networks
is at least float32, whatever `dtype` they compute in.
"""

import math
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from vae import distributions
from vae.distributions import at_least_float32

# Gradients have 1/σ², and Adam squares them, in float32.
_SIGMA = 1e-6, 1e6


class VAE(nn.Module):
  """A variational autoencoder of images.

  A subclass has `latent_shape` and makes, in a `setup` that first calls this
  one, `encoder`, images to (mean, logvar), and `decoder`, z to the parameters
  of p(x|z). Both are called with `train`. The heads of mean and logvar are
  layers of their own, so that a population can pad them.

  Attributes:
    image_shape: (height, width, channels).
    likelihood: `gaussian` or `bernoulli`.
    sigma: standard deviation of the Gaussian likelihood, or its first value.
    learn_sigma: whether one shared σ is learned (Rybkin et al. 2021).
    dtype: of the computation; parameters and statistics are at least float32.
    axis_name: the pmap axis of a global batch, for statistics over it.
  """

  image_shape: tuple[int, int, int]
  likelihood: Literal['gaussian', 'bernoulli'] = 'gaussian'
  sigma: float = 1.0
  learn_sigma: bool = False
  dtype: Literal['float32', 'bfloat16', 'float64'] = 'float32'
  axis_name: str | None = None

  def setup(self):
    if not _SIGMA[0] <= self.sigma <= _SIGMA[1]:
      raise ValueError(
        f'sigma is {self.sigma:g}; it must be at least {_SIGMA[0]:g} and at '
        f'most {_SIGMA[1]:g}.'
      )
    if self.learn_sigma:
      if self.likelihood != 'gaussian':
        raise ValueError(
          'learn_sigma is True; only the gaussian likelihood has a sigma, '
          f'{self.likelihood} has none.'
        )
      self.log_sigma = self.param(
        'log_sigma',
        nn.initializers.constant(math.log(self.sigma)),
        (),
        jnp.promote_types(self.dtype, jnp.float32),
      )

  @property
  def latent_shape(self) -> tuple[int, ...]:
    """The shape of z."""
    raise NotImplementedError

  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """p(x|z) of the posterior's mean; makes all parameters."""
    return self.decode(self.encode(images, train).mean, train)

  def encode(self, images: jax.Array, train: bool = False) -> Any:
    """The posterior q(z|x) over z [batch, *latent_shape]."""
    mean, logvar = self.encoder(images, train)
    return distributions.Normal(
      at_least_float32(mean), at_least_float32(logvar)
    )

  def decode(self, z: jax.Array, train: bool = False) -> Any:
    """The likelihood p(x|z) of images.

    Args:
      z: [..., *latent_shape]; BatchNorm takes its statistics over all.
      train: whether statistics are those of the batch.
    """
    z = z * self.latent_mask()
    flat = z.reshape(-1, *self.latent_shape)
    outputs = at_least_float32(self.decoder(flat, train))
    leading = z.shape[: z.ndim - len(self.latent_shape)]
    outputs = outputs.reshape(*leading, *self.image_shape)
    if self.likelihood == 'bernoulli':
      return distributions.Bernoulli(outputs)
    sigma = jnp.exp(self.log_sigma) if self.learn_sigma else self.sigma
    return distributions.Gaussian(outputs, sigma)

  def prior(self) -> Any:
    """p(z) = N(0, I)."""
    return distributions.StandardNormal(self.latent_shape)

  def latent_mask(self) -> jax.Array | float:
    """1 for the dimensions of the run, 0 for padding (`trainer.Population`)."""
    return self.get_variable('padding', 'mask', 1.0)
