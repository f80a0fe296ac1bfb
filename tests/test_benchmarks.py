"""The benchmarks run and compare as they claim; no speed is asserted."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy import stats

from benchmarks import (
  jax_vae,
  published,
  results,
  rounds,
  same_network,
  time_to_quality,
  tpu_compile,
)
from configs.paper import iwae
from runs import progress, schema
from tests.browser import find_browser
from tests.conftest import ROOT
import train
from vae import splits

# A part of each script's output.
SCRIPTS = {
  'train_step': 'Same network as in plain Flax',
  'end_to_end': 'seconds per epoch',
  'scaling': 'Virtual devices',
  'population': 'time of a run',
  'checkpoints': 'share of the loop',
  'bucket': 'bucket / disk, median of the rounds',
  'accelerator_checks': 'same bits',
  'profile_step': 'ms per step',
  'memory': 'Memory at epoch 5',
  'time_to_quality': '| article | 1 of 1 |',
  'explorer': 'from slider to image',
}
# They start main.py.
WITH_TENSORFLOW = 'bucket', 'memory', 'time_to_quality', 'explorer'
if tpu_compile.has_libtpu():
  SCRIPTS['tpu_compile'] = 'images a chip'


@pytest.mark.slow
@pytest.mark.usefixtures('users_programs')
@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_run_without_tensorflow_and_pytorch(
  script, tmp_path, celeba_dir, trained_run
):
  if script == 'explorer':
    find_browser()
  blocked = ['torch']
  if script not in WITH_TENSORFLOW:
    blocked += ['tensorflow', 'clu']
  program = (
    f'import runpy, sys; sys.modules |= dict.fromkeys({blocked}); '
    'sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name="__main__")'
  )
  output = tmp_path / 'results.json'
  flags = ['--quick', f'--output={output}']
  if script in ('train_step', 'memory'):
    flags.append('--without_torch')
  elif script == 'explorer':
    flags.append(f'--workdir={trained_run}')
  elif script == 'time_to_quality':
    flags += ['--contenders=article; fast; open', '--target=1']
    flags += ['--', f'--config.data.dir={celeba_dir}']
  command = [sys.executable, '-c', program, f'benchmarks/{script}.py', *flags]
  result = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=600
  )
  assert result.returncode == 0, result.stderr
  assert SCRIPTS[script] in result.stdout
  assert json.loads(output.read_text())['machine']['devices']


@pytest.mark.slow
def test_plain_flax_has_the_same_network():
  differences = same_network.check(jax_vae.make_config(True), with_torch=False)
  assert max(differences['plain Flax'].values()) < 1e-4


def test_time_to_a_loss_is_that_of_its_first_validation():
  training = time_to_quality.Training(dimensions=100)
  for seconds, line in (
    (1.5, 'Compiling …'),
    (
      2.0,
      'step 37/111  epoch 1.00  loss 3,800.0 nats  2,556 images/s  2s left',
    ),
    (3.0, 'epoch 1/3  val: loss 3,786.1  kl 12.00 nats  mse 0.02000'),
    (4.0, 'epoch 2/3  val: loss 3,785.1  kl 8.00 nats  mse 0.01000'),
    (5.0, 'seed 4, epoch 3: loss 0.01100 (mse 0.01000, kl 4.00 nats)'),
  ):
    training.read(seconds, line)
  assert training.begins == 1.5
  assert training.losses == pytest.approx([0.023, 0.012, 0.011])
  # σ² is the mse: of 100 numbers with such errors, and the KL.
  log_prob = 100 * stats.norm.logpdf(0.1, scale=0.1)
  assert training.elbos[1:] == pytest.approx([log_prob - 8, log_prob - 4])
  times = [training.time_to(target) for target in (0.03, 0.012, 0.0119, 0.01)]
  assert times == [3.0, 4.0, 5.0, math.inf]


def test_speedup_is_the_median_of_the_ratios_of_the_rounds():
  # The machine is ten times slower in the second round.
  ours, other = (
    rounds.Measured('name', batch_size, 'float32', 0.0, 1, seconds)
    for batch_size, seconds in ((8, [0.1, 1.0, 0.1]), (4, [0.2, 2.0, 0.1]))
  )
  assert rounds.speedup(ours, other) == pytest.approx(2 * 2)
  assert ours.images_per_second == pytest.approx(80)


def test_xla_gets_no_flags_of_blanks_alone(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')
  assert results.xla_flags('') == ''
  assert results.xla_flags('--a') == '--a'
  monkeypatch.setenv('XLA_FLAGS', '--a')
  assert results.xla_flags('', '--b').split() == ['--a', '--b']


@pytest.mark.slow
def test_published_rows_are_measured_without_tensorflow(tmp_path):
  draw = np.random.default_rng(0).integers
  images = {
    name: draw(0, 256, (300, 28, 28, 1), np.uint8) for name in ('train', 'test')
  }
  np.savez(tmp_path / 'mnist.npz', **images)
  program = (
    'import runpy, sys; sys.modules["tensorflow"] = None; sys.argv.pop(0); '
    'runpy.run_path(sys.argv[0], run_name="__main__")'
  )
  output = tmp_path / 'results.json'
  flags = ['--quick', '--rows=iwae:iwae5', f'--output={output}']
  flags.append(f'--images={tmp_path / "mnist.npz"}')
  command = [sys.executable, '-c', program, 'benchmarks/published.py', *flags]
  subprocess.run(command, cwd=ROOT, check=True, timeout=600)
  (row,) = json.loads(output.read_text())['rows']
  assert row['epochs'] == 2
  bounds = [seed['iw_bound'] for seed in row['seeds']]
  # Two seeds, of which each image has less than a bit for each pixel.
  assert len(set(bounds)) == 2
  assert all(-28 * 28 < bound < 0 for bound in bounds)


@pytest.mark.slow
def test_seeds_that_train_together_are_runs_by_themselves(tmp_path):
  config = iwae.get_config('iwae5')
  config.data.image_size = config.data.channels = 1
  config.model.latent_dim, config.model.hidden_sizes = 2, (5,)
  config.train.num_epochs = 2
  config.optimizer.average_decay = 0.9
  schema.validate(config)
  pixels = np.random.default_rng(0).integers(0, 256, (70, 1, 1, 1), np.uint8)
  split = splits.ArraySplit(pixels)
  data = splits.DataSet(split, split, split)
  together = published.train(config, data, [0, 5])
  for seed, state in zip([0, 5], together, strict=True):
    config.seed = seed
    alone = train.train_and_evaluate(
      config, tmp_path / str(seed), data, progress.Writer()
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      (state.params, state.collections),
      (alone.params, alone.collections),
    )


# Stands in for Python in accelerator.sh.
STAND_IN = """#!/bin/sh
case $1 in
  *accelerator_checks.py) echo the reason >&2; exit 3 ;;
  *end_to_end.py) exec sleep 60 ;;
  *train_step.py) kill -KILL $$ ;;
  *.py) for last; do :; done; echo "$@" > "${last#--output=}" ;;
esac
"""


def test_parts_go_on_after_one_that_fails_hangs_or_is_killed(tmp_path):
  python, folder = tmp_path / 'python', tmp_path / 'results'
  python.write_text(STAND_IN)
  python.chmod(0o755)
  for flags in (
    ['--parts=checks,train_step,population'],
    ['--parts=end_to_end,profile', '--quick', '--seconds=5'],
  ):
    result = subprocess.run(
      [ROOT / 'benchmarks/accelerator.sh', *flags, folder],
      env=os.environ | {'PYTHON': str(python)},
      capture_output=True,
      text=True,
    )
    assert result.returncode == 1
  log = (folder / 'log.txt').read_text()
  assert log.endswith(result.stdout) and '\nthe reason\n' in log
  ended = dict(re.findall('^=== (.*): (.*)$', log, re.MULTILINE))
  assert ended['checks'].endswith(' with exit status 3')
  assert ended['train_step'].endswith(' with exit status 137')
  assert ended['population'].startswith('done after ')
  assert ended['end_to_end'].endswith(' s, as it took too long')
  assert 'profile' in ended
