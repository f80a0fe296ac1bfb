"""Properties of the programs as compiled for TPUs; nothing is run.

As a script, which loads the library of TPUs, it prints them as JSON.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import tpu_compile
from configs import celeba
from vae import steps

has_libtpu = tpu_compile.has_libtpu()
no_libtpu = pytest.mark.skipif(not has_libtpu, reason='no libtpu (make libtpu)')
pytestmark = [pytest.mark.slow, no_libtpu]


def make_config(image_size, channels=3):
  config = celeba.get_config()
  config.data.update(image_size=image_size, channels=channels)
  config.model.update(hidden_channels=(4, 8), latent_dim=3)
  return config


def main():
  tpu_compile.prepare()
  one, host = map(tpu_compile.slice_of, ('v5e-1', 'v5e-8'))
  # Images of the first two would be copied in the layouts [N, height, width,
  # channels] and [N, height · width · channels].
  for name, program, tpus, size, num_images in (
    ('narrow', 'train', one, (28, 1), 1_000_000),
    ('wide', 'train', one, (128, 3), 20_000),
    *((p, p, one, (16, 3), 1000) for p in ('bound', 'sample')),
    *((p, p, host, (16, 3), 1000) for p in ('train', 'eval', 'population')),
  ):
    config = make_config(*size)
    compiled = tpu_compile.lower(program, tpus, config, 8, num_images).compile()
    text = compiled.as_text()
    products = re.findall(r' (?:convolution|dot)\(.*', text)
    row = tpu_compile.describe(compiled) | {
      'aliases': len(re.findall('(?:may|must)-alias', text.splitlines()[0])),
      'precise': ['{highest,highest}' in line for line in products],
      'rounded': 'bf16[' in text,
      'double': 'f64[' in text,
    }
    print(json.dumps([name, row]), flush=True)


@pytest.fixture(scope='module')
def programs():
  root = str(pathlib.Path(__file__).parents[1])
  environment = os.environ | {'PYTHONPATH': root}
  output = subprocess.check_output([sys.executable, __file__], env=environment)
  return dict(map(json.loads, output.splitlines()))


@pytest.fixture(scope='module')
def sizes():
  """Number of arrays and bytes of the state, and bytes of the parameters."""
  state = steps.abstract_state(steps.program_from_config(make_config(16), 1000))
  sizes = [4 * leaf.size for leaf in jax.tree.leaves(state)]
  return len(sizes), sum(sizes), 4 * steps.num_parameters(state)


def test_images_on_the_device_are_not_copied(programs):
  # 28·28 bytes lie in a tile of 1,024.
  for name, size in ('narrow', 1024e6), ('wide', 20_000 * 128**2 * 3):
    memory = programs[name]
    assert size < 1e6 * memory['arguments_megabytes'] < 1.05 * size
    assert 1e6 * memory['temporary_megabytes'] < size / 10


def test_state_is_donated(programs, sizes):
  for name in ('narrow', 'train', 'population'):
    assert programs[name]['aliases'] >= sizes[0]
    assert 1e6 * programs[name]['aliased_megabytes'] >= sizes[1]


def test_step_reduces_the_gradient_once(programs, sizes):
  assert programs['train']['collectives'].keys() == {'all-reduce'}
  *small, gradient = sorted(programs['train']['collectives']['all-reduce'])
  channels = [4, 8, 4, 4]
  # With a few metrics, without the biases before a BatchNorm: they have none.
  assert 0 < gradient - sizes[-1] + 4 * sum(channels) < 100
  # Statistics of each BatchNorm forwards, and their gradients backwards.
  assert small == sorted(2 * [2 * 4 * n for n in channels])


def test_evaluation_reduces_its_sums_and_the_others_nothing(programs):
  # Sums of float32 metrics over each of the 100 batches of a dispatch.
  assert programs['eval']['collectives'].keys() == {'all-reduce'}
  (sums,) = programs['eval']['collectives']['all-reduce']
  assert sums % (4 * 100) == 0
  for name in programs.keys() - {'train', 'eval'}:
    assert programs[name]['collectives'] == {}


def test_nothing_is_sent_to_the_host_or_computed_in_float64(programs):
  for row in programs.values():
    assert row['host_transfers'] == 0 and not row['double']


def test_trained_model_is_measured_in_float32(programs):
  for name in ('bound', 'sample'):
    row = programs[name]
    assert row['precise'] and all(row['precise']) and not row['rounded']
  # By default a TPU rounds, and so does training.
  assert not any(programs['train']['precise']) and programs['train']['rounded']


if __name__ == '__main__':
  main()
