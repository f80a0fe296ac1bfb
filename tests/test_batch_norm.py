from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae.batch_norm import BatchNormRectify


class Plain(nn.Module):
  """The same of Flax's layers, by automatic differentiation."""

  negative_slope: float

  @nn.compact
  def __call__(self, x, bias, train):
    x = nn.BatchNorm(not train, momentum=0.9, name='norm')(x + bias)
    return nn.leaky_relu(x, self.negative_slope)


def inputs(dtype=np.float32):
  generator = np.random.default_rng(0)
  x = generator.normal(2.0, 3.0, (6, 5, 4, 7)).astype(dtype)
  params, stats = (
    {
      name: generator.uniform(0.5, 1.5, 7).astype(dtype)
      for name in ('scale' if part == 'params' else 'var', second)
    }
    for part, second in (('params', 'bias'), ('batch_stats', 'mean'))
  )
  bias = generator.normal(size=7).astype(dtype)
  return x, bias, params, stats


def results(module, nest, train, x, bias, params, stats):
  """The output, the new statistics, and the gradients of a loss."""
  weights = np.random.default_rng(1).normal(size=x.shape).astype(x.dtype)

  def loss(x, bias, params):
    y, updates = module.apply(
      {'params': nest(params), 'batch_stats': nest(stats)},
      x,
      bias,
      train,
      mutable='batch_stats',
    )
    return jnp.sum(weights * y**2), (y, updates['batch_stats'])

  grads, (y, stats) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
    x, bias, params
  )
  return y, stats.get('norm', stats), grads


@pytest.mark.parametrize('negative_slope', [0.01, 0.0])
@pytest.mark.parametrize('train', [True, False])
def test_values_statistics_and_gradients_are_flax_layers(negative_slope, train):
  ours = results(
    BatchNormRectify(negative_slope), lambda tree: tree, train, *inputs()
  )
  plain = results(
    Plain(negative_slope), lambda tree: {'norm': tree}, train, *inputs()
  )
  if train:
    # PyTorch's running variance is the unbiased estimate, Flax's is not.
    x, *_, stats = inputs()
    for (_, running, _), ddof in ((ours, 1), (plain, 0)):
      np.testing.assert_allclose(
        running.pop('var'),
        0.9 * stats['var'] + 0.1 * x.var((0, 1, 2), ddof=ddof),
        rtol=1e-5,
      )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    ours,
    plain,
  )


def test_bias_before_it_has_no_gradient_while_training():
  _, _, (_, bias, _) = results(
    BatchNormRectify(0.01), lambda tree: tree, True, *inputs()
  )
  assert not bias.any()


def test_parameters_and_statistics_are_flax_layers():
  x, bias, *_ = inputs()
  ours = BatchNormRectify(0.01).init(jax.random.key(0), x, bias, True)
  plain = Plain(0.01).init(jax.random.key(0), x, bias, True)
  jax.tree.map(
    np.testing.assert_array_equal,
    ours,
    {kind: tree['norm'] for kind, tree in plain.items()},
  )


def test_bfloat16_takes_its_statistics_in_float32():
  # Their sum in bfloat16 would stand still at 256.
  x = jnp.ones((4096, 1), jnp.bfloat16) + jnp.arange(4096)[:, None] % 2
  module = BatchNormRectify(0.0)
  variables = module.init(jax.random.key(0), x, jnp.zeros(1), True)
  y, updates = module.apply(
    variables, x, jnp.zeros(1), True, mutable='batch_stats'
  )
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(updates['batch_stats']['mean'], 0.15, rtol=1e-6)
  np.testing.assert_allclose(
    updates['batch_stats']['var'], 0.9 + 0.1 * 0.25 * 4096 / 4095, rtol=1e-6
  )
