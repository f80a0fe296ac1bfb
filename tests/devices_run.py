"""Trains on 1, 4 and 8 of eight virtual devices; prints the numbers as JSON.

Run by test_devices.py, which sets their number.
"""

import json
import re
import types

import jax
import numpy as np

from tests.conftest import make_small_config
from vae import devices
from vae import numerics
from vae import randomness
from vae import splits
from vae import steps
from vae.errors import UserError
from vae.population import Population
from vae.trainer import Trainer

PIXELS = np.random.default_rng(0).integers(0, 256, (43, 16, 16, 3), np.uint8)

# β, learning rate, latent dimension and seed of each member.
POPULATIONS = {
  'several seeds': [
    (0.5, 0.005, 5, 3),
    (2.0, 0.002, 3, 3),
    (8.0, 0.01, 3, 5),
    (0.0, 0.005, 5, 4),
  ],
  'one seed': [(0.5, 0.005, 3, 3), (2.0, 0.005, 5, 3), (4.0, 0.001, 3, 3)],
}


def make_config(dtype, objective='elbo'):
  """All that is random is on: flips, noise on the input, two samples of z."""
  config = make_small_config('')
  config.model.dtype = dtype
  config.model.learn_sigma = True
  config.objective.beta = 1.5
  config.objective.num_samples = 2
  config.objective.input_noise = 0.1
  if objective == 'free_bits':
    with config.unlocked():
      config.objective.name = objective
      # Some of the dimensions are below it.
      config.objective.free_nats = 0.02
  config.optimizer.learning_rate = 0.005
  config.optimizer.decay_per_epoch = 0.9
  config.optimizer.weight_decay = 1e-4
  config.eval.batch_size = 24
  return config


def run_topology(config, num_devices, num_steps):
  """Losses before and in the steps, and gradients' norms, on some devices."""
  topology = devices.Topology(num_devices)
  split = splits.ArraySplit(PIXELS)
  if num_devices > 1:
    split = splits.DeviceSplit(split)
  images = splits.stored_images(split)
  images = images if images is None else np.asarray(images)
  program = steps.program_from_config(config, len(PIXELS))
  settings = steps.settings_from_config(config)
  train = steps.make_train_steps(program)
  state = jax.device_get(steps.create_state(program, config.seed))
  # Before training: rounding noise that Adam blows up, in biases before
  # BatchNorm, cancels in the training loss alone.
  sums = [
    steps.make_eval_steps(program)(
      *(state.variables, settings, randomness.eval_key(3), images),
      *(chunk.batches, chunk.num_batches, start, len(PIXELS)),
    )
    for chunk, start in splits.eval_chunks(split, 24, 3, topology)
  ]
  found = {'val': [float(sum(s['loss'].sum() for s in sums))]}
  found |= {'loss': [], 'grad_norm': []}
  for epoch in range(-(-num_steps // 5)):
    for chunk in splits.train_chunks(split, 3, epoch, 0, 8, 5, topology):
      state, metrics = train(
        *(state, settings, randomness.train_key(3), images),
        *(chunk.batches, min(chunk.num_batches, num_steps)),
      )
      for name in ('loss', 'grad_norm'):
        found[name] += metrics[name][:num_steps].tolist()
  leaves = jax.device_get(jax.tree.leaves(state.collections))
  found['statistics'] = np.concatenate(leaves).tolist()
  return found


def train_by(trainer, num_steps):
  """Validation and training losses, and the states after the steps."""
  sums = [trainer.by_run(trainer.evaluate(*c)) for c in trainer.eval_chunks(2)]
  validation = sum(s['loss'].sum(axis=1) for s in sums)
  losses = []
  while trainer.step < num_steps:
    for chunk in trainer.train_chunks(trainer.step // 5, 0, 3):
      metrics = trainer.by_run(trainer.train(chunk))
      losses.append(metrics['loss'][:, : chunk.num_batches])
  states = jax.device_get(trainer.states(trainer.snapshot()))
  return validation, np.concatenate(losses, axis=1), states


def run_population(members):
  """The largest relative difference from the runs on all devices."""
  split = splits.ArraySplit(PIXELS)
  data = splits.DataSet(split, split, split)
  configs = []
  for beta, learning_rate, latent_dim, seed in members:
    config = make_config('float64')
    config.objective.beta = beta
    config.optimizer.learning_rate = learning_rate
    config.model.latent_dim, config.seed = latent_dim, seed
    configs.append(config)
  population = Population(configs, data)
  together = train_by(population, 25)
  worst = dict.fromkeys(('validation', 'losses', 'params'), 0.0)

  def compare(name, one, other):
    assert one.shape == other.shape and one.dtype == other.dtype
    difference = np.abs(one - other).max() / np.abs(other).max()
    worst[name] = max(worst[name], float(difference))

  for index, config in enumerate(configs):
    alone = train_by(Trainer(config, data), 25)
    compare('validation', together[0][index], alone[0][0])
    compare('losses', together[1][index], alone[1][0])
    jax.tree.map(
      lambda *pair: compare('params', *pair),
      together[2][index].variables,
      alone[2][0].variables,
    )
  result = worst | {
    'spread': float(together[1].std(axis=0).min()),
    'collectives': collectives(population),
    'error': '',
  }
  try:
    population.restore([Saved(step) for step in range(len(members))])
  except UserError as error:
    result['error'] = str(error)
  return result


class Saved:
  """The last checkpoint of a run, of a certain step."""

  def __init__(self, step):
    self._step = step

  def restore_last(self, shapes):
    return types.SimpleNamespace(state=shapes.replace(step=self._step))


def collectives(trainer):
  """The operations of the compiled steps that communicate."""
  texts = []
  for name in ('_train_steps', '_eval_steps'):
    function = getattr(trainer, name)

    def lower(*args, function=function):
      texts.append(function.lower(*args).compile().as_text())
      return function(*args)

    setattr(trainer, name, lower)
  trainer.train(next(trainer.train_chunks(0, 0, 3)))
  trainer.evaluate(*next(trainer.eval_chunks(2)))
  assert len(texts) == 2 and all('fusion' in text for text in texts)
  pattern = (
    r'all-reduce|all-gather|all-to-all|collective|reduce-scatter|send|recv'
  )
  return sorted(set(re.findall(pattern, ' '.join(texts))))


def main():
  results = {}
  for dtype, objective, num_steps, counts in (
    ('float64', 'elbo', 20, (1, 4, 8)),
    ('float64', 'free_bits', 10, (1, 4)),
    ('float32', 'elbo', 1, (1, 4, 8)),
  ):
    with numerics.fixed(dtype):
      results[f'{dtype} {objective}'] = [
        run_topology(make_config(dtype, objective), count, num_steps)
        for count in counts
      ]
  with numerics.fixed('float64'):
    for name, members in POPULATIONS.items():
      results[name] = run_population(members)
  print(json.dumps(results))


if __name__ == '__main__':
  main()
