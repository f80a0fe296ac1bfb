import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from vae import optimizers


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


def test_weight_decay_is_the_gradient_of_an_l2_penalty():
  params = {'w': jnp.array([1.0, -2.0])}
  grads = {'w': jnp.array([0.3, 0.4])}
  optimizer = optimizers.Optimizer(weight_decay=0.1)(0.01)
  plain = optax.adam(0.01)
  penalised = jax.tree.map(lambda g, p: g + 0.1 * p, grads, params)
  updates = [
    optimizer.update(grads, optimizer.init(params), params)[0],
    plain.update(penalised, plain.init(params))[0],
  ]
  np.testing.assert_allclose(*(u['w'] for u in updates), rtol=1e-6)


def test_weight_decay_is_half_the_dimensions_times_pytorch_vaes():
  # Its loss is a mean over D pixel values, 2/D of the nats here, and Adam is
  # blind to a factor on loss and penalty together.
  half_d, theirs = 6144, 0.01
  assert half_d == 64 * 64 * 3 / 2
  params = {'w': jnp.array([1.0, -2.0, 3.0])}
  updates = []
  for weight_decay, unit in ((theirs * half_d, 1.0), (theirs, 1 / half_d)):
    optimizer = optimizers.Optimizer(weight_decay=weight_decay)(0.01)
    state = optimizer.init(params)
    for nats in ([300.0, 400.0, -5.0], [-20.0, 500.0, 70.0]):
      grads = {'w': unit * jnp.array(nats)}
      update, state = optimizer.update(grads, state, params)
    updates.append(update['w'])
  np.testing.assert_allclose(*updates, rtol=1e-4)


def test_gradient_is_clipped_before_the_penalty_is_added():
  params = {'a': jnp.array([1.0, -2.0]), 'b': jnp.array([0.5])}
  grads = {'a': jnp.array([3.0, 0.0]), 'b': jnp.array([4.0])}
  norm = 5.0
  for clip_norm, factor in ((2.0, 2.0 / norm), (7.0, 1.0), (0.0, 1.0)):
    optimizer = optimizers.Optimizer(weight_decay=0.1, clip_norm=clip_norm)
    transform = optimizer(0.01)
    _, state = transform.update(grads, transform.init(params), params)
    # Adam's first moment is a tenth of what it is given.
    (mu,) = optax.tree.get_all_with_path(state, 'mu')
    expected = jax.tree.map(
      lambda g, p, f=factor: 0.1 * (f * g + 0.1 * p), grads, params
    )
    jax.tree.map(
      lambda m, e: np.testing.assert_allclose(m, e, rtol=1e-6),
      mu[1],
      expected,
    )


def test_checkpoints_have_one_shape_whether_clipped_or_not():
  params = {'w': jnp.ones(3)}
  plain, clipped = (
    jax.tree.structure(optimizers.Optimizer(clip_norm=c)(0.1).init(params))
    for c in (0.0, 1.0)
  )
  assert plain == clipped
