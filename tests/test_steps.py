"""The training and the evaluation step, and the optimiser."""

import dataclasses
import functools
import itertools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import decomposition

from configs import default
from vae import devices, numerics, optimizers, splits, steps
from vae.models import conv, mlp
from vae.objectives import elbo, prior_only

KEY = numerics.train_key(0)
NAN = float('nan')
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
MODEL = conv.Model(
  (8, 8, 3), latent_dim=3, hidden_channels=(4,), axis_name=devices.AXIS
)
PROGRAM = steps.Program(MODEL, flip=True)
# Compiles faster.
MLP = mlp.Model(
  (8, 8, 3), latent_dim=3, hidden_sizes=(4,), axis_name=devices.AXIS
)


@dataclasses.dataclass(frozen=True)
class Optimizer(optimizers.Optimizer):
  """One of Optax, by its factory."""

  make: Any = optax.sgd

  def __call__(self, learning_rate):
    return self.make(learning_rate)


def annealed(learning_rate):
  """Adam with a learning rate that ends at 0."""
  return optax.adam(optax.cosine_decay_schedule(learning_rate, 3000))


def make_settings(learning_rate=0.01, **objective):
  return steps.Settings(elbo.Objective(**objective), learning_rate)


def train(program, state, settings, chunk, num_steps=1, key=KEY, stored=None):
  run = steps.make_train_steps(program)
  chunk = splits.Examples(chunk)
  return run(state, settings, key, stored, chunk, num_steps)


def test_cuts_into_dispatches_leave_the_same_bits():
  batches = PIXELS.reshape(8, 8, 8, 8, 3)
  results = []
  for cuts in ((8,), (3, 5), (1,) * 8):
    state, losses = steps.create_state(PROGRAM, seed=0), []
    kept = steps.snapshot(state)
    for last, num_steps in zip(itertools.accumulate(cuts), cuts, strict=True):
      # A full buffer whatever the number of steps, as in the loop.
      chunk = np.zeros((1, 8, 8, 8, 8, 3), np.uint8)
      chunk[0, :num_steps] = batches[last - num_steps : last]
      state, metrics = train(PROGRAM, state, make_settings(), chunk, num_steps)
      losses += metrics['loss'][:num_steps].tolist()
      assert not np.any(metrics['loss'][num_steps:])
    results.append((state, losses))
    # The snapshot outlives the state, whose buffers are given away, and the
    # first state is a function of the seed.
    first = steps.create_state(PROGRAM, seed=0)
    jax.tree.map(np.testing.assert_array_equal, kept, first)
  assert results[0][0].step == 8
  for other in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, results[0])


def test_step_is_the_gradient_step_of_the_objective():
  """One step, without its machinery: jax.grad of the mean loss."""
  program = steps.Program(MODEL, Optimizer())
  images = PIXELS[:8]
  settings = make_settings(beta=0.0, sample_posterior=False)
  state = steps.create_state(program, seed=0)
  before = jax.device_get(state)
  after, metrics = train(program, state, settings, images[None, None])

  plain = program.model.copy(axis_name=None)
  x = images / np.float32(255)

  def loss(params):
    decoded, _ = nn.apply(
      lambda model: model(x, train=True).mean, plain, mutable='batch_stats'
    )(before.variables | {'params': params})
    constant = x[0].size / 2 * np.log(2 * np.pi)
    return jnp.mean(jnp.sum((x - decoded) ** 2, axis=(1, 2, 3))) / 2 + constant

  value, grads = jax.jit(jax.value_and_grad(loss))(before.params)
  assert metrics['loss'][0] == pytest.approx(float(value), rel=1e-6)
  squares = [np.sum(np.square(g)) for g in jax.tree.leaves(grads)]
  assert metrics['grad_norm'][0] == pytest.approx(np.sqrt(sum(squares)), 1e-5)
  jax.tree.map(
    lambda p, g, q: np.testing.assert_allclose(p - 0.01 * g, q, atol=2e-5),
    before.params,
    grads,
    after.params,
  )


@pytest.mark.slow
def test_skipped_step_changes_nothing_but_the_counts():
  # Without draws, as these differ by the step.
  good, bad = (
    make_settings(beta=beta, sample_posterior=False) for beta in (1.0, NAN)
  )

  def run(program, *settings):
    state, losses, skipped = steps.create_state(program, seed=0), [], []
    for each in settings:
      state, metrics = train(program, state, each, PIXELS[:8][None, None])
      losses.append(metrics['loss'][0])
      skipped.append(metrics['skipped'][0] if program.skip_nonfinite else 0)
    return state, losses, skipped

  program = steps.Program(MODEL, skip_nonfinite=True)
  without, _, _ = run(program, good, good, good)
  state, losses, skipped = run(program, good, bad, good, good)
  assert skipped == [0, 1, 0, 0] and state.step == 4
  # Adam's state too, which the last update depends on.
  jax.tree.map(
    np.testing.assert_array_equal, state.variables, without.variables
  )
  # A program that never skips is compiled, and so rounded, by itself.
  _, plain, _ = run(steps.Program(MODEL), good, good, good)
  np.testing.assert_allclose(np.delete(losses, 1), plain, rtol=1e-5)

  # Adam's first update moves a parameter by the learning rate, which in the
  # third epoch is a quarter of the first one's.
  decaying = optimizers.Optimizer(steps_per_epoch=1, decay_per_epoch=0.5)
  program = steps.Program(MLP, decaying, skip_nonfinite=True)
  first = jax.device_get(steps.create_state(program, seed=0).params)
  state, _, skipped = run(program, bad, bad, good)
  assert skipped == [1, 1, 0]
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, state.params)
  assert max(jax.tree.leaves(moved)) == pytest.approx(0.01 / 4, rel=1e-3)


def first_losses(seed=0, flip=False, **objective):
  """The losses of two steps from the same start, at a learning rate of 0."""
  program = steps.Program(MLP, Optimizer(), flip)
  settings = make_settings(0.0, **{'sample_posterior': False, **objective})
  state = steps.create_state(program, seed=0)
  chunk = np.broadcast_to(PIXELS, (1, 2, *PIXELS.shape))
  key = numerics.train_key(seed)
  _, metrics = train(program, state, settings, chunk, 2, key)
  return metrics['loss'].tolist()


@pytest.mark.parametrize(
  'chance',
  [{'sample_posterior': True}, {'input_noise': 0.5}, {'flip': True}],
)
def test_draws_differ_by_step_and_seed_and_by_nothing_else(chance):
  without = first_losses()
  assert without[0] == without[1]
  losses = first_losses(**chance)
  assert losses[0] != losses[1]
  assert losses == first_losses(**chance)
  assert losses[0] != first_losses(seed=1, **chance)[0]


def test_warmup_is_counted_in_epochs():
  program = steps.Program(MLP, optimizers.Optimizer(steps_per_epoch=4))
  settings = make_settings(beta=3.0, kl_warmup_epochs=2.0)
  state = steps.create_state(program, seed=0)
  chunk = np.broadcast_to(PIXELS[:16], (1, 10, 16, 8, 8, 3))
  state, metrics = train(program, state, settings, chunk, 10)
  weights = (metrics['loss'] - metrics['distortion']) / metrics['kl']
  expected = 3 * np.minimum(np.arange(10) / 8, 1)
  np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-3)
  # A validation has the full weight.
  split = splits.ArraySplit(PIXELS)
  (total,) = evaluate(program, state, settings, split, 64, 1)
  weight = (total['loss'] - total['distortion']).sum() / total['kl'].sum()
  assert weight == pytest.approx(3, rel=1e-3)


def evaluate(program, state, settings, split, batch_size, max_batches):
  run = steps.make_eval_steps(program)
  return [
    run(
      *(state.variables, settings, numerics.eval_key(0)),
      *(splits.stored_images(split), chunk.batches, chunk.num_batches),
      *(start, split.num_examples),
    )
    for chunk, start in splits.eval_chunks(
      split, batch_size, max_batches, devices.Topology()
    )
  ]


def test_every_example_counts_once_whatever_the_batch_size():
  state = steps.create_state(PROGRAM, seed=0)
  split, totals = splits.ArraySplit(PIXELS[:53]), []
  for batch_size, max_batches in ((53, 1), (16, 3), (100, 4)):
    sums = evaluate(
      PROGRAM, state, make_settings(), split, batch_size, max_batches
    )
    totals.append({k: sum(float(s[k].sum()) for s in sums) for k in sums[0]})
  for total in totals[1:]:
    for name, value in total.items():
      assert value == pytest.approx(totals[0][name], rel=1e-6), name


def test_linear_vae_reaches_the_exact_likelihood_of_ppca():
  generator = np.random.default_rng(0)
  loadings = generator.normal(size=(2, 16)) * 0.12
  x = 0.5 + generator.normal(size=(512, 2)) @ loadings
  x += generator.normal(size=x.shape) * 0.04
  pixels = np.clip(np.round(x * 255), 0, 255).astype(np.uint8)
  # The mean log-likelihood at the maximum (Tipping & Bishop 1999).
  exact = decomposition.PCA(2).fit(pixels / 255).score(pixels / 255)
  pixels = pixels.reshape(-1, 4, 4, 1)

  sizes = {'latent_dim': 2, 'hidden_channels': (), 'axis_name': devices.AXIS}
  model = conv.Model((4, 4, 1), sigma=0.2, learn_sigma=True, **sizes)
  program = steps.Program(model, Optimizer(make=annealed))
  settings = make_settings(num_samples=8)
  state = steps.create_state(program, seed=0)
  chunk = np.broadcast_to(pixels, (1, 500, *pixels.shape))
  for _ in range(6):
    state, _ = train(program, state, settings, chunk, 500)

  split = splits.ArraySplit(pixels)
  settings = make_settings(num_samples=500)
  (sums,) = evaluate(program, state, settings, split, 512, 1)
  bound = sums['elbo'].sum() / 512
  assert bound == pytest.approx(exact, rel=0.005)
  # A bound, up to the Monte-Carlo error.
  assert bound < exact + 0.01


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
  config.optimizer.decay_epochs = (1, 4)
  rates = optimizers.learning_rates(config, num_epochs=6)
  np.testing.assert_allclose(
    rates, 0.005 * 0.95 ** np.array([0, 1, 1, 1, 2, 2]), rtol=1e-5
  )


def test_moving_average_of_the_parameters_is_validated_and_used():
  program = steps.Program(MLP, average_decay=0.5)
  state = steps.create_state(program, seed=0)
  expected = jax.device_get(state.params)
  chunk = PIXELS[:8].reshape(1, 1, 8, 8, 8, 3)
  for step in range(4):
    state, _ = train(program, state, make_settings(), chunk)
    decay = min(0.5, (1 + step) / (10 + step))
    expected = jax.tree.map(
      lambda a, p, decay=decay: decay * a + (1 - decay) * p,
      expected,
      jax.device_get(state.params),
    )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, state.variables['params'], expected)
  assert state.variables.keys() == {'params'}
  plain = steps.create_state(steps.Program(MLP), seed=0)
  for _ in range(4):
    plain, _ = train(steps.Program(MLP), plain, make_settings(), chunk)
  jax.tree.map(np.testing.assert_array_equal, plain.params, state.params)


def test_binarised_images_are_black_and_white_with_the_grey_value_as_mean():
  grey = np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 4, 4, 1)
  keys = numerics.example_keys(KEY, jnp.arange(4000))
  drawn = np.asarray(numerics.bernoulli(keys, np.repeat(grey, 4000, axis=0)))
  assert set(np.unique(drawn)) == {0, 1}
  error = np.sqrt(grey * (1 - grey) / 4000) + 1e-9
  assert np.all(np.abs(drawn.mean(axis=0) - grey[0]) < 4.5 * error[0])


@pytest.mark.parametrize(
  ('clip_norm', 'factor'), [(2.0, 2 / 5), (7.0, 1.0), (0.0, 1.0)]
)
def test_gradient_is_clipped_before_the_l2_penalty_is_added(clip_norm, factor):
  clipped = optimizers.Optimizer(weight_decay=0.1, clip_norm=clip_norm)(0.01)
  plain = optax.adam(0.01)
  penalised = jax.tree.map(lambda g, p: factor * g + 0.1 * p, GRADS, PARAMS)
  results = []
  for transform, grads in ((clipped, GRADS), (plain, penalised)):
    updates, state = transform.update(grads, transform.init(PARAMS), PARAMS)
    # Adam's first moment keeps the size of the gradient.
    results.append((updates, optax.tree.get(state, 'mu')))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(close, *results)
  # Checkpoints have one shape, clipped or not.
  states = [o.init(PARAMS) for o in (clipped, optimizers.Optimizer()(0.01))]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.parametrize(
  'prior',
  ['mixture', 'flow', pytest.param('two_stage', marks=pytest.mark.slow)],
)
def test_prior_alone_is_fitted_to_a_trained_model(prior):
  model = conv.Model(
    (8, 8, 3),
    latent_dim=3,
    hidden_channels=(4,),
    latent_prior=prior,
    prior_components=2,
    axis_name=devices.AXIS,
  )
  program = steps.Program(model)
  state = steps.create_state(program, seed=0)
  state.params['encoder']['mean']['bias'] += 2  # Far from the first prior.
  before = jax.device_get(state)
  settings = steps.Settings(prior_only.Objective(), 0.001)
  chunk = np.repeat(PIXELS[None, None, :8], 60, axis=1)
  state, metrics = train(program, state, settings, chunk, num_steps=60)
  after = jax.device_get(state)
  for name, leaf in after.params.items():
    same = jax.tree.map(np.array_equal, leaf, before.params[name])
    assert all(jax.tree.leaves(same)) != (
      name.startswith(('prior_', 'second_stage'))
    ), name
  jax.tree.map(
    np.testing.assert_array_equal, after.collections, before.collections
  )
  assert metrics['loss'][-9:].mean() < metrics['loss'][:9].mean()
