"""A run is a function of its config, whatever the environment switches."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT
from vae import numerics

X64 = {'JAX_ENABLE_X64': '1'}
ALL = X64 | {
  'JAX_THREEFRY_PARTITIONABLE': '0',
  'JAX_DEFAULT_PRNG_IMPL': 'rbg',
  'JAX_RANDOM_SEED_OFFSET': '3',
  'FLAX_FIX_RNG_SEPARATOR': '1',
  'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
  'JAX_NUMPY_RANK_PROMOTION': 'raise',
}


def start(workdir, num_epochs, **switches):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [sys.executable, ROOT / 'tests/switches_run.py', workdir, str(num_epochs)],
    env=environment | switches,
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  'num_starts', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_switches_change_no_bit_of_a_run(num_starts, tmp_path):
  """The run starts under some switches, and continues under others."""
  for num_epochs, switches in ((1, ALL), (2, X64))[:num_starts]:
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
