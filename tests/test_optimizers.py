"""The optimiser, by its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from vae import optimizers

PARAMS = {'a': jnp.array([1.0, -2.0]), 'b': jnp.array([0.5])}
GRADS = {'a': jnp.array([3.0, 0.0]), 'b': jnp.array([4.0])}  # Of norm 5.


def test_learning_rate_decays_by_the_epoch():
  config = default.get_config()
  config.optimizer.learning_rate = 0.005
  config.optimizer.decay_per_epoch = 0.95
  optimizer = optimizers.from_config(config, steps_per_epoch=37)
  schedule = optimizer.schedule(0.005)
  rates = optimizers.learning_rates(config, num_epochs=100)
  for step, epoch in ((0, 0), (36, 0), (37, 1), (74, 2), (3699, 99)):
    for rate in (schedule(step), rates[epoch]):
      assert rate == pytest.approx(0.005 * 0.95**epoch, rel=1e-5)


@pytest.mark.parametrize(
  ('clip_norm', 'factor'), [(2.0, 2 / 5), (7.0, 1.0), (0.0, 1.0)]
)
def test_gradient_is_clipped_before_the_l2_penalty_is_added(clip_norm, factor):
  clipped = optimizers.Optimizer(weight_decay=0.1, clip_norm=clip_norm)(0.01)
  plain = optax.adam(0.01)
  penalised = jax.tree.map(lambda g, p: factor * g + 0.1 * p, GRADS, PARAMS)
  updates = [
    transform.update(grads, transform.init(PARAMS), PARAMS)
    for transform, grads in ((clipped, GRADS), (plain, penalised))
  ]
  # Adam's first moment keeps the size of the gradient.
  moments = [optax.tree.get(state, 'mu') for _, state in updates]
  for pair in ([update for update, _ in updates], moments):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *pair
    )
  # Checkpoints have one shape, clipped or not.
  states = [o.init(PARAMS) for o in (clipped, optimizers.Optimizer()(0.01))]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
