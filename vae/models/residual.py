"""A residual VAE with normalisation before each activation.

Blocks of two convolutions with a skip around them (He et al. 2016, "Identity
mappings in deep residual networks"), group normalisation (Wu & He 2018) and
SiLU before each convolution, at resolutions that halve from level to level.
"""

import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vae import layers, models, registry

# Groups of a normalisation, at most.
_MAX_GROUPS = 32


class Model(models.VAE):
  """A residual network with a Gaussian latent, a vector or a map.

  Attributes:
    image_shape: height and width are multiples of 2 ** len(channels).
    latent_dim: size of z, or of its last axis if it is spatial.
    spatial: whether z is a map [height, width, latent_dim] at the lowest
      resolution, not a vector.
    channels: of each level, from the highest resolution down.
    num_blocks: residual blocks of each level.
    attention: whether the positions of the lowest resolution attend to each
      other (Vaswani et al. 2017), as in the autoencoders of latent diffusion.
  """

  latent_dim: int = 64
  spatial: bool = False
  channels: tuple[int, ...] = (32, 64, 128)
  num_blocks: int = 1
  attention: bool = False

  def setup(self):
    super().setup()
    registry.check_at_least(1, latent_dim=self.latent_dim)
    size = lowest_resolution(self.image_shape, self.channels, self.num_blocks)
    network = self.channels, self.num_blocks, self.dtype, self.attention
    self.encoder = Encoder(self.heads, self.spatial, *network)
    self.decoder = Decoder(size, self.num_outputs, *network)

  @property
  def latent_shape(self) -> tuple[int, ...]:
    if not self.spatial:
      return (self.latent_dim,)
    size = lowest_resolution(self.image_shape, self.channels, self.num_blocks)
    return (*size, self.latent_dim)


def lowest_resolution(
  image_shape: tuple[int, int, int], channels: tuple[int, ...], num_blocks: int
) -> tuple[int, int]:
  """(height, width) of the last level; ValueError if there is no such size."""
  registry.check_at_least(1, channels=channels, num_blocks=num_blocks)
  height, width, _ = image_shape
  stride = 2 ** len(channels)
  if not channels or height % stride or width % stride:
    raise ValueError(
      f'channels has {len(channels)} entries, each of which halves the image; '
      f'there must be at least one, and the sides, {height}×{width}, must be '
      f'multiples of {stride}.'
    )
  return height // stride, width // stride


class Encoder(nn.Module):
  """Images [batch, height, width, channels] to one array for each head.

  `heads` has the number of features of each, by name; `spatial` ones are maps.
  """

  heads: dict[str, int]
  spatial: bool
  channels: tuple[int, ...]
  num_blocks: int
  dtype: Any
  attention: bool = False

  @nn.compact
  def __call__(self, x, train):
    x = x.astype(self.dtype)
    for features in self.channels:
      x = _conv(x, features, self.dtype, stride=2)
      for _ in range(self.num_blocks):
        x = Block(self.dtype)(x)
    if self.attention:
      x = _attend(x, self.dtype)
    x = _normalise(x, self.dtype)
    if not self.spatial:
      x = x.reshape(x.shape[0], -1)
    return tuple(
      layers.dense(x, features, self.dtype, name)
      for name, features in self.heads.items()
    )


class Decoder(nn.Module):
  """Latents, vectors or maps, to the parameters of p(x|z)."""

  start_size: tuple[int, int]
  num_outputs: int
  channels: tuple[int, ...]
  num_blocks: int
  dtype: Any
  attention: bool = False

  @nn.compact
  def __call__(self, z, train):
    z = z.astype(self.dtype)
    *_, features = self.channels
    if z.ndim == 2:
      features *= math.prod(self.start_size)
    x = layers.dense(z, features, self.dtype)
    x = x.reshape(-1, *self.start_size, self.channels[-1])
    if self.attention:
      x = _attend(x, self.dtype)
    for features in (*self.channels[-2::-1], self.channels[0]):
      for _ in range(self.num_blocks):
        x = Block(self.dtype)(x)
      x = _conv(layers.double(x), features, self.dtype)
    return _conv(_normalise(x, self.dtype), self.num_outputs, self.dtype)


class Block(nn.Module):
  """x + conv(act(norm(conv(act(norm(x)))))), channels kept."""

  dtype: Any

  @nn.compact
  def __call__(self, x):
    y = x
    for _ in range(2):
      y = _conv(_normalise(y, self.dtype), x.shape[-1], self.dtype)
    return x + y


def _attend(x: jax.Array, dtype: Any) -> jax.Array:
  """Self-attention over all positions with a skip, in the caller's scope."""
  y = _normalise(x, dtype).reshape(x.shape[0], -1, x.shape[-1])
  attention = nn.MultiHeadDotProductAttention(
    num_heads=1,
    dtype=dtype,
    param_dtype=jnp.promote_types(dtype, jnp.float32),
  )
  return x + attention(y).reshape(x.shape)


def _conv(x: jax.Array, features: int, dtype: Any, stride: int = 1):
  x, bias = layers.Conv(features, stride=stride, dtype=dtype)(x)
  return x + bias.astype(dtype)


def _normalise(x: jax.Array, dtype: Any) -> jax.Array:
  """Group normalisation and SiLU, in the caller's scope."""
  norm = nn.GroupNorm(
    num_groups=math.gcd(x.shape[-1], _MAX_GROUPS),
    dtype=dtype,
    param_dtype=jnp.promote_types(dtype, jnp.float32),
  )
  return nn.silu(norm(x))
