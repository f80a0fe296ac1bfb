"""3×3 convolutions of stride 1 and 2 that are fast on every backend.

XLA's convolutions are the fast path on GPU and TPU. On CPU they are slow, the
gradients above all, so that there the same arithmetic is written as matrix
products. Both ways share their parameters and agree to rounding.

A kernel is `[3, 3, in_channels, out_channels]`, images are
`[batch, height, width, channels]`, padding is `SAME` as Flax defines it.
"""

from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

METHODS = ('auto', 'native', 'matmul')

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')

# Uniform in ±1/sqrt(fan_in) for kernels and biases alike: what the article's
# own framework starts from (PyTorch's default for convolutions and dense
# layers), and with it the schedule's learning rate.
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def bias_init(fan_in: int) -> nn.initializers.Initializer:
  """Returns an initializer uniform in ±1/sqrt(fan_in)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

  return init


def use_matmul(method: str) -> bool:
  """Tells whether `method` means matrix products on the platform in use."""
  if method == 'auto':
    return jax.default_backend() == 'cpu'
  return method == 'matmul'


class Conv(nn.Module):
  """A 3×3 convolution with bias; parameters as `nn.Conv`'s.

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
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel, bias = _parameters(self, x.shape[-1])
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    if not use_matmul(self.method):
      y = conv_native(x, kernel, self.stride)
    elif self.stride == 1:
      y = conv_product_then_shift(x, kernel)
    else:
      y = strided_conv_im2col(x, kernel)
    return y + bias


class ConvTranspose(nn.Module):
  """A 3×3 transposed convolution of stride 2 with bias; doubles the image.

  Attributes: as of `Conv`; parameters as `nn.ConvTranspose`'s.
  """

  features: int
  dtype: Any = jnp.float32
  method: str = 'auto'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel, bias = _parameters(self, x.shape[-1])
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    if use_matmul(self.method):
      y = conv_transpose_product_then_shift(x, kernel)
    else:
      y = conv_transpose_native(x, kernel)
    return y + bias


def _parameters(module: nn.Module, channels: int) -> tuple[jax.Array, ...]:
  param_dtype = jnp.promote_types(module.dtype, jnp.float32)
  shape = (3, 3, channels, module.features)
  kernel = module.param('kernel', kernel_init, shape, param_dtype)
  bias = module.param(
    'bias', bias_init(9 * channels), (module.features,), param_dtype
  )
  return kernel, bias


# The convolutions themselves: `x` [batch, height, width, in], `kernel`
# [3, 3, in, out], both of the same dtype.


def conv_native(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """XLA's convolution, [batch, ⌈height/stride⌉, ⌈width/stride⌉, out]."""
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), 'SAME', dimension_numbers=_DIMENSIONS
  )


def conv_transpose_native(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """XLA's transposed convolution of stride 2, [batch, 2h, 2w, out]."""
  return lax.conv_transpose(
    x, kernel, (2, 2), 'SAME', dimension_numbers=_DIMENSIONS
  )


def strided_conv_im2col(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The stride-2 convolution as one product with the gathered patches.

  With padding SAME an even side is padded by one at its end only, so that
  output i sees inputs 2i, 2i + 1 and 2i + 2; an odd side is padded at both
  ends, and output i sees 2i - 1, 2i and 2i + 1. Splitting the image into its
  even and odd rows and columns first turns the strided windows into plain
  shifts.

  Returns:
    [batch, ⌈height/2⌉, ⌈width/2⌉, out].
  """
  batch, height, width, channels = x.shape
  out_h, out_w = -(-height // 2), -(-width // 2)
  pads = []
  for side, out in ((height, out_h), (width, out_w)):
    before = side % 2
    pads.append((before, 2 * out + 2 - side - before))
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  x = x.reshape(batch, out_h + 1, 2, out_w + 1, 2, channels)
  rows = (x[:, :-1, 0], x[:, :-1, 1], x[:, 1:, 0])
  patches = [
    patch
    for row in rows
    for patch in (row[:, :, :-1, 0], row[:, :, :-1, 1], row[:, :, 1:, 0])
  ]
  patches = jnp.concatenate(patches, axis=-1)
  return _matmul(patches, kernel.reshape(9 * channels, -1))


def conv_product_then_shift(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The stride-1 convolution: multiply by all nine taps, then shift and add.

  Cheaper than gathering patches where there are fewer output than input
  channels, as in the decoder's last layer.

  Returns:
    [batch, height, width, out].
  """
  _, height, width, _ = x.shape
  products = _tap_products(x, kernel)
  products = jnp.pad(products, ((0, 0), (1, 1), (1, 1), *((0, 0),) * 3))
  return sum(
    products[:, i : i + height, j : j + width, i, j]
    for i in range(3)
    for j in range(3)
  )


def conv_transpose_product_then_shift(
  x: jax.Array, kernel: jax.Array
) -> jax.Array:
  """The transposed convolution: all nine taps at once, then shift and add.

  In one dimension, with taps w0, w1, w2 as Flax pads it,
  y[2i] = w0·x[i-1] + w2·x[i] and y[2i+1] = w1·x[i]. In two, each of the four
  output phases takes its own taps; none multiplies by an inserted zero.

  Returns:
    [batch, 2·height, 2·width, out].
  """
  batch, height, width, _ = x.shape
  taps = _tap_products(x, kernel)

  def down(t):
    return jnp.pad(t[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))

  def right(t):
    return jnp.pad(t[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))

  def tap(i, j):
    return taps[:, :, :, i, j]

  even_even = tap(2, 2) + right(tap(2, 0)) + down(tap(0, 2) + right(tap(0, 0)))
  even_odd = tap(2, 1) + down(tap(0, 1))
  odd_even = tap(1, 2) + right(tap(1, 0))
  odd_odd = tap(1, 1)
  even_rows = jnp.stack([even_even, even_odd], axis=3)
  odd_rows = jnp.stack([odd_even, odd_odd], axis=3)
  y = jnp.stack([even_rows, odd_rows], axis=2)
  return y.reshape(batch, 2 * height, 2 * width, -1)


def _tap_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x times every tap of the kernel, [batch, height, width, 3, 3, out]."""
  channels = x.shape[-1]
  taps = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
  return _matmul(x, taps).reshape(*x.shape[:3], 3, 3, kernel.shape[-1])


def _matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """x [..., n] times a matrix [n, m], as a product of two plain matrices.

  XLA's CPU backend has no fast path for products that contract over several
  axes, as the gradient with respect to the matrix otherwise does.
  """
  return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)
