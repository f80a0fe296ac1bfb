"""A VAE of the latents of another one (Dai & Wipf 2019, section 4)."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


class SecondStage(nn.Module):
  """Latents z to u of the same size, and back.

  As in the paper, the last layers see the input beside the hidden features, and
  one σ of p(z|u) is learned.

  Attributes:
    size: of z and of u.
    dtype: of parameters and computation.
    widths: of the hidden layers, by default the paper's.
  """

  size: int
  dtype: Any = jnp.float32
  widths: tuple[int, ...] = (1024,) * 3

  def setup(self):
    options = {'dtype': self.dtype, 'param_dtype': self.dtype}
    self.encoder_layers = [nn.Dense(n, **options) for n in self.widths]
    self.decoder_layers = [nn.Dense(n, **options) for n in self.widths]
    self.mean, self.logvar, self.image = (
      nn.Dense(self.size, **options) for _ in range(3)
    )
    self.log_sigma = self.param(
      'log_sigma', nn.initializers.zeros, (), self.dtype
    )

  def __call__(self, z: jax.Array):
    """Makes all parameters."""
    return self.decode(self.encode(z)[0])

  def encode(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log σ² of q(u|z), [..., size] each."""
    features = _features(self.encoder_layers, z)
    return self.mean(features), self.logvar(features)

  def decode(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean [..., size] and the one log σ² of p(z|u)."""
    return self.image(_features(self.decoder_layers, u)), 2 * self.log_sigma


def _features(layers, x):
  hidden = x
  for layer in layers:
    hidden = nn.relu(layer(hidden))
  return jnp.concatenate([x, hidden], axis=-1)
