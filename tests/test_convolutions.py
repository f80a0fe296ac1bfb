import itertools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae import convolutions
from vae import layers


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_conv(x, kernel, stride):
  """SAME convolution, written out in float64."""
  batch, height, width, _ = x.shape
  out = [-(-side // stride) for side in (height, width)]
  pads = [
    max((n - 1) * stride + 3 - side, 0)
    for n, side in zip(out, (height, width), strict=True)
  ]
  x = np.pad(
    x.astype(np.float64),
    ((0, 0), *[(pad // 2, pad - pad // 2) for pad in pads], (0, 0)),
  )
  y = np.zeros((batch, *out, kernel.shape[-1]))
  for i, j in itertools.product(range(out[0]), range(out[1])):
    patch = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
    y[:, i, j] = np.einsum('bhwc,hwco->bo', patch, kernel)
  return y


def plain_conv_transpose(x, kernel):
  """The stride-2 transposed convolution by the one-dimensional identity."""
  y = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], kernel.shape[-1]))
  # Output parity and tap to the shift of the input: y[2i] = w0·x[i-1] +
  # w2·x[i], y[2i+1] = w1·x[i].
  taps = [(0, 0, -1), (0, 2, 0), (1, 1, 0)]
  for (pi, ti, si), (pj, tj, sj) in itertools.product(taps, taps):
    shifted = np.zeros(x.shape)
    rows, columns = x.shape[1] + si, x.shape[2] + sj
    shifted[:, -si:, -sj:] = x[:, :rows, :columns]
    y[:, pi::2, pj::2] += shifted @ kernel[ti, tj].astype(np.float64)
  return y


@pytest.mark.parametrize('size', [(8, 8), (6, 10), (5, 7), (1, 2)])
@pytest.mark.parametrize('stride', [1, 2])
def test_conv_is_the_plain_sum(size, stride):
  x, kernel = random(2, *size, 3), random(3, 3, 3, 4, seed=1)
  fast = (
    convolutions.conv_matmul(x, kernel)
    if stride == 1
    else convolutions.strided_conv_matmul(x, kernel)
  )
  expected = plain_conv(x, kernel, stride)
  np.testing.assert_allclose(fast, expected, atol=1e-5)
  np.testing.assert_allclose(
    convolutions.conv_native(x, kernel, stride), expected, atol=1e-5
  )


@pytest.mark.parametrize('size', [(8, 8), (3, 5), (1, 2)])
def test_conv_transpose_is_the_plain_sum(size):
  x, kernel = random(2, *size, 3), random(3, 3, 3, 4, seed=1)
  expected = plain_conv_transpose(x, kernel)
  for conv in (
    convolutions.conv_transpose_matmul,
    convolutions.conv_transpose_native,
  ):
    np.testing.assert_allclose(conv(x, kernel), expected, atol=1e-5)


LAYERS = [
  (layers.Conv(5), nn.Conv(5, (3, 3))),
  (layers.Conv(5, stride=2), nn.Conv(5, (3, 3), strides=2)),
  (layers.ConvTranspose(5), nn.ConvTranspose(5, (3, 3), strides=(2, 2))),
]


@pytest.mark.parametrize(('layer', 'flax_layer'), LAYERS)
@pytest.mark.parametrize('size', [(8, 8), (7, 4), (5, 9)])
def test_values_and_gradients_are_flax_layers(layer, flax_layer, size):
  assert_same_as_flax(layer, flax_layer, random(4, *size, 3))


@pytest.mark.parametrize('batch', [4, 6, 5])
def test_parts_of_the_batch_are_the_whole(batch, monkeypatch):
  # As many parts as the batch allows: 4, 2 and 1.
  monkeypatch.setattr(convolutions, '_BYTES_AT_A_TIME', 1)
  layer, flax_layer = LAYERS[2]
  assert_same_as_flax(layer, flax_layer, random(batch, 6, 8, 3))


def test_parts_do_not_lose_bfloat16s_digits(monkeypatch):
  x = jnp.ones((512, 2, 2, 1), jnp.bfloat16)
  kernel = jnp.ones((3, 3, 1, 1), jnp.bfloat16)
  gradients = []
  for size in (1, 10**9):
    monkeypatch.setattr(convolutions, '_BYTES_AT_A_TIME', size)
    conv = convolutions.conv_transpose_matmul
    gradients.append(jax.grad(lambda k: conv(x, k).sum())(kernel))  # noqa: B023
  # Of 512 · 4 ones; added up in bfloat16 they would stay at 256.
  assert gradients[0].astype(np.float32).max() == 2048
  np.testing.assert_array_equal(*(np.asarray(g, np.float32) for g in gradients))


def assert_same_as_flax(layer, flax_layer, x):
  """Values, and gradients with respect to parameters and input."""
  params = layer.init(jax.random.key(0), x)
  params['params']['bias'] = random(5, seed=2)
  y, bias = layer.apply(params, x)
  np.testing.assert_array_equal(bias, params['params']['bias'])
  weights = random(*y.shape, seed=3)

  def loss(apply, params, x):
    return jnp.sum(weights * jnp.tanh(apply(params, x)))

  def with_bias(module):
    return lambda params, x: jnp.add(*module.apply(params, x))

  results = [
    jax.value_and_grad(loss, argnums=(1, 2))(apply, params, x)
    for apply in (
      flax_layer.apply,
      with_bias(layer.copy(method='matmul')),
      with_bias(layer.copy(method='native')),
    )
  ]
  for result in results[1:]:
    jax.tree.map(assert_close, result, results[0])


def assert_close(a, b):
  # Sums of numbers that cancel are as exact as the largest of them.
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_bfloat16_is_near_float32():
  x = random(2, 8, 8, 3)
  for layer, _ in LAYERS:
    params = layer.init(jax.random.key(0), x)
    narrow = layer.copy(dtype=jnp.bfloat16)
    y, bias = narrow.apply(params, x)
    assert y.dtype == jnp.bfloat16 and bias.dtype == jnp.float32
    np.testing.assert_allclose(
      y.astype(np.float32), layer.apply(params, x)[0], atol=0.05
    )
