"""That the benchmarks run, and compare as they say; not how fast it all is."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import bandwidth
from benchmarks import rounds
from configs import celeba
from tests.conftest import ROOT
from tests.preloaded import program_lines


@pytest.mark.parametrize(
  ('script', 'flags', 'said'),
  [
    ('train_step', ['--without_torch'], 'Same network as in plain Flax'),
    ('end_to_end', ['--cache=device'], 'seconds per epoch'),
    ('scaling', [], 'devices'),
    ('population', [], 'time of one run'),
    ('checkpoints', [], 'share of the loop'),
  ],
)
def test_scripts_run_without_tensorflow(script, flags, said, tmp_path):
  program = (
    'import runpy, sys\n'
    # What is not there cannot be imported.
    'sys.modules |= dict.fromkeys(["tensorflow", "clu", "torch"])\n'
    'script = sys.argv.pop(1)\n'
    'sys.argv[0] = script\n'
    'runpy.run_path(script, run_name="__main__")\n'
  )
  output = tmp_path / 'results.json'
  result = subprocess.run(
    [
      *(sys.executable, '-c', program, f'benchmarks/{script}.py'),
      *('--quick', f'--output={output}', *flags),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr
  assert said in result.stdout
  machine = json.loads(output.read_text())['machine']
  assert {'date', 'jax', 'devices', 'cpu'} <= machine.keys()


@pytest.mark.parametrize('script', ['train_step', 'checkpoints'])
def test_devices_that_are_not_there_get_one_line(script):
  result = subprocess.run(
    [sys.executable, f'benchmarks/{script}.py'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'typo'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  assert program_lines(result.stderr).count('\n') == 1
  assert result.stderr.startswith("error: JAX_PLATFORMS is 'typo'; ")


def measured(batch_size, *seconds):
  return rounds.Measured('name', batch_size, 'float32', 0.0, 1, list(seconds))


def test_speedup_is_the_median_of_the_rounds_ratios():
  # The machine slows down to a tenth in the second round, for both alike.
  ours, other = measured(8, 0.1, 1.0, 0.1), measured(4, 0.2, 2.0, 0.1)
  assert rounds.speedup(ours, other) == pytest.approx(2 * 2)
  assert ours.images_per_second == pytest.approx(80)


def test_contenders_take_turns():
  runs = []
  contenders = [
    rounds.Contender(name, 1, 'float32', lambda steps, n=name: runs.append(n))
    for name in 'abc'
  ]
  results = [measured(1) for _ in contenders]
  rounds.alternate(contenders, results, num_rounds=3)
  assert ''.join(runs) == 'abcbcacab'
  assert [len(result.step_seconds) for result in results] == [3, 3, 3]


def test_minimum_bytes_of_a_network_counted_by_hand():
  config = celeba.get_config()
  config.data.image_size = 8
  config.model.hidden_channels = (2, 4)
  config.model.latent_dim = 3
  # Before a BatchNorm: 4·4·2 + 2·2·4, and 4·4·2 + 8·8·2.
  normalised, start, image = 48 + 160, 16, 192
  parameters = (
    (9 * 3 + 1) * 2 + (9 * 2 + 1) * 4 + 2 * (16 + 1) * 3 + (3 + 1) * 16
  )
  parameters += (9 * 4 + 1) * 2 + (9 * 2 + 1) * 2 + (9 * 2 + 1) * 3
  parameters += 2 * (2 + 4 + 2 + 2)
  separate = (14 * normalised + 6 * start + 8 * image) * 2 + 2 * image
  fused = (6 * normalised + 5 * start + 2 * image) * 2 + 3 * image
  for expected, is_fused in ((separate, False), (fused, True)):
    counted = bandwidth.minimum_bytes(config, 10, 'bfloat16', is_fused)
    assert counted == 10 * expected + 40 * parameters


def test_run_in_a_bucket_is_compared_with_one_on_a_disk(tmp_path):
  output = tmp_path / 'results.json'
  result = subprocess.run(
    [sys.executable, 'benchmarks/bucket.py', '--quick', f'--output={output}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stderr
  assert 'bucket / disk, median of the rounds' in result.stdout
  found = json.loads(output.read_text())
  speeds = found['images_per_second']
  assert found['ratio'] == speeds['bucket'][0] / speeds['disk'][0] > 0
