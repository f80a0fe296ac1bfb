"""Layers against sums written out, Flax's layers, and PyTorch's defaults."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae import convolutions, layers

CONVOLUTIONS = [
  (layers.Conv(5), nn.Conv(5, (3, 3))),
  (layers.Conv(5, stride=2), nn.Conv(5, (3, 3), strides=2)),
  (layers.ConvTranspose(5), nn.ConvTranspose(5, (3, 3), strides=(2, 2))),
]


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_as_flax(layer, flax_layer, x):
  """Values, and gradients by parameters and input."""
  params = layer.init(jax.random.key(0), x)
  params['params']['bias'] = random(5, seed=2)
  y, _ = layer.apply(params, x)
  weights = random(*y.shape, seed=3)

  def results(apply):
    loss = lambda params, x: jnp.sum(weights * jnp.tanh(apply(params, x)))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

  expected = results(flax_layer.apply)
  for method in ('matmul', 'native'):
    apply = layer.copy(method=method).apply
    found = results(lambda *args, apply=apply: jnp.add(*apply(*args)))
    # Sums of numbers that cancel are as exact as the largest of them.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()
      ),
      found,
      expected,
    )


@pytest.mark.parametrize(('layer', 'flax_layer'), CONVOLUTIONS)
@pytest.mark.parametrize('size', [(7, 4), (1, 2)])
def test_values_and_gradients_are_flax_layers(layer, flax_layer, size):
  assert_same_as_flax(layer, flax_layer, random(4, *size, 3))


def test_parts_of_the_batch_are_the_whole(monkeypatch):
  monkeypatch.setattr(convolutions, '_BYTES_AT_A_TIME', 1)
  assert_same_as_flax(*CONVOLUTIONS[2], random(4, 6, 8, 3))


def test_parts_do_not_lose_bfloat16s_digits(monkeypatch):
  x = jnp.ones((512, 2, 2, 1), jnp.bfloat16)
  kernel = jnp.ones((3, 3, 1, 1), jnp.bfloat16)
  monkeypatch.setattr(convolutions, '_BYTES_AT_A_TIME', 1)
  total = lambda k: convolutions.conv_transpose(x, k, 'matmul').sum()
  gradient = jax.grad(total)(kernel)
  # Of 512 · 4 ones; added up in bfloat16 they would stay at 256.
  assert gradient.astype(np.float32).max() == 2048


@pytest.mark.parametrize(
  ('layer', 'fan_in'),
  [
    (layers.Conv(64), 9 * 32),
    # PyTorch keeps these kernels as [inputs, outputs, 3, 3], and counts the
    # fan-in of any kernel by its second and later dimensions.
    (layers.ConvTranspose(64), 9 * 64),
  ],
)
def test_parameters_start_as_in_pytorch(layer, fan_in):
  params = layer.init(jax.random.key(0), np.ones((1, 4, 4, 32), np.float32))
  bound = fan_in**-0.5
  for values in jax.tree.leaves(params):
    assert np.abs(values).max() <= bound
  # The standard deviation of a uniform distribution.
  kernel = params['params']['kernel']
  assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize('rows', [2048, 2049, 4096, 8256])
def test_sums_in_parts_are_sums(rows, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  x = random(rows, 1, 1, 3).astype(np.float64)
  with jax.enable_x64(True):
    np.testing.assert_allclose(layers._channel_sum(x), x.sum((0, 1, 2)))
    program = str(jax.make_jaxpr(layers._channel_sum)(x))
  in_parts = 'optimization_barrier' in program
  assert in_parts == (rows in (2048, 4096))


def test_transposed_convolution_has_second_derivatives():
  # As of a penalty on the decoder's gradient.
  x, kernel = random(2, 3, 3, 2), random(3, 3, 2, 4)

  def penalty(method):
    energy = lambda x, k: jnp.sum(
      jnp.tanh(convolutions.conv_transpose(x, k, method))
    )
    squared = lambda x, k: jnp.sum(jax.grad(energy)(x, k) ** 2)
    return jax.grad(squared, (0, 1))(x, kernel)

  for native, matmul in zip(*map(penalty, ('native', 'matmul')), strict=True):
    np.testing.assert_allclose(native, matmul, rtol=1e-4, atol=1e-5)


class FlaxNorm(nn.Module):
  """The same as BatchNormRectify, of Flax's layers."""

  negative_slope: float

  @nn.compact
  def __call__(self, x, bias, train):
    x = nn.BatchNorm(not train, momentum=0.9, name='norm')(x + bias)
    return nn.leaky_relu(x, self.negative_slope)


@pytest.mark.parametrize(
  ('negative_slope', 'train'), [(0.01, True), (0.0, False)]
)
def test_batch_norm_is_flax_layers(negative_slope, train):
  x, bias = 2 + 3 * random(6, 5, 4, 7), random(7, seed=1)
  params = {'scale': 1 + 0.1 * random(7, seed=2), 'bias': random(7, seed=3)}
  stats = {'mean': random(7, seed=4), 'var': np.exp(random(7, seed=5))}
  weights = random(*x.shape, seed=6)

  def results(module, nest):
    def loss(x, bias, params):
      variables = {'params': nest(params), 'batch_stats': nest(stats)}
      y, updates = module.apply(
        variables, x, bias, train, mutable='batch_stats'
      )
      return jnp.sum(weights * y**2), (y, updates['batch_stats'])

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, (y, updated) = grad(x, bias, params)
    return y, updated.get('norm', updated), grads

  ours = results(layers.BatchNormRectify(negative_slope), lambda tree: tree)
  flax = results(FlaxNorm(negative_slope), lambda tree: {'norm': tree})
  if train:
    # PyTorch's running variance is the unbiased estimate, Flax's is not.
    for (_, running, _), ddof in ((ours, 1), (flax, 0)):
      np.testing.assert_allclose(
        running.pop('var'),
        0.9 * stats['var'] + 0.1 * x.var((0, 1, 2), ddof=ddof),
        rtol=1e-5,
      )
    # The bias before it has no gradient.
    assert not ours[2][1].any()
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4)
  jax.tree.map(close, ours, flax)


def test_batch_norm_of_bfloat16_has_float32_statistics():
  # Their sum in bfloat16 would stand still at 256.
  x = jnp.ones((4096, 1), jnp.bfloat16) + jnp.arange(4096)[:, None] % 2
  module = layers.BatchNormRectify(0.0)
  variables = module.init(jax.random.key(0), x, jnp.zeros(1), True)
  y, updates = module.apply(
    variables, x, jnp.zeros(1), True, mutable='batch_stats'
  )
  assert y.dtype == jnp.bfloat16
  mean, var = (updates['batch_stats'][name] for name in ('mean', 'var'))
  np.testing.assert_allclose(mean, 0.15, rtol=1e-6)
  np.testing.assert_allclose(var, 0.9 + 0.1 * 0.25 * 4096 / 4095, rtol=1e-6)


def test_spectral_norm_is_the_largest_singular_value():
  generator = np.random.default_rng(0)
  # Of two values far apart the power method has all digits.
  spread = generator.normal(size=(3, 3, 4, 5))
  spread += 3 * np.multiply.outer(np.ones((3, 3, 4)), np.arange(5))
  params = {
    'conv': {'kernel': spread, 'bias': np.full(5, 7.0)},
    'dense': {'kernel': generator.normal(size=(30, 20))},
  }
  params = jax.tree.map(np.float32, params)
  found = layers.spectrally_normalised(params)
  np.testing.assert_array_equal(found['conv']['bias'], params['conv']['bias'])
  largest = np.linalg.norm(spread.reshape(-1, 5), 2)
  np.testing.assert_allclose(
    found['conv']['kernel'], spread / largest, rtol=1e-4, atol=1e-6
  )
  norm = np.linalg.norm(found['dense']['kernel'], 2)
  assert 1 - 1e-6 < norm < 1.05


def test_gradient_through_the_spectral_norm():
  """d σ / d W = u vᵀ, so that the gradient along W is 0."""
  generator = np.random.default_rng(1)
  kernel, weights = generator.normal(size=(2, 6, 4))
  kernel += 2

  def loss(kernel):
    normalised = layers.spectrally_normalised({'kernel': kernel})['kernel']
    return jnp.sum(weights * normalised)

  grad = jax.grad(loss)(jnp.asarray(kernel, jnp.float32))
  left, values, right = np.linalg.svd(kernel)
  direct = weights / values[0]
  of_norm = np.sum(weights * kernel) / values[0] ** 2
  expected = direct - of_norm * np.outer(left[:, 0], right[0])
  np.testing.assert_allclose(grad, expected, atol=1e-4)
