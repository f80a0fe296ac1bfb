"""The network's layers: 3×3 convolutions of stride 1 and 2, dense layers.

They have PyTorch's initial values, as in the article, and compute convolutions
in the way that is fast on the platform (vae/convolutions.py).
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vae import convolutions

METHODS = ('auto', 'native', 'matmul')

# Uniform in ±1/sqrt(fan_in) for kernels and biases alike: PyTorch's default,
# which the article's learning rate goes with. PyTorch takes the outputs of a
# transposed convolution for its inputs (the fan-in is 9 × output channels).
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
transpose_kernel_init = nn.initializers.variance_scaling(
  1 / 3, 'fan_in', 'uniform', in_axis=-1, out_axis=-2
)


def bias_init(fan_in: int) -> nn.initializers.Initializer:
  """Returns an initializer uniform in ±1/sqrt(fan_in)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

  return init


def use_matmul(method: str) -> bool:
  """Whether a method means matrix products on the platform in use."""
  if method == 'auto':
    return jax.default_backend() == 'cpu'
  return method == 'matmul'


class Conv(nn.Module):
  """A 3×3 convolution; parameters as `nn.Conv`'s.

  Attributes:
    features: number of output channels.
    stride: 1 or 2, in both directions.
    dtype: of the computation and the output; parameters are at least float32.
    method: one of `METHODS`; `auto` chooses by the platform.
  """

  features: int
  stride: int = 1
  dtype: Any = jnp.float32
  method: str = 'auto'

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the result without the bias, and the bias [features]."""
    channels = x.shape[-1]
    kernel, bias = _parameters(self, channels, kernel_init, 9 * channels)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if not use_matmul(self.method):
      return convolutions.conv_native(x, kernel, self.stride), bias
    if self.stride == 2:
      return convolutions.strided_conv_matmul(x, kernel), bias
    return convolutions.conv_matmul(x, kernel), bias


class ConvTranspose(nn.Module):
  """A 3×3 transposed convolution of stride 2; doubles the image.

  Attributes: as of `Conv`; parameters as `nn.ConvTranspose`'s.
  """

  features: int
  dtype: Any = jnp.float32
  method: str = 'auto'

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the result without the bias, and the bias [features]."""
    kernel, bias = _parameters(
      self, x.shape[-1], transpose_kernel_init, 9 * self.features
    )
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if use_matmul(self.method):
      return convolutions.conv_transpose_matmul(x, kernel), bias
    return convolutions.conv_transpose_native(x, kernel), bias


def _parameters(
  module: nn.Module,
  channels: int,
  kernel_init: nn.initializers.Initializer,
  fan_in: int,
) -> tuple[jax.Array, jax.Array]:
  param_dtype = jnp.promote_types(module.dtype, jnp.float32)
  shape = (3, 3, channels, module.features)
  kernel = module.param('kernel', kernel_init, shape, param_dtype)
  bias = module.param(
    'bias', bias_init(fan_in), (module.features,), param_dtype
  )
  return kernel, bias


def dense(
  features: int, fan_in: int, dtype: Any, name: str | None = None
) -> nn.Dense:
  """A dense layer that starts as the convolutions do."""
  return nn.Dense(
    features,
    dtype=dtype,
    param_dtype=jnp.promote_types(dtype, jnp.float32),
    kernel_init=kernel_init,
    bias_init=bias_init(fan_in),
    name=name,
  )
