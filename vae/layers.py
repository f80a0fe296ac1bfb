"""The networks' layers: convolutions, dense layers, batch normalisation.

Convolutions and dense layers have PyTorch's initial values, as in the article.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vae import convolutions, devices

# Uniform in ±1/sqrt(fan_in) for kernels and biases alike: PyTorch's default,
# which the article's learning rate goes with. PyTorch takes the outputs of a
# transposed convolution for its inputs (the fan-in is 9 × output channels).
_kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
_transpose_kernel_init = nn.initializers.variance_scaling(
  1 / 3, 'fan_in', 'uniform', in_axis=-1, out_axis=-2
)

# PyTorch's defaults for BatchNorm, which the article uses.
_MOMENTUM = 0.9
EPSILON = 1e-5

_POWER_ITERATIONS = 20

# On a GPU the sums of so many numbers are made in so many parts first: XLA does
# so with longer ones itself, and shorter ones take no longer than a kernel.
_FEW_ROWS, _PARTS = range(2048, 8193), 64


def at_least_float32(x: jax.Array) -> jax.Array:
  """`x` with no fewer bits than float32: bfloat16 is widened."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dense(
  x: jax.Array, features: int, dtype: Any, name: str | None = None
) -> jax.Array:
  """A dense layer of `x`, made in the caller's scope."""
  layer = nn.Dense(
    features,
    dtype=dtype,
    param_dtype=jnp.promote_types(dtype, jnp.float32),
    kernel_init=_kernel_init,
    bias_init=_bias_init(x.shape[-1]),
    name=name,
  )
  return layer(x)


def spectrally_normalised(params: Any) -> Any:
  """Parameters whose kernels [..., in, out] have a largest singular value of 1.

  All axes but the last are one, as in Miyato et al. 2018. Its value is that of
  the power method from a fixed direction: at most the exact one, by a few
  percent less if many singular values are alike.
  """

  def normalise(path, array):
    if path[-1].key != 'kernel':
      return array
    matrix = array.reshape(-1, array.shape[-1])
    dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
    start = np.random.default_rng(0).normal(size=matrix.shape[1])
    v = jnp.asarray(start, array.dtype)
    for _ in range(_POWER_ITERATIONS):
      u = lax.stop_gradient(_unit(dot(matrix, v)))
      v = lax.stop_gradient(_unit(dot(u, matrix)))
    return array / jnp.maximum(dot(dot(u, matrix), v), 1e-12)

  return jax.tree_util.tree_map_with_path(normalise, params)


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


class Conv(nn.Module):
  """A 3×3 convolution (`convolutions.conv`) with the parameters of `nn.Conv`.

  It computes in `dtype`; the parameters are at least float32.
  """

  features: int
  stride: int = 1
  dtype: Any = jnp.float32
  method: str = 'auto'

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the result without the bias, and the bias [features]."""
    x = x.astype(self.dtype)
    kernel, bias = _parameters(self, x, _kernel_init, 9 * x.shape[-1])
    return convolutions.conv(x, kernel, self.stride, self.method), bias


class ConvTranspose(nn.Module):
  """A 3×3 transposed convolution of stride 2, like `Conv`."""

  features: int
  dtype: Any = jnp.float32
  method: str = 'auto'

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the result without the bias, and the bias [features]."""
    x = x.astype(self.dtype)
    kernel, bias = _parameters(
      self, x, _transpose_kernel_init, 9 * self.features
    )
    return convolutions.conv_transpose(x, kernel, self.method), bias


def double(x: jax.Array) -> jax.Array:
  """Images of twice the height and width, each pixel four times.

  A convolution of them leaves no grid, as transposed convolutions of stride 2
  do (Odena et al. 2016).
  """
  return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)


def _parameters(module: Conv | ConvTranspose, x, kernel_init, fan_in: int):
  """Kernel, of the computation's dtype, and bias, in the module's scope."""
  dtype = jnp.promote_types(module.dtype, jnp.float32)
  shape = (3, 3, x.shape[-1], module.features)
  kernel = module.param('kernel', kernel_init, shape, dtype)
  bias = module.param('bias', _bias_init(fan_in), (module.features,), dtype)
  return kernel.astype(module.dtype), bias


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

  return init


class BatchNormRectify(nn.Module):
  """Batch normalisation, and the rectifier after it, as one function.

  Ioffe & Szegedy 2015, with the statistics of the global batch, which lies over
  the pmap axis `axis_name`. Parameters and running statistics are those of
  `nn.BatchNorm`, but for the running variance: PyTorch's, n/(n - 1) of Flax's
  for the n numbers of a channel. A `negative_slope` of 0 makes the ReLU.
  """

  negative_slope: float
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array, train: bool) -> jax.Array:
    """Normalises `x + bias`, [..., channels]; the dtype is that of `x`.

    While training the bias [channels] of the layer before cancels: it appears
    in the running mean alone, and its gradient is exactly zero.
    """
    shape, dtype = x.shape[-1:], jnp.promote_types(x.dtype, jnp.float32)
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, dtype)
    running_var = self.variable('batch_stats', 'var', jnp.ones, shape, dtype)
    scale = self.param('scale', ones, shape, dtype)
    shift = self.param('bias', zeros, shape, dtype)
    if not train:
      factor = scale * lax.rsqrt(running_var.value + EPSILON)
      offset = shift + (bias - running_mean.value) * factor
      return _rectify(x * factor + offset, self.negative_slope).astype(x.dtype)
    y, mean, var = _normalise_and_rectify(
      x, scale, shift, self.negative_slope, self.axis_name
    )
    if not self.is_initializing():
      count = x.size // x.shape[-1] * devices.axis_size(self.axis_name)
      # As in PyTorch the batch is normalised with its own variance, and the
      # running one is the unbiased estimate of the data's.
      unbiased = var * (count / max(count - 1, 1))
      running_mean.value = _moved(running_mean.value, mean + bias)
      running_var.value = _moved(running_var.value, unbiased)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise_and_rectify(x, scale, shift, negative_slope, axis_name):
  """Rectifies scale · (x - mean) / √(var + ε) + shift.

  Two passes over the input take its statistics and make the output, and two
  over the gradient; the input is all that is kept in between. Automatic
  differentiation would keep, and read, three arrays of its size.

  Returns the result, and the mean and variance of each channel, at least
  float32, through which no gradient goes.
  """
  return _forward(x, scale, shift, negative_slope, axis_name)[0]


def _forward(x, scale, shift, negative_slope, axis_name):
  wide, count = at_least_float32(x), x.size // x.shape[-1]
  mean, mean_square = devices.mean_over(
    (_channel_sum(wide) / count, _channel_sum(jnp.square(wide)) / count),
    axis_name,
  )
  # Rounding can make it negative.
  var = jnp.maximum(mean_square - jnp.square(mean), 0)
  inverse = lax.rsqrt(var + EPSILON)
  factor = scale * inverse
  offset = shift - mean * factor
  y = _rectify(wide * factor + offset, negative_slope).astype(x.dtype)
  return (y, mean, var), (x, mean, inverse, factor, offset)


def _backward(negative_slope, axis_name, residuals, cotangents):
  x, mean, inverse, factor, offset = residuals
  wide, dy = at_least_float32(x), at_least_float32(cotangents[0])
  dy = jnp.where(wide * factor + offset >= 0, dy, negative_slope * dy)
  dshift = _channel_sum(dy)
  # Of the normalised input, (x - mean) · inverse.
  dscale = inverse * (_channel_sum(dy * wide) - mean * dshift)
  count = x.size // x.shape[-1]
  mean_dy, mean_dy_x = devices.mean_over(
    (dshift / count, dscale / count), axis_name
  )
  # factor · (dy - mean_dy - normalised · mean_dy_x), as one sum of products.
  slope = factor * inverse * mean_dy_x
  dx = factor * dy - slope * wide + (slope * mean - factor * mean_dy)
  return dx.astype(x.dtype), dscale, dshift


_normalise_and_rectify.defvjp(_forward, _backward)


def _channel_sum(x: jax.Array) -> jax.Array:
  """The sum over all axes but the last, [channels]."""
  rows = x.size // x.shape[-1]
  if jax.default_backend() == 'gpu' and rows in _FEW_ROWS and not rows % _PARTS:
    # Else XLA gives all of a channel to one of the GPU's multiprocessors.
    x = lax.optimization_barrier(x.reshape(_PARTS, -1, x.shape[-1]).sum(1))
  return x.sum(tuple(range(x.ndim - 1)))


def _moved(average: jax.Array, value: jax.Array) -> jax.Array:
  return _MOMENTUM * average + (1 - _MOMENTUM) * value


def _rectify(x: jax.Array, negative_slope: float) -> jax.Array:
  return jnp.where(x >= 0, x, negative_slope * x)
