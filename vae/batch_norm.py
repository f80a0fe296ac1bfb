"""Batch normalisation and the rectifier after it, as one function.

Ioffe & Szegedy 2015, with the statistics of the global batch. While training
two passes over the input take its statistics and make the output, and two over
the gradient; the input is all that is kept in between. Automatic
differentiation would keep, and read, three arrays of its size.
"""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from vae import devices
from vae.distributions import at_least_float32

# PyTorch's defaults, which the article uses.
_MOMENTUM = 0.9
_EPSILON = 1e-5


class BatchNormRectify(nn.Module):
  """Normalises each channel, scales and shifts it, and rectifies it.

  Its parameters and running statistics are those of `nn.BatchNorm`, but for
  the running variance: PyTorch's, n/(n - 1) of Flax's for the n numbers of a
  channel in the global batch.

  Attributes:
    negative_slope: of the rectifier: 0 is the ReLU.
    axis_name: the pmap axis over which the statistics are taken, or None for
      the local batch.
  """

  negative_slope: float
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array, train: bool) -> jax.Array:
    """Normalises `x + bias`.

    While training the bias, the same for a whole channel, cancels: it appears
    in the running mean alone, and its gradient is exactly zero.

    Args:
      x: [..., channels].
      bias: [channels], of the layer before.
      train: whether to use, and remember, the statistics of the batch.

    Returns:
      Shaped as `x`, of its dtype.
    """
    shape, dtype = x.shape[-1:], jnp.promote_types(x.dtype, jnp.float32)
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, dtype)
    running_var = self.variable('batch_stats', 'var', jnp.ones, shape, dtype)
    scale = self.param('scale', ones, shape, dtype)
    shift = self.param('bias', zeros, shape, dtype)
    if not train:
      factor = scale * lax.rsqrt(running_var.value + _EPSILON)
      offset = shift + (bias - running_mean.value) * factor
      return _rectify(x * factor + offset, self.negative_slope).astype(x.dtype)
    y, mean, var = normalise_and_rectify(
      x, scale, shift, self.negative_slope, self.axis_name
    )
    if not self.is_initializing():
      count = x.size // x.shape[-1] * devices.axis_size(self.axis_name)
      # As in PyTorch the batch is normalised with its own variance, and the
      # running one is the unbiased estimate of the data's.
      unbiased = var * (count / max(count - 1, 1))
      for running, value in (
        (running_mean, mean + bias),
        (running_var, unbiased),
      ):
        running.value = _MOMENTUM * running.value + (1 - _MOMENTUM) * value
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise_and_rectify(
  x: jax.Array,
  scale: jax.Array,
  shift: jax.Array,
  negative_slope: float,
  axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rectifies scale · (x - mean) / √(var + ε) + shift.

  Args:
    x: [..., channels].
    scale: [channels].
    shift: [channels].
    negative_slope: of the rectifier.
    axis_name: a pmap axis over which mean and variance are taken, or None.

  Returns:
    The result, shaped as `x`, of its dtype; the mean and the variance of each
    channel, at least float32. No gradient goes through these two.
  """
  return _forward(x, scale, shift, negative_slope, axis_name)[0]


def _forward(x, scale, shift, negative_slope, axis_name):
  wide = at_least_float32(x)
  axes = tuple(range(x.ndim - 1))
  mean, mean_square = devices.mean_over(
    (wide.mean(axes), jnp.square(wide).mean(axes)), axis_name
  )
  # Rounding can make it negative.
  var = jnp.maximum(mean_square - jnp.square(mean), 0)
  inverse = lax.rsqrt(var + _EPSILON)
  factor = scale * inverse
  offset = shift - mean * factor
  y = _rectify(wide * factor + offset, negative_slope).astype(x.dtype)
  return (y, mean, var), (x, mean, inverse, factor, offset)


def _backward(negative_slope, axis_name, residuals, cotangents):
  x, mean, inverse, factor, offset = residuals
  wide, dy = at_least_float32(x), at_least_float32(cotangents[0])
  axes = tuple(range(x.ndim - 1))
  dy = jnp.where(wide * factor + offset >= 0, dy, negative_slope * dy)
  dshift = dy.sum(axes)
  # Of the normalised input, (x - mean) · inverse.
  dscale = inverse * ((dy * wide).sum(axes) - mean * dshift)
  count = x.size // x.shape[-1]
  mean_dy, mean_dy_x = devices.mean_over(
    (dshift / count, dscale / count), axis_name
  )
  # factor · (dy - mean_dy - normalised · mean_dy_x), as one sum of products.
  slope = factor * inverse * mean_dy_x
  dx = factor * dy - slope * wide + (slope * mean - factor * mean_dy)
  return dx.astype(x.dtype), dscale, dshift


normalise_and_rectify.defvjp(_forward, _backward)


def _rectify(x: jax.Array, negative_slope: float) -> jax.Array:
  return jnp.where(x >= 0, x, negative_slope * x)
