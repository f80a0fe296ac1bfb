"""The number of devices changes nothing but rounding.

`main` trains on eight virtual devices, in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from tests.conftest import make_small_config, ROOT
from vae import conditioning, devices, models, numerics, splits, steps
from vae.errors import UserError
from vae.population import Population
from vae.trainer import Trainer

pytestmark = pytest.mark.slow

PIXELS = np.random.default_rng(0).integers(0, 256, (43, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, (43, 1))

NUM_STEPS = 10
MODELS = {
  'conv': {'hidden_channels': (4,), 'learn_sigma': True},
  'mlp': {'hidden_sizes': (6,)},
  'residual': {'channels': (4,)},
}
TWO_SEEDS = [(0.5, 0.005, 4, 3), (2.0, 0.002, 3, 5)]
ONE_SEED = [(0.5, 0.005, 3, 3), (2.0, 0.001, 4, 3)]
# Of one latent dimension, two runs share a program.
ONE_SIZE = [(0.5, 0.005, 3, 3), (2.0, 0.001, 3, 5)]
# Objective and model, with other settings of it; and β, learning rate, latent
# dimension and seed of each member.
POPULATIONS = {
  'several seeds': ('elbo', 'conv', {}, TWO_SEEDS),
  'one seed': ('elbo', 'mlp', {}, ONE_SEED),
  # Without a KL in closed form padding has noise.
  'flows': (
    *('elbo', 'mlp', {'posterior': 'flow', 'latent_prior': 'flow'}),
    ONE_SEED,
  ),
  'mixture': (
    *('factor', 'mlp', {'latent_prior': 'mixture', 'prior_components': 3}),
    ONE_SIZE,
  ),
  'map': ('elbo', 'residual', {'spatial': True}, ONE_SIZE),
  'conditional': ('elbo', 'conv', {'num_classes': 3}, ONE_SIZE),
}


def make_config(objective='elbo', model='conv', **settings):
  """All that is random is on: flips, noise on the input, two samples of z."""
  config = make_small_config('')
  config.data.image_size, config.train.steps_per_dispatch = 8, 3
  with config.unlocked():
    config.model = {'name': model, **MODELS[model], **settings}
    config.model.dtype = 'float64'
    config.objective = {'name': objective, 'num_samples': 2}
    if objective == 'free_bits':
      config.objective.free_nats = 0.02  # Above some dimensions' KL.
    if objective == 'factor':
      config.objective.critic_sizes = (4,)
  config.model.latent_dim = 3
  config.objective.beta, config.objective.input_noise = 1.5, 0.1
  config.optimizer.learning_rate = 0.005
  config.optimizer.decay_per_epoch = 0.9
  config.optimizer.weight_decay = 1e-4
  return config


def run_topology(config, num_devices):
  """Metrics before and in the steps, and statistics, on some devices.

  Those before, as rounding noise that Adam blows up in biases before BatchNorm
  cancels in the training loss alone.
  """
  topology = devices.Topology(num_devices)
  split = splits.ArraySplit(PIXELS, splits.Labels(('kind',), LABELS))
  if num_devices > 1:
    split = splits.DeviceSplit(split)
  images = splits.stored_images(split)
  images = images if images is None else np.asarray(images)
  program = steps.program_from_config(config, len(PIXELS))
  labels = conditioning.labels_of(config, split)
  settings = steps.settings_from_config(config)
  state = jax.device_get(steps.create_state(program, config.seed))
  evaluate = steps.make_eval_steps(program)
  sums = [
    evaluate(
      *(state.variables, settings, numerics.eval_key(3), images),
      *(chunk.batches, chunk.num_batches, start, len(PIXELS)),
    )
    for chunk, start in splits.eval_chunks(split, 24, 3, topology, labels)
  ]
  found = {'val': [float(sum(s['loss'].sum() for s in sums))]}
  found |= {'loss': [], 'grad_norm': []}
  train = steps.make_train_steps(program)
  for epoch in range(NUM_STEPS // 5):
    for chunk in splits.train_chunks(
      split, 3, epoch, 0, 8, 5, topology, labels
    ):
      state, metrics = train(
        *(state, settings, numerics.train_key(3), images),
        *(chunk.batches, chunk.num_batches),
      )
      for name in ('loss', 'grad_norm'):
        found[name] += metrics[name].tolist()
  leaves = jax.device_get(jax.tree.leaves(state.collections))
  leaves = [np.ravel(leaf) for leaf in leaves]
  return found | {'statistics': np.concatenate([[], *leaves]).tolist()}


def train_by(trainer):
  """Validation and training losses, and the states after the steps."""
  sums = [trainer.by_run(trainer.evaluate(*c)) for c in trainer.eval_chunks()]
  losses = [sum(s['loss'].sum(axis=1, keepdims=True) for s in sums)]
  while trainer.step < NUM_STEPS:
    for chunk in trainer.train_chunks(trainer.step // 5, 0):
      metrics = trainer.by_run(trainer.train(chunk))
      losses.append(metrics['loss'][:, : chunk.num_batches])
  states = jax.device_get(trainer.states(trainer.snapshot()))
  return np.concatenate(losses, axis=1), states


def run_population(objective, model, settings, members):
  """The largest relative difference from the runs on all devices."""
  split = splits.ArraySplit(PIXELS, splits.Labels(('kind',), LABELS))
  data = splits.DataSet(split, split, split)
  configs = []
  for beta, learning_rate, latent_dim, seed in members:
    config = make_config(objective, model, **settings)
    config.objective.beta = beta
    config.optimizer.learning_rate = learning_rate
    config.model.latent_dim, config.seed = latent_dim, seed
    configs.append(config)
  population = Population(configs, data)
  losses, states = train_by(population)
  differences = []

  def compare(one, other):
    assert one.shape == other.shape and one.dtype == other.dtype
    difference = np.abs(one - other).max() / np.abs(other).max()
    differences.append(float(difference))

  for index, config in enumerate(configs):
    alone, (state,) = train_by(Trainer(config, data))
    compare(losses[index], alone[0])
    jax.tree.map(compare, states[index].variables, state.variables)
  result = {
    'difference': max(differences),
    'spread': float(losses.std(axis=0).min()),
    'collectives': collectives(population),
  }
  try:
    population.restore([Saved(step) for step in range(len(members))])
  except UserError as error:
    result['error'] = str(error)
  return result


def collectives(trainer):
  """The operations of the compiled training steps that communicate."""
  texts, function = [], trainer._train_steps

  def lower(*args):
    texts.append(function.lower(*args).compile().as_text())
    return function(*args)

  trainer._train_steps = lower
  trainer.train(next(trainer.train_chunks(0, 0)))
  (text,) = texts
  assert 'fusion' in text
  pattern = 'all-reduce|all-gather|all-to-all|collective|reduce-scatter|send'
  return sorted(set(re.findall(pattern, text)))


class Saved:
  """The last checkpoint of a run, of a certain step."""

  def __init__(self, step):
    self._step = step

  def restore_last(self, shapes):
    return types.SimpleNamespace(state=shapes.replace(step=self._step))


def main():
  models._FLOW_LAYERS = 2  # Each takes seconds to compile.
  with numerics.fixed('float64'):
    config = make_config('free_bits')
    results = {'counts': [run_topology(config, count) for count in (1, 8)]}
    for name, population in POPULATIONS.items():
      results[name] = run_population(*population)
  print(json.dumps(results))


@pytest.fixture(scope='module')
def found():
  """The numbers that `main` prints."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    # Half of the time to compile goes into the optimisation of LLVM.
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8 '
    '--xla_backend_optimization_level=0',
  }
  command = [sys.executable, '-m', 'tests.test_devices']
  return json.loads(subprocess.check_output(command, cwd=ROOT, env=environment))


def test_number_of_devices_does_not_matter_in_float64(found):
  one, eight = found['counts']
  assert len(one['loss']) == 10
  for name in one:
    np.testing.assert_allclose(eight[name], one[name], rtol=1e-9)


@pytest.mark.parametrize('case', POPULATIONS)
def test_members_on_devices_of_their_own_are_runs_on_all_devices(found, case):
  assert found[case]['difference'] < 1e-9
  # Members differ from each other, or that would prove nothing.
  assert found[case]['spread'] > 0.1
  assert found[case]['collectives'] == []
  assert 'are of different steps: 0, 1.' in found[case]['error']


if __name__ == '__main__':
  main()
