"""A fully connected VAE, as in Kingma & Welling 2014, of any depth."""

import math
from typing import Any, Literal

from flax import linen as nn

from vae import layers, models, registry


class Model(models.VAE):
  """Dense layers from pixels to z, and the same widths in reverse back.

  Attributes:
    hidden_sizes: widths of the encoder's layers; empty for a linear model.
    activation: after each; `gated` multiplies a linear layer by the sigmoid of
      another (Dauphin et al. 2017), as in the networks of VampPrior.
  """

  latent_dim: int = 32
  hidden_sizes: tuple[int, ...] = (512, 256)
  activation: Literal['relu', 'leaky_relu', 'tanh', 'silu', 'gelu', 'gated'] = (
    'relu'
  )

  def setup(self):
    super().setup()
    registry.check_at_least(
      1, latent_dim=self.latent_dim, hidden_sizes=self.hidden_sizes
    )
    hidden = self.activation, self.dtype
    self.encoder = Encoder(self.heads, self.hidden_sizes, *hidden)
    outputs = math.prod(self.image_shape[:2]) * self.num_outputs
    self.decoder = Decoder(self.hidden_sizes[::-1], outputs, *hidden)

  @property
  def latent_shape(self) -> tuple[int, ...]:
    return (self.latent_dim,)


class Encoder(nn.Module):
  """Images [batch, height, width, channels] to an array for each head."""

  heads: dict[str, int]
  hidden_sizes: tuple[int, ...]
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x, train):
    x = x.reshape(x.shape[0], -1).astype(self.dtype)
    x = _hidden(x, self.hidden_sizes, self.activation, self.dtype)
    return tuple(
      layers.dense(x, features, self.dtype, name)
      for name, features in self.heads.items()
    )


class Decoder(nn.Module):
  """Latents [batch, latent_dim] to the parameters of p(x|z), flat."""

  hidden_sizes: tuple[int, ...]
  num_outputs: int
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, z, train):
    z = z.astype(self.dtype)
    x = _hidden(z, self.hidden_sizes, self.activation, self.dtype)
    return layers.dense(x, self.num_outputs, self.dtype, 'image')


def _hidden(x, sizes, activation, dtype):
  """The hidden layers, made in the caller's scope."""
  for size in sizes:
    linear = layers.dense(x, size, dtype)
    if activation == 'gated':
      x = linear * nn.sigmoid(layers.dense(x, size, dtype))
    else:
      x = getattr(nn, activation)(linear)
  return x
