"""A run is a function of its config, whatever the environment switches.

As a script it trains and measures a run and a population, and prints all
numbers as JSON.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import make_data, make_small_config, ROOT, Rows
import train
from vae import loading, numerics

X64 = {'JAX_ENABLE_X64': '1'}
ALL = X64 | {
  'JAX_THREEFRY_PARTITIONABLE': '0',
  'JAX_DEFAULT_PRNG_IMPL': 'rbg',
  'JAX_RANDOM_SEED_OFFSET': '3',
  'FLAX_FIX_RNG_SEPARATOR': '1',
  'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
  'JAX_NUMPY_RANK_PROMOTION': 'raise',
}


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


def start(workdir, num_epochs, **switches):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [sys.executable, __file__, workdir, str(num_epochs)],
    env=environment | switches,
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.usefixtures('users_programs')
def test_switches_change_no_bit_of_a_run(tmp_path):
  """The run starts under some switches, and continues under others."""
  for num_epochs, switches in ((1, ALL), (2, X64)):
    processes = [
      start(tmp_path / 'plain', num_epochs),
      start(tmp_path / 'switched', num_epochs, **switches),
    ]
    plain, switched = (
      json.loads(p.communicate()[0].splitlines()[-1]) for p in processes
    )
    assert plain == switched
    assert plain['steps'] == [5 * num_epochs] * 2


def test_keys_are_threefrys():
  """And so the numbers of a seed are what they always were."""
  for seed in (0, 2**31, 2**32 - 1):
    key = jax.random.key(seed, impl='threefry2x32')
    for purpose, name in enumerate(
      'init train eval sample measure bound'.split()
    ):
      ours = getattr(numerics, f'{name}_key')(seed)
      expected = jax.random.fold_in(key, purpose)
      np.testing.assert_array_equal(*map(jax.random.key_data, (ours, expected)))


def test_switches_are_restored():
  def switches():
    return jnp.ones(1).dtype, jax.random.key(0).dtype

  before = switches()
  with jax.enable_x64(True), jax.default_prng_impl('rbg'):
    others = switches()
    with numerics.fixed('bfloat16'):
      assert switches() == before
    assert switches() == others != before
    with numerics.fixed('float64'):
      assert switches() == (np.float64, before[1])
  assert switches() == before


if __name__ == '__main__':
  main()
