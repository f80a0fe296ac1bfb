import json
import os
import subprocess
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vae.model import VAE

from tests.conftest import ROOT
from vae import devices
from vae import objective as objectives
from vae import optimizers
from vae import randomness
from vae import splits
from vae import training


def run_topologies(dtype, steps, device_counts, x64):
  """`topology_run.py` on so many virtual devices each, at the same time.

  On all but the first of them the images are stored.
  """
  processes = []
  for count in device_counts:
    environment = dict(
      os.environ,
      XLA_FLAGS=f'--xla_force_host_platform_device_count={count}',
      JAX_ENABLE_X64=str(int(x64)),
      PYTHONPATH=str(ROOT),
    )
    processes.append(
      subprocess.Popen(
        [
          *(sys.executable, ROOT / 'tests/topology_run.py', dtype, str(steps)),
          *(['stored'] if count > 1 else []),
        ],
        stdout=subprocess.PIPE,
        env=environment,
      )
    )
  results = [json.loads(p.communicate(timeout=300)[0]) for p in processes]
  assert [r['devices'] for r in results] == list(device_counts)
  return results


def test_number_of_devices_does_not_matter_in_float64():
  one, *others = run_topologies('float64', 20, (1, 4, 8), x64=True)
  assert len(one['losses']) == 20
  for other in others:
    for key in ('losses', 'statistics', 'val'):
      np.testing.assert_allclose(other[key], one[key], rtol=1e-9)


def test_number_of_devices_does_not_matter_in_the_first_float32_step():
  one, *others = run_topologies('float32', 1, (1, 4, 8), x64=False)
  for other in others:
    np.testing.assert_allclose(other['losses'], one['losses'], rtol=1e-5)


@pytest.fixture(scope='module')
def setting():
  model = VAE((8, 8, 3), 3, (4,), axis_name=devices.AXIS)
  optimizer = optimizers.Optimizer()
  pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
  return model, optimizer, pixels


def test_initial_state_is_a_function_of_the_seed(setting):
  model, optimizer, _ = setting
  states = [training.create_state(model, optimizer, s) for s in (0, 0, 1)]
  jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
  kernels = [s.params['encoder']['mean']['kernel'] for s in states]
  assert not np.array_equal(kernels[0], kernels[2])


def test_cuts_into_dispatches_leave_the_same_bits(setting):
  model, optimizer, pixels = setting
  run = training.make_train_steps(model, optimizer, flip=True)
  settings = training.Settings(objectives.Objective(1.0), 0.01)
  key = randomness.train_key(0)
  results = []
  for cuts in ((8,), (3, 5), (1,) * 8):
    state = training.create_state(model, optimizer, seed=0)
    done = 0
    for num_steps in cuts:
      # A full buffer whatever the number of steps, as in the loop.
      chunk = np.zeros((1, 8, 8, *model.image_shape), np.uint8)
      chunk[0, :num_steps] = pixels.reshape(8, 8, *model.image_shape)[
        done : done + num_steps
      ]
      state, _ = run(state, settings, key, None, chunk, num_steps)
      done += num_steps
    results.append(state)
  assert results[0].step == 8
  for other in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, results[0])


def test_step_is_the_gradient_step_of_the_objective(setting):
  """One step, without its machinery: plain jax.grad of the mean loss."""
  model, _, pixels = setting
  images = pixels[:8]
  objective = objectives.Objective(0.0, sample_posterior=False)
  optimizer = optax.sgd
  run = training.make_train_steps(model, optimizer, flip=False)
  settings = training.Settings(objective, 0.01)
  state = training.create_state(model, optimizer, seed=0)
  before = jax.device_get(state)
  key = randomness.train_key(0)
  after, metrics = run(state, settings, key, None, images[None, None], 1)

  plain = model.copy(axis_name=None)
  x = images / np.float32(255)

  def loss(params):
    decoded, _ = plain.apply(
      {'params': params, 'batch_stats': before.batch_stats},
      x,
      train=True,
      mutable='batch_stats',
    )
    constant = x[0].size / 2 * np.log(2 * np.pi)
    return jnp.mean(jnp.sum((x - decoded) ** 2, axis=(1, 2, 3))) / 2 + constant

  value, grads = jax.value_and_grad(loss)(before.params)
  assert metrics['loss'][0] == pytest.approx(float(value), rel=1e-6)
  squares = [np.sum(np.square(g)) for g in jax.tree.leaves(grads)]
  assert metrics['grad_norm'][0] == pytest.approx(np.sqrt(sum(squares)), 1e-5)
  jax.tree.map(
    lambda p, g, q: np.testing.assert_allclose(p - 0.01 * g, q, atol=2e-5),
    before.params,
    grads,
    after.params,
  )


def test_schedule_counts_the_steps_that_are_skipped(setting):
  model, _, pixels = setting
  optimizer = optimizers.Optimizer(steps_per_epoch=1, decay_per_epoch=0.5)
  run = training.make_train_steps(model, optimizer, False, True)
  objective = objectives.Objective(1.0)
  state = training.create_state(model, optimizer, seed=0)
  before = jax.device_get(state.params)
  for beta in (float('nan'), float('nan'), 1.0):
    settings = training.Settings(objective.replace(beta=beta), 0.01)
    state, _ = run(
      *(state, settings, randomness.train_key(0), None),
      *(pixels[:8][None, None], 1),
    )
  # Adam's first update moves a parameter by the learning rate, which in the
  # third epoch is a quarter of the first one's.
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.params)
  )
  moved = max(jax.tree.leaves(moved))
  assert moved == pytest.approx(0.01 / 4, rel=1e-3)


def test_step_that_is_skipped_changes_nothing_but_the_counts(setting):
  model, optimizer, pixels = setting
  key, chunk = randomness.train_key(0), pixels[:8][None, None]
  objective = objectives.Objective(1.0)
  good = training.Settings(objective, 0.005)
  bad = training.Settings(objective.replace(beta=float('nan')), 0.005)
  skipping = training.make_train_steps(model, optimizer, True, True)
  plain = training.make_train_steps(model, optimizer, True)
  states = [training.create_state(model, optimizer, seed=0) for _ in range(2)]
  # Where all is finite it is the same step.
  states[0], metrics = skipping(states[0], good, key, None, chunk, 1)
  states[1], _ = plain(states[1], good, key, None, chunk, 1)
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert metrics['skipped'][0] == 0
  before = jax.device_get(states[0])
  state, metrics = skipping(states[0], bad, key, None, chunk, 1)
  assert metrics['skipped'][0] == 1 and np.isnan(metrics['loss'][0])
  clip, (adam, schedule) = state.opt_state
  assert (state.step, schedule.count) == (2, 2)
  state = state.replace(
    step=before.step,
    opt_state=(clip, (adam, schedule._replace(count=np.int32(1)))),
  )
  jax.tree.map(np.testing.assert_array_equal, state, before)


def first_losses(setting, steps=2, **options):
  """The per-step losses of a few steps from the same start."""
  model, optimizer, pixels = setting
  options = {'seed': 0, 'flip': False, **options}
  objective = objectives.Objective(
    1.0,
    sample_posterior=options.get('sample_posterior', False),
    input_noise=options.get('input_noise', 0.0),
  )
  run = training.make_train_steps(model, optax.sgd, options['flip'])
  settings = training.Settings(objective, 0.0)
  state = training.create_state(model, optax.sgd, seed=0)
  losses = []
  for _ in range(steps):
    key = randomness.train_key(options['seed'])
    state, metrics = run(state, settings, key, None, pixels[None, None], 1)
    losses.append(float(metrics['loss'][0]))
  return losses


@pytest.mark.parametrize(
  'chance',
  [{'sample_posterior': True}, {'input_noise': 0.5}, {'flip': True}],
)
def test_draws_differ_by_step_and_seed_and_by_nothing_else(setting, chance):
  # Same images, same parameters (the learning rate is 0): what differs is
  # chance alone.
  losses = first_losses(setting, **chance)
  assert losses[0] != losses[1]
  assert losses == first_losses(setting, **chance)
  assert losses[0] != first_losses(setting, seed=1, **chance)[0]


def test_without_chance_steps_are_the_same(setting):
  losses = first_losses(setting)
  assert losses[0] == losses[1]


def test_every_example_counts_once_whatever_the_batch_size(setting):
  model, optimizer, pixels = setting
  settings = training.Settings(objectives.Objective(1.0), 0.01)
  steps = training.make_eval_steps(model)
  state = training.create_state(model, optimizer, seed=0)
  split = splits.ArraySplit(pixels[:53])
  totals = []
  for batch_size, max_batches in ((53, 1), (16, 3), (7, 2), (7, 100), (100, 4)):
    sums = [
      steps(
        *(state.variables, settings, randomness.eval_key(0), None),
        *(chunk.batches, chunk.num_batches, start, 53),
      )
      for chunk, start in splits.eval_chunks(
        split, batch_size, max_batches, devices.Topology()
      )
    ]
    totals.append({k: sum(float(s[k].sum()) for s in sums) for k in sums[0]})
  for total in totals[1:]:
    for name, value in total.items():
      assert value == pytest.approx(totals[0][name], rel=1e-6), name


def test_stored_images_are_the_images_that_are_sent(setting):
  model, optimizer, pixels = setting
  settings = training.Settings(objectives.Objective(1.0), 0.01)
  train = training.make_train_steps(model, optimizer, flip=True)
  evaluate = training.make_eval_steps(model)
  host = splits.ArraySplit(pixels[:53])
  results = []
  for split in (host, splits.DeviceSplit(host)):
    stored = splits.stored_images(split)
    state = training.create_state(model, optimizer, seed=0)
    losses = []
    for chunk in splits.train_chunks(split, 0, 0, 0, 8, 4, devices.Topology()):
      state, metrics = train(
        *(state, settings, randomness.train_key(0), stored),
        *(chunk.batches, chunk.num_batches),
      )
      losses.append(metrics['loss'])
    for chunk, start in splits.eval_chunks(split, 8, 4, devices.Topology()):
      sums = evaluate(
        *(state.variables, settings, randomness.eval_key(0), stored),
        *(chunk.batches, chunk.num_batches, start, 53),
      )
      losses.append(sums['loss'])
    results.append((losses, state))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_metrics_are_those_of_each_step_and_then_zero(setting):
  model, optimizer, pixels = setting
  settings = training.Settings(objectives.Objective(1.0), 0.01)
  run = training.make_train_steps(model, optimizer, flip=False)
  key = randomness.train_key(0)
  chunk = pixels.reshape(1, 4, 16, *model.image_shape)
  state = training.create_state(model, optimizer, seed=0)
  _, together = run(state, settings, key, None, chunk, 3)
  state = training.create_state(model, optimizer, seed=0)
  for step in range(3):
    state, alone = run(
      *(state, settings, key, None),
      *(chunk[:, step : step + 1], 1),
    )
    for name, values in alone.items():
      assert together[name][step] == pytest.approx(float(values[0]), rel=1e-5)
  for values in together.values():
    assert values.shape == (4,) and values[3] == 0


def test_snapshot_outlives_the_state(setting):
  model, optimizer, pixels = setting
  settings = training.Settings(objectives.Objective(1.0), 0.01)
  run = training.make_train_steps(model, optimizer, flip=False)
  state = training.create_state(model, optimizer, seed=0)
  before = jax.device_get(state)
  kept = training.snapshot(state)
  run(state, settings, randomness.train_key(0), None, pixels[None, None], 1)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(kept), before)


def ppca_log_likelihood(x, latent_dim):
  """Mean log-likelihood at the maximum; Tipping & Bishop 1999, equation 8."""
  count, dimensions = x.shape
  eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
  noise = eigenvalues[latent_dim:].mean()
  log_determinant = np.sum(np.log(eigenvalues[:latent_dim]))
  log_determinant += (dimensions - latent_dim) * np.log(noise)
  # The trace of C⁻¹S is the number of dimensions at the maximum.
  return -0.5 * (dimensions * np.log(2 * np.pi) + log_determinant + dimensions)


def test_linear_vae_reaches_the_exact_likelihood_of_ppca():
  generator = np.random.default_rng(0)
  loadings = generator.normal(size=(2, 16)) * 0.12
  x = 0.5 + generator.normal(size=(512, 2)) @ loadings
  x += generator.normal(size=x.shape) * 0.04
  pixels = np.clip(np.round(x * 255), 0, 255).astype(np.uint8)
  pixels = pixels.reshape(-1, 4, 4, 1)
  exact = ppca_log_likelihood(pixels.reshape(512, 16) / 255, latent_dim=2)

  model = VAE(
    (4, 4, 1), 2, (), sigma=0.2, learn_sigma=True, axis_name=devices.AXIS
  )
  objective = objectives.Objective(1.0, num_samples=8)
  optimizer = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, 3000))
  run = training.make_train_steps(model, optimizer, flip=False)
  settings = training.Settings(objective, 0.01)
  state = training.create_state(model, optimizer, seed=0)
  chunk = np.broadcast_to(pixels, (1, 500, *pixels.shape))
  for _ in range(6):
    state, _ = run(state, settings, randomness.train_key(0), None, chunk, 500)

  sharp = objectives.Objective(1.0, num_samples=500)
  images = pixels / np.float32(255)
  terms = nn.apply(objectives.terms, model)(
    jax.device_get(state.variables),
    *(sharp, images, images),
    jax.random.normal(jax.random.key(1), (500, 512, 2)),
    train=False,
  )
  elbo = float(terms['elbo'].mean())
  assert elbo == pytest.approx(exact, rel=0.005)
  # A bound, up to the Monte-Carlo error.
  assert elbo < exact + 0.01
