"""Invertible networks of vectors, whose log-determinants are known."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


class Coupling(nn.Module):
  """Affine coupling layers (RealNVP; Dinh et al. 2017, equations 7 and 8).

  Each layer scales and shifts every other dimension, by a network of those
  between them and of the context. The first parameters make it the identity.

  Attributes:
    num_layers: number of layers; odd and even dimensions take turns.
    features: of each layer's network.
    dtype: of parameters and computation.
  """

  num_layers: int
  features: int
  dtype: Any = jnp.float32

  def setup(self):
    self.layers = [
      _Layer(index % 2, self.features, self.dtype)
      for index in range(self.num_layers)
    ]

  def __call__(self, u: jax.Array, context: jax.Array | None = None):
    """z and log |dz/du|, of u [..., size] and context [batch, features]."""
    log_det = jnp.zeros(u.shape[:-1], u.dtype)
    for layer in self.layers:
      log_scale, shift = layer(u, context)
      u = u * jnp.exp(log_scale) + shift
      log_det += log_scale.sum(axis=-1)
    return u, log_det

  def inverse(self, z: jax.Array, context: jax.Array | None = None):
    """u and log |du/dz|."""
    log_det = jnp.zeros(z.shape[:-1], z.dtype)
    for layer in self.layers[::-1]:
      log_scale, shift = layer(z, context)
      z = (z - shift) * jnp.exp(-log_scale)
      log_det -= log_scale.sum(axis=-1)
    return z, log_det


class _Layer(nn.Module):
  """log-scale and shift of each dimension; 0 for those that stay."""

  parity: int
  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x, context):
    size = x.shape[-1]
    kept = jnp.arange(size) % 2 == self.parity
    options = {'dtype': self.dtype, 'param_dtype': self.dtype}
    hidden = nn.Dense(self.features, name='of_kept', **options)(x * kept)
    if context is not None:
      hidden += nn.Dense(self.features, name='of_context', **options)(context)
    hidden = nn.Dense(self.features, **options)(nn.silu(hidden))
    log_scale, shift = (
      nn.Dense(size, kernel_init=nn.initializers.zeros, name=name, **options)(
        nn.silu(hidden)
      )
      for name in ('log_scale', 'shift')
    )
    # The limit keeps an early step from overflowing.
    return 2 * jnp.tanh(log_scale / 2) * ~kept, shift * ~kept
