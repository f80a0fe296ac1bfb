"""Trains and measures a run and a population; prints all numbers as JSON.

Run by test_numerics.py, in environments that differ.
"""

import hashlib
import json
import pathlib
import sys

from etils import epath
import jax
import numpy as np

from tests.conftest import make_data, make_small_config, Rows
import train
from vae import loading


def make_run(workdir, num_epochs):
  """All that is random is on, and a schedule."""
  config = make_small_config('')
  config.data.source = 'cartoon_faces'
  config.train.flip = True
  config.objective.input_noise = 0.1
  config.objective.num_samples = 2
  config.optimizer.decay_per_epoch = 0.9
  config.train.num_epochs = num_epochs
  return train.Run(config, epath.Path(workdir), Rows())


def digest(tree):
  """A hash of the bits of all arrays."""
  leaves = jax.tree.leaves_with_path(jax.device_get(tree))
  content = [
    (jax.tree_util.keystr(path), str(leaf.dtype), np.asarray(leaf).tobytes())
    for path, leaf in leaves
  ]
  return hashlib.sha256(repr(content).encode()).hexdigest()


def main():
  workdir, num_epochs = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  data = make_data()
  alone = make_run(workdir / 'alone', num_epochs)
  train.train_and_evaluate(alone.config, alone.workdir, data, alone.writer)
  member = make_run(workdir / 'member', num_epochs)
  train.train_population([member], data, latent_dim=4)
  trained = [
    loading.restore(run.config, run.workdir, 'last') for run in (alone, member)
  ]
  images = data.test.images
  content = {
    'rows': [run.writer.rows for run in (alone, member)],
    'steps': [model.step for model in trained],
    'states': [digest(model.variables) for model in trained],
    'samples': digest(trained[0].sample(2)),
    'reconstructions': digest(trained[0].reconstruct(images, seed=3)),
  }
  print(json.dumps(content))


if __name__ == '__main__':
  main()
