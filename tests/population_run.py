"""Trains runs together and one by one; prints what each came to, as JSON.

Run by test_population.py with virtual devices, in float32 or float64.
"""

import json
import re
import sys

import jax
import numpy as np
from vae.single import SingleRun

from configs import default
from vae import population
from vae import splits
from vae.population import Population

BATCH_SIZE = 8

# β, learning rate, latent dimension and seed of each member.
MEMBERS = {
  'all': [
    (0.5, 0.005, 5, 3),
    (2.0, 0.002, 3, 3),
    (8.0, 0.01, 3, 5),
    (0.0, 0.005, 5, 4),
    (1.0, 0.005, 5, 5),
  ],
  'one seed': [(0.5, 0.005, 3, 3), (2.0, 0.005, 5, 3), (4.0, 0.001, 3, 3)],
  'eight': [(0.5 * i, 0.005, 4, 3) for i in range(8)],
}


def make_config(dtype, beta, learning_rate, latent_dim, seed):
  config = default.get_config()
  config.seed = seed
  config.data.image_size = 16
  config.model.dtype = dtype
  config.model.hidden_channels = (4, 8)
  config.model.latent_dim = latent_dim
  config.model.learn_sigma = True
  # Everything random is on: flips, noise on the input, two samples of z.
  config.objective.beta = beta
  config.objective.num_samples = 2
  config.objective.input_noise = 0.1
  config.optimizer.learning_rate = learning_rate
  config.optimizer.decay_per_epoch = 0.9
  config.optimizer.weight_decay = 1e-4
  config.train.batch_size = BATCH_SIZE
  config.eval.batch_size = 24
  return config


def train(trainer, steps):
  """Losses of each run before and in the steps, and the states after them."""
  sums = [trainer.by_run(trainer.evaluate(*c)) for c in trainer.eval_chunks(2)]
  validation = sum(s['loss'].sum(axis=1) for s in sums)
  losses = []
  while trainer.step < steps:
    epoch, first = divmod(trainer.step, 5)
    for chunk in trainer.train_chunks(epoch, first, 3):
      chunk.num_batches = min(chunk.num_batches, steps - trainer.step)
      metrics = trainer.by_run(trainer.train(chunk))
      losses.append(metrics['loss'][:, : chunk.num_batches])
      if trainer.step == steps:
        break
  states = trainer.states(trainer.snapshot())
  return validation, np.concatenate(losses, axis=1), jax.device_get(states)


def collectives(trainer):
  """Of the compiled training and evaluation."""
  chunk = next(trainer.train_chunks(0, 0, 3))
  calls = {}
  for name in ('_train_steps', '_eval_steps'):
    function = getattr(trainer, name)

    def lower(*args, name=name, function=function):
      calls[name] = function.lower(*args).compile().as_text()
      return function(*args)

    setattr(trainer, name, lower)
  trainer.train(chunk)
  trainer.evaluate(*next(trainer.eval_chunks(2)))
  pattern = (
    r'all-reduce|all-gather|all-to-all|collective|reduce-scatter|send|recv'
  )
  assert len(calls) == 2 and all('fusion' in text for text in calls.values())
  return sorted(set(re.findall(pattern, ' '.join(calls.values()))))


def main():
  dtype, steps, which, stored, how = sys.argv[1:]
  if how == 'as accelerators':
    population._at_once = lambda: True
  pixels = np.random.default_rng(0).integers(0, 256, (43, 16, 16, 3), np.uint8)
  split = splits.ArraySplit(pixels)
  if stored == 'device':
    split = splits.DeviceSplit(split)
  data = splits.DataSet(split, split, split)
  configs = [make_config(dtype, *member) for member in MEMBERS[which]]
  if how == 'as accelerators':
    for config in configs:
      config.model.convolution = 'native'
  together = train(Population(configs, data), int(steps))
  worst = {'validation': 0.0, 'losses': 0.0, 'first': 0.0, 'params': 0.0}

  def compare(name, one, other):
    difference = np.abs(one - other).max() / np.abs(other).max()
    worst[name] = max(worst[name], float(difference))

  for index, config in enumerate(configs):
    validation, losses, (state,) = train(SingleRun(config, data), int(steps))
    compare('validation', together[0][index], validation[0])
    compare('losses', together[1][index], losses[0])
    compare('first', together[1][index, :1], losses[0, :1])
    jax.tree.map(
      lambda *pair: compare('params', *pair),
      together[2][index].variables,
      state.variables,
    )
    same = jax.tree.map(
      lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype),
      together[2][index],
      state,
    )
    assert all(jax.tree.leaves(same)) and state.step == int(steps)
  print(
    json.dumps(
      {
        'devices': jax.local_device_count(),
        'collectives': collectives(Population(configs, data)),
        'spread': float(together[1].std(axis=0).min()),
        **worst,
      }
    )
  )


if __name__ == '__main__':
  main()
