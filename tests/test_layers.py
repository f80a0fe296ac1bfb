import itertools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    layers.conv_product_then_shift(x, kernel)
    if stride == 1
    else layers.strided_conv_im2col(x, kernel)
  )
  expected = plain_conv(x, kernel, stride)
  np.testing.assert_allclose(fast, expected, atol=1e-5)
  np.testing.assert_allclose(
    layers.conv_native(x, kernel, stride), expected, atol=1e-5
  )


@pytest.mark.parametrize('size', [(8, 8), (3, 5), (1, 2)])
def test_conv_transpose_is_the_plain_sum(size):
  x, kernel = random(2, *size, 3), random(3, 3, 3, 4, seed=1)
  expected = plain_conv_transpose(x, kernel)
  for conv in (
    layers.conv_transpose_product_then_shift,
    layers.conv_transpose_native,
  ):
    np.testing.assert_allclose(conv(x, kernel), expected, atol=1e-5)


@pytest.mark.parametrize(
  ('layer', 'flax_layer'),
  [
    (layers.Conv(5), nn.Conv(5, (3, 3))),
    (layers.Conv(5, stride=2), nn.Conv(5, (3, 3), strides=2)),
    (layers.ConvTranspose(5), nn.ConvTranspose(5, (3, 3), strides=(2, 2))),
  ],
)
@pytest.mark.parametrize('size', [(8, 8), (7, 4)])
def test_values_and_gradients_are_flax_layers(layer, flax_layer, size):
  x = random(2, *size, 3)
  params = layer.init(jax.random.key(0), x)
  params['params']['bias'] = random(5, seed=2)
  weights = random(*layer.apply(params, x).shape, seed=3)

  def loss(module, params, x):
    return jnp.sum(weights * jnp.tanh(module.apply(params, x)))

  results = [
    jax.value_and_grad(lambda p, x, m=module: loss(m, p, x), argnums=(0, 1))(
      params, x
    )
    for module in (
      layer.copy(method='matmul'),
      layer.copy(method='native'),
      flax_layer,
    )
  ]
  for result in results[:2]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      result,
      results[2],
    )


def test_parameters_start_within_the_fan_in_bound():
  params = layers.Conv(64).init(jax.random.key(0), random(1, 4, 4, 32))
  bound = (9 * 32) ** -0.5
  for values in jax.tree.leaves(params):
    assert np.abs(values).max() <= bound
  kernel = params['params']['kernel']
  # The standard deviation of a uniform distribution.
  assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_auto_is_matmul_on_a_cpu_only(monkeypatch):
  assert layers.use_matmul('auto') and layers.use_matmul('matmul')
  assert not layers.use_matmul('native')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert not layers.use_matmul('auto')
