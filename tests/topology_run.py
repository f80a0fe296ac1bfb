"""Trains for a few steps on this process's devices; prints losses as JSON.

Run by test_training.py, once for each number of virtual devices; with images
that are stored on them, or are sent with each chunk.
"""

import json
import sys

import jax
import numpy as np

from vae import devices
from vae import model as models
from vae import objective as objectives
from vae import optimizers
from vae import randomness
from vae import splits
from vae import training


def main():
  dtype, steps = sys.argv[1], int(sys.argv[2])
  stored = sys.argv[3:] == ['stored']
  topology = devices.Topology(jax.device_count())
  model = models.VAE(
    (16, 16, 3),
    5,
    (4, 8),
    learn_sigma=True,
    dtype=dtype,
    axis_name=devices.AXIS,
  )
  # Everything random is on: flips, noise on the input, two samples of z.
  objective = objectives.Objective(1.5, num_samples=2, input_noise=0.1)
  settings = training.Settings(objective, 0.005)
  optimizer = optimizers.Optimizer()
  run = training.make_train_steps(model, optimizer, flip=True)
  evaluate = training.make_eval_steps(model)

  pixels = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), np.uint8)
  split = splits.ArraySplit(pixels)
  if stored:
    split = splits.DeviceSplit(split)
  images = splits.stored_images(split)
  state = training.create_state(model, optimizer, seed=3)
  # A batch size that does not divide the split. Evaluated before training:
  # rounding noise that Adam blows up, in biases before BatchNorm, cancels in
  # the training loss alone.
  evaluated = [
    evaluate(
      *(state.variables, settings, randomness.eval_key(3), images),
      *(chunk.batches, chunk.num_batches, start, 80),
    )
    for chunk, start in splits.eval_chunks(split, 24, 3, topology)
  ]
  losses, statistics = [], None
  while len(losses) < steps:
    epoch, first = divmod(len(losses), 5)
    for chunk in splits.train_chunks(split, 3, epoch, first, 16, 1, topology):
      state, metrics = run(
        *(state, settings, randomness.train_key(3), images),
        *(chunk.batches, chunk.num_batches),
      )
      losses.append(float(metrics['loss'][0]))
      if statistics is None:
        leaves = jax.device_get(jax.tree.leaves(state.batch_stats))
        statistics = np.concatenate(leaves).tolist()
      if len(losses) == steps:
        break
  print(
    json.dumps(
      {
        'devices': topology.num_devices,
        'losses': losses,
        'statistics': statistics,
        'val': sum(float(e['loss'].sum()) for e in evaluated),
      }
    )
  )


if __name__ == '__main__':
  main()
