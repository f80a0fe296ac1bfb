"""3×3 convolutions: XLA's own, and matrix products for CPUs.

XLA's convolutions are fast on GPU and TPU. On CPU they are slow, the gradients
above all; there each is written as one matrix product, before which
neighbouring pixels are gathered, or after which they are scattered. Both ways
agree to rounding.

The nine taps of each pixel are several times as large as an image. They are
gathered again for the gradient, and where they are largest, for a part of the
batch at a time, so that they stay in the cache. Gradients are reverse-mode
alone.

Images and kernels are of the same dtype. Padding is `SAME` as Flax defines it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')

# Bytes of taps that are gathered at a time. With all at once a training step of
# the article's network takes 10 % longer, with twice as many 8 %.
_BYTES_AT_A_TIME = 5_000_000


def conv(
  x: jax.Array, kernel: jax.Array, stride: int, method: str = 'auto'
) -> jax.Array:
  """A convolution, [batch, ⌈height/stride⌉, ⌈width/stride⌉, out].

  Of x [batch, height, width, in] and a kernel [3, 3, in, out], with a stride of
  1 or 2. The method `auto` chooses `native` or `matmul` by the platform.
  """
  if not _use_matmul(method):
    return lax.conv_general_dilated(
      x, kernel, (stride, stride), 'SAME', dimension_numbers=_DIMENSIONS
    )
  if stride == 1:
    return _plain_conv(x, kernel)
  # An even side is padded by one at its end only, so that output i sees inputs
  # 2i, 2i + 1 and 2i + 2; with a zero before it an odd side is an even one.
  x = jnp.pad(x, ((0, 0), (x.shape[1] % 2, 0), (x.shape[2] % 2, 0), (0, 0)))
  return _strided_conv(x, kernel)


def conv_transpose(
  x: jax.Array, kernel: jax.Array, method: str = 'auto'
) -> jax.Array:
  """The transposed convolution of stride 2, [batch, 2·height, 2·width, out].

  In one dimension, with taps w0, w1, w2 as Flax pads it,
  y[2i] = w0·x[i-1] + w2·x[i] and y[2i+1] = w1·x[i]: the transpose of the
  stride-2 convolution with the taps in reverse. No inserted zero is multiplied,
  but by the method `dilated`, a plain convolution, as exported files have it.
  """
  if method == 'dilated':
    # Zeros after each pixel and row, as y[2i] has taps 0 and 2.
    batch, height, width, channels = x.shape
    x = jnp.stack([x, jnp.zeros_like(x)], axis=3)
    x = x.reshape(batch, height, 2 * width, channels)
    x = jnp.stack([x, jnp.zeros_like(x)], axis=2)
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    return lax.conv_general_dilated(
      *(x, kernel, (1, 1), ((2, 0), (2, 0))), dimension_numbers=_DIMENSIONS
    )
  kernel = kernel[::-1, ::-1].swapaxes(2, 3)
  if _use_matmul(method):
    return _transposed_conv(x, kernel)
  return _native_transposed_conv(x, kernel)


def _use_matmul(method: str) -> bool:
  if method == 'auto':
    return jax.default_backend() == 'cpu'
  return method == 'matmul'


# The transposed convolution as the gradient of the stride-2 convolution, whose
# kernel it is given. cuDNN has functions for the gradients of a convolution. By
# automatic differentiation the kernel's gradient would be a convolution with a
# window as large as the image, for which it has none.
@jax.custom_vjp
def _native_transposed_conv(x, kernel):
  # XLA knows this gradient by a reversed kernel. Without the barrier it cancels
  # the reversal with that of `conv_transpose`.
  kernel = lax.optimization_barrier(kernel)
  batch, height, width, _ = x.shape
  shape = batch, 2 * height, 2 * width, kernel.shape[2]
  y = jax.ShapeDtypeStruct(shape, x.dtype)
  (y,) = jax.linear_transpose(lambda y: conv(y, kernel, 2, 'native'), y)(x)
  return y


def _native_transposed_conv_backward(residuals, dy):
  x, kernel = residuals
  strided_conv = lambda kernel: conv(dy, kernel, 2, 'native')
  dx, kernel_gradient = jax.vjp(strided_conv, kernel)
  return dx, *kernel_gradient(x)


_native_transposed_conv.defvjp(
  lambda x, k: (_native_transposed_conv(x, k), (x, k)),
  _native_transposed_conv_backward,
)


# The stride-2 convolution of images with even sides, and its transpose. Each
# is the other's gradient; the kernel is the convolution's in both.
@jax.custom_vjp
def _strided_conv(x, kernel):
  return _matmul(_gather(x), _matrix(kernel))


def _strided_conv_backward(residuals, dy):
  x, kernel = residuals
  dx = _scatter(_matmul(dy, _matrix(kernel).T))
  dkernel = _flat(_gather(x)).T @ _flat(dy)
  return dx, dkernel.reshape(kernel.shape)


@jax.custom_vjp
def _transposed_conv(x, kernel):
  def part(x):
    return _scatter(_matmul(x, _matrix(kernel).T)), None

  return _in_parts(part, 9 * x[..., 0].size * kernel.shape[2], x)[0]


def _transposed_conv_backward(residuals, dy):
  x, kernel = residuals

  def part(x, dy):
    taps = _gather(dy)
    return _matmul(taps, _matrix(kernel)), _flat(x).T @ _flat(taps)

  dx, dkernel = _in_parts(part, 9 * dy.size // 4, x, dy)
  return dx, dkernel.T.reshape(kernel.shape)


_strided_conv.defvjp(
  lambda x, k: (_strided_conv(x, k), (x, k)), _strided_conv_backward
)
_transposed_conv.defvjp(
  lambda x, k: (_transposed_conv(x, k), (x, k)), _transposed_conv_backward
)


def _gather(x: jax.Array) -> jax.Array:
  """The nine taps of each stride-2 window, [batch, h/2, w/2, 9·channels]."""
  batch, height, width, channels = x.shape
  pairs = x.reshape(batch, height // 2, 2, width // 2, 2 * channels)
  even, odd = pairs[:, :, 0], pairs[:, :, 1]
  rows = (even, odd, jnp.pad(even[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0))))
  taps = []
  for row in rows:
    right = row[:, :, 1:, :channels]
    taps += [row, jnp.pad(right, ((0, 0), (0, 0), (0, 1), (0, 0)))]
  return jnp.concatenate(taps, axis=-1)


def _scatter(taps: jax.Array) -> jax.Array:
  """The transpose of `_gather`: each pixel's taps, added up."""
  batch, height, width, _ = taps.shape
  taps = taps.reshape(batch, height, width, 3, 3, -1)

  def tap(i, j):
    return taps[:, :, :, i, j]

  def down(t):
    return jnp.pad(t[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))

  def right(t):
    return jnp.pad(t[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))

  even_even = tap(0, 0) + right(tap(0, 2)) + down(tap(2, 0) + right(tap(2, 2)))
  even_odd = tap(0, 1) + down(tap(2, 1))
  odd_even = tap(1, 0) + right(tap(1, 2))
  odd_odd = tap(1, 1)
  even_rows = jnp.stack([even_even, even_odd], axis=3)
  odd_rows = jnp.stack([odd_even, odd_odd], axis=3)
  x = jnp.stack([even_rows, odd_rows], axis=2)
  return x.reshape(batch, 2 * height, 2 * width, -1)


# The stride-1 convolution, made for few output channels, as the decoder's last
# layer has. Its taps are planes, [3, 3, out, batch, height, width], which shift
# by whole rows where pixels of a few channels would not.
@jax.custom_vjp
def _plain_conv(x, kernel):
  height, width = x.shape[1:3]
  planes = _planes(kernel) @ _flat(x).T
  planes = planes.reshape(3, 3, -1, *x.shape[:3])
  planes = jnp.pad(planes, ((0, 0),) * 4 + ((1, 1), (1, 1)))
  y: Any = sum(
    planes[i, j, ..., i : i + height, j : j + width]
    for i in range(3)
    for j in range(3)
  )
  return y.transpose(1, 2, 3, 0)


def _plain_conv_backward(residuals, dy):
  x, kernel = residuals
  height, width = x.shape[1:3]
  dy = jnp.pad(dy.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))
  planes = jnp.stack(
    [
      dy[..., i : i + height, j : j + width]
      for i in (2, 1, 0)
      for j in (2, 1, 0)
    ]
  )
  planes = planes.reshape(9 * len(dy), -1)
  dx = (planes.T @ _planes(kernel)).reshape(x.shape)
  dkernel = (planes @ _flat(x)).reshape(3, 3, len(dy), -1).swapaxes(2, 3)
  return dx, dkernel


_plain_conv.defvjp(
  lambda x, k: (_plain_conv(x, k), (x, k)), _plain_conv_backward
)


def _in_parts(part: Callable, num_taps: int, *batches: jax.Array):
  """Goes through `batches`, [batch, …] each, a part at a time.

  `part` returns an array [part, …] and a summand or None; the result is the
  arrays of all parts together, [batch, …], and the sum.
  """
  batch, num_parts = len(batches[0]), 1
  most = num_taps * batches[0].itemsize / _BYTES_AT_A_TIME
  while num_parts < most and batch % (2 * num_parts) == 0:
    num_parts *= 2
  if num_parts == 1:
    return part(*batches)

  def body(total, parts):
    whole, sums = part(*parts)
    # The total is at least float32: many parts of bfloat16 would lose digits.
    return jax.tree.map(jnp.add, total, sums), whole

  parts = tuple(a.reshape(num_parts, -1, *a.shape[1:]) for a in batches)
  shapes = jax.eval_shape(part, *(a[0] for a in parts))[1]
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)),
    shapes,
  )
  total, whole = lax.scan(body, zeros, parts)
  total = jax.tree.map(lambda t, s: t.astype(s.dtype), total, shapes)
  return whole.reshape(batch, *whole.shape[2:]), total


def _matrix(kernel: jax.Array) -> jax.Array:
  """[9·in, out]."""
  return kernel.reshape(-1, kernel.shape[3])


def _planes(kernel: jax.Array) -> jax.Array:
  """[9·out, in]."""
  return _matrix(kernel.swapaxes(2, 3))


def _flat(x: jax.Array) -> jax.Array:
  """[·, n]: XLA on CPUs is slow in products that contract several axes."""
  return x.reshape(-1, x.shape[-1])


def _matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
  return (_flat(x) @ matrix).reshape(*x.shape[:-1], -1)
