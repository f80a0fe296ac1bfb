"""The convolutional VAE of the article and of PyTorch-VAE.

Encoder: stride-2 3×3 convolutions, each with BatchNorm and a rectifier, then
two dense heads for the mean and the log variance of q(z|x). Decoder: a dense
layer, stride-2 transposed convolutions, and a last convolution to the image's
channels. For 64×64 colour images and 128 latent dimensions PyTorch-VAE's
channels (`configs/celeba.py`) make 3,937,635 parameters, and those of the
article's listing (`configs/article.py`) 3,225,795.
"""

import math
from typing import Any, Literal

from flax import linen as nn
import numpy as np

from vae import layers, models, pca, registry

# The rectifiers, each by its slope below zero.
_SLOPES = {'leaky_relu': 0.01, 'relu': 0.0}


class Model(models.VAE):
  """The network of the article.

  Attributes:
    image_shape: height and width are multiples of 2 ** len(hidden_channels).
    hidden_channels: output channels of the encoder's convolutions, in order.
      With none, encoder and decoder are linear.
    decoder_channels: output channels of the decoder's transposed convolutions,
      as many as `hidden_channels`; empty for the mirror image of the encoder
      (`mirrored`).
    upsampling: by transposed convolutions; or `nearest`, by doubled pixels,
      which leaves no grid and takes longer.
    convolution: as `method` of `vae.convolutions`.
    initialisation: random, as PyTorch's; or the best linear VAE of some images
      (`vae.pca`).
  """

  latent_dim: int = 128
  hidden_channels: tuple[int, ...] = (32, 64, 128, 256, 512)
  decoder_channels: tuple[int, ...] = ()
  activation: Literal['leaky_relu', 'relu'] = 'leaky_relu'
  upsampling: Literal['transposed', 'nearest'] = 'transposed'
  convolution: Literal['auto', 'native', 'matmul', 'dilated'] = 'auto'
  initialisation: Literal['random', 'pca'] = 'random'

  def setup(self):
    super().setup()
    registry.check_at_least(
      1,
      latent_dim=self.latent_dim,
      hidden_channels=self.hidden_channels,
      decoder_channels=self.decoder_channels,
    )
    height, width, _ = self.image_shape
    num_layers = len(self.hidden_channels)
    stride = 2**num_layers
    if height % stride or width % stride:
      raise ValueError(
        f'hidden_channels has {num_layers} entries, each of which halves the '
        f'image; its sides must be multiples of {stride}, not {height}×{width}.'
      )
    decoder_channels = self.decoder_channels or mirrored(self.hidden_channels)
    if len(decoder_channels) != num_layers:
      raise ValueError(
        f'decoder_channels has {len(decoder_channels)} entries; it must have '
        f'{num_layers}, as hidden_channels, or none for their mirror image.'
      )
    if self.initialisation == 'pca':
      self._check_pca(decoder_channels)
    slope = _SLOPES[self.activation]
    block = slope, self.dtype, self.convolution, self.axis_name
    self.encoder = Encoder(self.heads, self.hidden_channels, *block)
    # The decoder starts with the channels that the encoder ends with; without
    # convolutions its dense layer makes the image itself.
    start_channels = (self.num_outputs, *self.hidden_channels)[-1]
    start = height // stride, width // stride, start_channels
    self.decoder = Decoder(
      start, self.num_outputs, decoder_channels, *block, self.upsampling
    )

  @property
  def latent_shape(self) -> tuple[int, ...]:
    return (self.latent_dim,)

  def initial_variables(
    self, variables: Any, images: np.ndarray, beta: float
  ) -> tuple[Any, int]:
    """See `vae.pca.initial_variables`; β is the weight of the KL."""
    slope, noise = _SLOPES[self.activation], beta * self.sigma**2
    return pca.initial_variables(variables, images, slope, noise)

  def _check_pca(self, decoder_channels: tuple[int, ...]) -> None:
    for name, needed in (
      ('likelihood', 'gaussian'),
      ('upsampling', 'transposed'),
      ('num_classes', 0),
      ('spectral_norm', False),
    ):
      if getattr(self, name) != needed:
        raise ValueError(
          f'initialisation is pca, which needs {name}={needed}, not '
          f'{getattr(self, name)}.'
        )
    pairs = 2 * self.num_outputs
    if decoder_channels and decoder_channels[-1] < pairs:
      raise ValueError(
        f'initialisation is pca; the last of decoder_channels must be at least '
        f'{pairs}, a pair for each channel of the image, not '
        f'{decoder_channels[-1]}.'
      )


class Encoder(nn.Module):
  """Images [batch, height, width, channels] to an array for each head."""

  heads: dict[str, int]
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
      x = layers.BatchNormRectify(
        self.negative_slope, self.axis_name, name=f'BatchNorm_{index}'
      )(x, bias, train)
    x = x.reshape(x.shape[0], -1)
    return tuple(
      layers.dense(x, features, self.dtype, name)
      for name, features in self.heads.items()
    )


class Decoder(nn.Module):
  """Latents [batch, latent_dim] to the parameters of p(x|z)."""

  start_shape: tuple[int, int, int]
  num_outputs: int
  hidden_channels: tuple[int, ...]
  negative_slope: float
  dtype: Any
  convolution: str
  axis_name: str | None
  upsampling: str = 'transposed'

  @nn.compact
  def __call__(self, z, train):
    z = z.astype(self.dtype)
    x = layers.dense(z, math.prod(self.start_shape), self.dtype)
    x = x.reshape(-1, *self.start_shape)
    if not self.hidden_channels:
      return x
    for index, features in enumerate(self.hidden_channels):
      options = {'dtype': self.dtype, 'method': self.convolution}
      if self.upsampling == 'nearest':
        x, bias = layers.Conv(features, **options)(layers.double(x))
      else:
        x, bias = layers.ConvTranspose(features, **options)(x)
      x = layers.BatchNormRectify(
        self.negative_slope, self.axis_name, name=f'BatchNorm_{index}'
      )(x, bias, train)
    x, bias = layers.Conv(
      self.num_outputs, dtype=self.dtype, method=self.convolution
    )(x)
    return x + bias.astype(self.dtype)


def mirrored(hidden_channels: tuple[int, ...]) -> tuple[int, ...]:
  """The decoder's channels in PyTorch-VAE: (32, 64, 128) gives (64, 32, 32).

  The encoder's in reverse, from the second on; the last transposed convolution
  keeps its channels.
  """
  backwards = hidden_channels[::-1]
  return (*backwards[1:], *backwards[-1:])
