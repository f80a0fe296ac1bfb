"""Contracts that only a program compiled for a TPU can show."""

import json
import os
import subprocess
import sys

import jax
import pytest

from benchmarks import tpu_compile
from tests import tpu_compile_run
from tests.conftest import ROOT
from vae import model as models
from vae import optimizers
from vae import training

pytestmark = pytest.mark.skipif(
  not tpu_compile.has_libtpu(), reason='no libtpu (make libtpu)'
)


@pytest.fixture(scope='module')
def programs():
  process = subprocess.run(
    [sys.executable, ROOT / 'tests/tpu_compile_run.py'],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert process.returncode == 0, process.stderr
  rows = map(json.loads, process.stdout.splitlines())
  return {row.pop('name'): row for row in rows}


@pytest.fixture(scope='module')
def state():
  """Shapes of what training changes."""
  model = models.from_config(tpu_compile_run.make_config(16))
  return training.abstract_state(model, optimizers.Optimizer())


def num_bytes(tree):
  return sum(4 * leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ('name', 'num_images', 'image_bytes'),
  [
    ('celeba', 162_770, 64 * 64 * 3),
    ('narrow', 1_000_000, 1024),  # 28·28 bytes lie in a tile.
    ('wide', 20_000, 128 * 128 * 3),
  ],
)
def test_images_on_the_device_are_not_copied(
  programs, name, num_images, image_bytes
):
  images = num_images * image_bytes / 1e6
  memory = programs[name]
  assert images < memory['arguments_megabytes'] < 1.05 * images
  assert memory['temporary_megabytes'] < images / 10


def test_the_state_is_changed_where_it_lies(programs, state):
  leaves = jax.tree.leaves(state)
  for name in ('narrow', 'train'):
    assert programs[name]['aliases'] >= len(leaves)
    aliased = 1e6 * programs[name]['aliased_megabytes']
    assert aliased >= num_bytes(state)
  # Of the population each device has two members, and one step.
  assert programs['population']['aliases'] >= len(leaves)


def test_a_step_reduces_the_gradient_once_and_each_batch_norm_twice(
  programs, state
):
  """Its statistics forwards, and their gradients backwards."""
  assert programs['train']['collectives'].keys() == {'all-reduce'}
  *small, gradient = sorted(programs['train']['collectives']['all-reduce'])
  channels = [4, 8, 4, 4]  # Of each BatchNorm, encoder and decoder.
  # With the metrics, a few numbers; and without the biases before a BatchNorm,
  # whose gradient is known to be zero.
  assert 0 < gradient - num_bytes(state.params) + 4 * sum(channels) < 100
  assert small == sorted(2 * [2 * 4 * n for n in channels])


def test_devices_talk_of_nothing_else(programs):
  # Sums over the examples of four metrics, for each batch of a dispatch.
  assert programs['eval']['collectives'].keys() == {'all-reduce'}
  (sums,) = programs['eval']['collectives']['all-reduce']
  assert sums % (4 * 100) == 0
  for name in ('narrow', 'wide', 'bound', 'sample', 'population'):
    assert programs[name]['collectives'] == {}


def test_the_host_is_not_waited_for(programs):
  assert {row['host_transfers'] for row in programs.values()} == {0}


def test_nothing_is_computed_in_double_precision(programs):
  assert not any(row['double'] for row in programs.values())


def test_a_trained_model_is_measured_in_float32(programs):
  for name in ('bound', 'sample'):
    row = programs[name]
    assert row['products'] == row['precise'] > 0 and not row['rounded']
  # By default a TPU rounds, and so does training.
  assert programs['train']['precise'] == 0 and programs['train']['rounded']
