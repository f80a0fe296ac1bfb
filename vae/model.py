"""The convolutional VAE of the article and of PyTorch-VAE.

Encoder: stride-2 3×3 convolutions, each with BatchNorm and a rectifier, then
two dense heads for the mean and the log variance of q(z|x). Decoder: a dense
layer, stride-2 transposed convolutions, and a last convolution to the image's
channels. For 64×64 colour images and 128 latent dimensions PyTorch-VAE's
channels (`configs/celeba.py`) make 3,937,635 parameters, and those of the
article's listing (`configs/article.py`) 3,225,795.
"""

from collections.abc import Sequence
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vae import layers
from vae import likelihoods
from vae.batch_norm import BatchNormRectify

# The rectifiers, each by its slope below zero.
ACTIVATIONS = {'leaky_relu': 0.01, 'relu': 0.0}


class VAE(nn.Module):
  """A variational autoencoder of images with a N(0, I) prior.

  Images are [batch, height, width, channels] in [0, 1]; latents are
  [batch, latent_dim]. What leaves the network is at least float32, whatever
  `dtype` it computes in.

  Attributes:
    image_shape: (height, width, channels); height and width are multiples of
      2 ** len(hidden_channels).
    latent_dim: size of z.
    hidden_channels: output channels of the encoder's convolutions, in order.
      With none, encoder and decoder are linear.
    decoder_channels: output channels of the decoder's transposed convolutions,
      as many as `hidden_channels`; empty for the mirror image of the encoder
      (`mirrored`).
    activation: one of `ACTIVATIONS`.
    likelihood: one of `likelihoods.LIKELIHOODS`.
    sigma: standard deviation of the Gaussian likelihood, or where it starts.
    learn_sigma: whether one shared σ is learned (Rybkin et al. 2021).
    dtype: of the computation; parameters and statistics are at least float32.
    convolution: one of `layers.METHODS`.
    axis_name: the pmap axis over which BatchNorm takes its statistics while
      training, or None for the local batch.
  """

  image_shape: tuple[int, int, int]
  latent_dim: int
  hidden_channels: tuple[int, ...] = (32, 64, 128, 256, 512)
  decoder_channels: tuple[int, ...] = ()
  activation: str = 'leaky_relu'
  likelihood: str = 'gaussian'
  sigma: float = 1.0
  learn_sigma: bool = False
  dtype: Any = jnp.float32
  convolution: str = 'auto'
  axis_name: str | None = None

  def setup(self):
    height, width, channels = self.image_shape
    stride = 2 ** len(self.hidden_channels)
    if height % stride or width % stride:
      raise ValueError(
        f'{len(self.hidden_channels)} stride-2 layers need sides that are '
        f'multiples of {stride}, not {height}×{width}.'
      )
    block = dict(
      negative_slope=ACTIVATIONS[self.activation],
      dtype=self.dtype,
      convolution=self.convolution,
      axis_name=self.axis_name,
    )
    self.encoder = Encoder(self.latent_dim, self.hidden_channels, **block)
    # The decoder starts with the channels that the encoder ends with; without
    # convolutions its dense layer makes the image itself.
    start_channels = (channels, *self.hidden_channels)[-1]
    self.decoder = Decoder(
      (height // stride, width // stride, start_channels),
      channels,
      self.decoder_channels or mirrored(self.hidden_channels),
      **block,
    )
    if self.learn_sigma:
      self.log_sigma = self.param(
        'log_sigma',
        nn.initializers.constant(math.log(self.sigma)),
        (),
        jnp.promote_types(self.dtype, jnp.float32),
      )

  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Reconstructs the images through the posterior mean."""
    mean, _ = self.encode(images, train=train)
    return self.decode(mean, train=train)

  def encode(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of q(z|x), [batch, latent_dim] each."""
    mean, logvar = self.encoder(images, train)
    return (
      likelihoods.at_least_float32(mean),
      likelihoods.at_least_float32(logvar),
    )

  def decode(self, z: jax.Array, train: bool = False) -> jax.Array:
    """The mean image E[x|z], [batch, height, width, channels].

    The Bernoulli's is within [0, 1]; the Gaussian's may leave it slightly.
    """
    return likelihoods.mean(self.likelihood, self.decode_outputs(z, train))

  def decode_outputs(self, z: jax.Array, train: bool = False) -> jax.Array:
    """The parameters of p(x|z): means (Gaussian) or logits (Bernoulli)."""
    return self.decoder(z, train)

  def log_prob(self, images: jax.Array, outputs: jax.Array) -> jax.Array:
    """log p(x|z) under `decode_outputs`, [..., batch], nats per image."""
    return likelihoods.log_prob(
      self.likelihood, images, outputs, self.current_sigma()
    )

  def current_sigma(self) -> jax.Array | float:
    """σ of the Gaussian likelihood, fixed or learned."""
    return jnp.exp(self.log_sigma) if self.learn_sigma else self.sigma

  def sample(self, key: jax.Array, num_images: int) -> jax.Array:
    """Mean images of `num_images` draws of z from the prior."""
    return self.decode(jax.random.normal(key, (num_images, self.latent_dim)))

  def reconstruct(
    self, images: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    """Images through the model: by the posterior mean, or a draw with `key`."""
    mean, logvar = self.encode(images)
    if key is not None:
      mean += jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    return self.decode(mean)


class Encoder(nn.Module):
  """Images [batch, height, width, channels] to (mean, logvar)."""

  latent_dim: int
  hidden_channels: tuple[int, ...]
  negative_slope: float
  dtype: Any
  convolution: str
  axis_name: str | None

  @nn.compact
  def __call__(self, x, train):
    x = x.astype(self.dtype)
    for index, features in enumerate(self.hidden_channels):
      x, bias = layers.Conv(
        features, stride=2, dtype=self.dtype, method=self.convolution
      )(x)
      x = _batch_norm(self, index)(x, bias, train)
    x = x.reshape(x.shape[0], -1)
    fan_in = x.shape[-1]
    mean = layers.dense(self.latent_dim, fan_in, self.dtype, 'mean')(x)
    logvar = layers.dense(self.latent_dim, fan_in, self.dtype, 'logvar')(x)
    return mean, logvar


class Decoder(nn.Module):
  """Latents [batch, latent_dim] to the parameters of p(x|z)."""

  start_shape: tuple[int, int, int]
  image_channels: int
  hidden_channels: tuple[int, ...]
  negative_slope: float
  dtype: Any
  convolution: str
  axis_name: str | None

  @nn.compact
  def __call__(self, z, train):
    z = z.astype(self.dtype)
    x = layers.dense(math.prod(self.start_shape), z.shape[-1], self.dtype)(z)
    x = x.reshape(-1, *self.start_shape)
    if not self.hidden_channels:
      return x
    for index, features in enumerate(self.hidden_channels):
      x, bias = layers.ConvTranspose(
        features, dtype=self.dtype, method=self.convolution
      )(x)
      x = _batch_norm(self, index)(x, bias, train)
    x, bias = layers.Conv(
      self.image_channels, dtype=self.dtype, method=self.convolution
    )(x)
    return x + bias.astype(self.dtype)


def mirrored(hidden_channels: Sequence[int]) -> tuple[int, ...]:
  """The decoder's channels in the reference implementation (PyTorch-VAE).

  The encoder's in reverse, from the second on; the last transposed convolution
  keeps its channels: (32, 64, 128) gives (64, 32, 32).
  """
  backwards = tuple(hidden_channels)[::-1]
  return (*backwards[1:], *backwards[-1:])


def _batch_norm(module: Encoder | Decoder, index: int) -> BatchNormRectify:
  return BatchNormRectify(
    module.negative_slope, module.axis_name, name=f'BatchNorm_{index}'
  )


def from_config(config, axis_name: str | None = None) -> VAE:
  """The model that `config.model` describes, for images as `config.data`."""
  size = config.data.image_size
  settings = dict(config.model)
  settings['dtype'] = jnp.dtype(settings['dtype'])
  # A config that is older than a setting has its default.
  for name in {'hidden_channels', 'decoder_channels'} & settings.keys():
    settings[name] = tuple(settings[name])
  return VAE(
    image_shape=(size, size, config.data.channels),
    axis_name=axis_name,
    **settings,
  )
