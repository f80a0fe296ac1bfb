"""Models, one module each, by the name that `config.model.name` gives.

A module has a Flax module class `Model`. Its dataclass fields, but for
`image_shape` and `axis_name`, are the settings of `config.model`, and `setup`
raises ValueError for those that it cannot take. Whoever trains, samples,
reconstructs or measures calls

  encode(images, train) → a posterior over z,
  decode(z, train) → a likelihood of images,
  prior() → a distribution of z (`vae.distributions`).

`VAE` has these for networks with one latent. Images are [batch, height, width,
channels] in [0, 1].
"""

import functools
import math
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from vae import distributions, registry
from vae.layers import at_least_float32

# Gradients have 1/σ², and Adam squares them, in float32.
_SIGMA = 1e-6, 1e6


class VAE(nn.Module):
  """A variational autoencoder of images, with the prior N(0, I).

  A subclass has `latent_shape` and makes, in a `setup` that first calls this
  one, `encoder`, images to (mean, logvar), and `decoder`, z to the parameters
  of p(x|z). Both are called with `train`. The heads of mean and logvar are
  layers of their own, so that a population can pad them. What leaves the
  networks is at least float32, whatever `dtype` they compute in.

  Attributes:
    image_shape: (height, width, channels).
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
    """The likelihood p(x|z) of images, for z [..., *latent_shape].

    BatchNorm takes its statistics over all of z's leading axes.
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
    return distributions.StandardNormal(self.latent_shape)

  def latent_mask(self) -> jax.Array | float:
    """1 for the dimensions of the run, 0 for padding (`vae.loading`)."""
    return self.get_variable('padding', 'mask', 1.0)


def find(name: str) -> type[nn.Module]:
  """The model class of a name; raises UserError if there is none."""
  return registry.find('vae.models', name, 'Model')


def from_config(config, axis_name: str | None = None) -> nn.Module:
  """The model of a complete config; its batches are laid over `axis_name`."""
  size = config.data.image_size
  return find(config.model.name)(
    image_shape=(size, size, config.data.channels),
    axis_name=axis_name,
    **registry.settings(config.model),
  )


def check(config) -> None:
  """Raises ValueError if a model cannot take its settings; computes nothing."""
  _check(from_config(config))


# The points of a sweep share a few models, and tracing one takes half a second.
@functools.lru_cache(maxsize=64)
def _check(model: nn.Module) -> None:
  images = jnp.zeros((1, *model.image_shape))
  jax.eval_shape(lambda key: model.init(key, images), jax.random.key(0))
