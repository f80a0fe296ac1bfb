"""Sweeps: `python sweep.py` in processes of its own."""

import csv
import os
import re
import signal
import subprocess
import sys
import time

from etils import epath
import jax
import numpy as np
import optuna
import pytest

from evaluation import measure
import input_pipeline
from runs import metric_writer
from tests import postgres
from tests.conftest import ROOT
from tests.preloaded import run
from vae import loading
from vae.checkpoints import Checkpoints

SMALL = (
  '--config=configs/celeba.py',
  '--config.data.image_size=16',
  '--config.data.decoded_dir=',
  '--config.model.hidden_channels=(4,8)',
  # Tests that have the same compile the same programs.
  '--config.model.latent_dim=3',
  '--config.model.sigma=0.1',
  '--config.train.batch_size=8',
  '--config.train.num_epochs=20',
  '--config.eval.every_epochs=10',
  '--config.train.log_every_steps=5',
)
# Saves at every chance, so that there is time to be interrupted.
OFTEN = '--config.checkpoint.every_minutes=1e-9'


def rows(workdir):
  """Rows of the table, without what depends on the machine."""
  with (workdir / 'results.csv').open() as file:
    table = list(csv.DictReader(file))
  for row in table:
    row.pop('images_per_second', None), row.pop('seconds', None)
  return table


def sweep(*flags, code=0, **kwargs):
  """Standard output of a sweep that exits with a code, or its error."""
  found, out, err = run(*flags, script='sweep.py', **kwargs)
  assert found == code, err
  return err if code else out


def start(*flags):
  """A sweep in a process that can be killed."""
  return subprocess.Popen(
    [sys.executable, 'sweep.py', *flags],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


def num_rows(point):
  return len(metric_writer.read(epath.Path(point)))


@pytest.fixture(scope='module')
def finished(celeba_dir, tmp_path_factory):
  """A sweep of 2 × 2 points, and its flags."""
  workdir = tmp_path_factory.mktemp('sweep') / 'faces'
  data = f'--config.data.dir={celeba_dir}'
  flags = (*SMALL, data, '--beta=0.05,20', '--latent_dim=2,3')
  sweep(*flags, f'--workdir={workdir}')
  return workdir, flags


@pytest.mark.slow
def test_table_is_that_of_the_checkpoints(finished):
  """Measured one by one, without padding."""
  workdir, _ = finished
  table = rows(workdir)
  assert len(table) == 4
  for row in table:
    assert row['state'] == 'complete' and not row['error']
    model = loading.load(workdir / 'points' / row['point'])
    assert str(model.model.latent_dim) == row['model.latent_dim']
    assert model.config.objective.beta == float(row['objective.beta'])
    data, settings = input_pipeline.load(model.config), measure.Settings()
    alone = measure.summarise(model, data, 'validation', settings)
    for name in ('rate', 'distortion', 'elbo', 'elbo_optimal_sigma'):
      expected = pytest.approx(alone.metrics[name].value, rel=1e-4)
      assert float(row[name]) == expected, name
  for dim in ('2', '3'):
    rates = [float(r['rate']) for r in table if r['model.latent_dim'] == dim]
    assert rates[0] > rates[1]


@pytest.mark.slow
def test_point_is_a_run_like_any_other(finished):
  workdir, flags = finished
  point = workdir / 'points' / 'beta=20,latent_dim=3'
  code, out, err = run(
    *flags[:-2], '--config.objective.beta=20', f'--workdir={point}'
  )
  assert code == 0 and 'is finished, at step 100' in out, err


# test_devices.py compares members of a population with runs by themselves.
@pytest.mark.slow
def test_points_on_two_devices_train_together(finished, tmp_path):
  workdir, flags = finished
  out = sweep(*flags[:-1], f'--workdir={tmp_path}/two', devices=2)
  assert '\nbeta=0.05; beta=20\n' in out
  alone = {row['point']: row for row in rows(workdir)}
  for row in rows(tmp_path / 'two'):
    for metric in ('rate', 'distortion'):
      expected = float(alone[f'{row["point"]},latent_dim=3'][metric])
      # Rounding, after a hundred steps.
      assert float(row[metric]) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'status', 'message'),
  [(signal.SIGTERM, 0, 'terminated'), (signal.SIGINT, 130, 'interrupted')],
)
def test_stopped_sweep_goes_on(finished, tmp_path, number, status, message):
  undisturbed, flags = finished
  flags = (*flags, f'--workdir={tmp_path}/sweep')
  point = tmp_path / 'sweep' / 'points' / 'beta=0.05,latent_dim=2'
  process = start(*flags, OFTEN)
  wait_until(lambda: num_rows(point) >= 3, process)
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert process.returncode == status and 'Traceback' not in err
  assert err.endswith(f'\n{message}; the same command goes on.\n')
  (step,) = re.findall(r'Stopped at step (\d+), which is saved', out)
  assert Checkpoints(point).all_steps()[-1] == int(step) < 100
  assert f'goes on from step {step}' in sweep(*flags)
  assert rows(tmp_path / 'sweep') == rows(undisturbed)


def wait_until(ready, *processes):
  deadline = time.monotonic() + 200
  while not ready():
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in processes)
    time.sleep(0.02)


@pytest.mark.slow
def test_points_of_a_killed_worker_are_taken_over(celeba_dir, tmp_path):
  """On one PostgreSQL study: every point is done once, and none is lost."""
  workdir = tmp_path / 'shared'
  with postgres.server() as url:
    run_flags = (*SMALL, OFTEN, f'--config.data.dir={celeba_dir}')
    flags = (
      *run_flags,
      '--beta=0.5,2',
      '--seed=0,1',
      f'--workdir={workdir}',
      f'--storage={url}',
    )
    victim = start(*flags)
    point = workdir / 'points' / 'beta=0.5,seed=0'
    wait_until(lambda: num_rows(point) >= 4, victim)
    others = [start(*flags) for _ in range(2)]
    victim.kill()
    victim.wait()
    outputs = [worker.communicate(timeout=300) for worker in others]
    assert [worker.returncode for worker in others] == [0, 0], outputs
    out = ''.join(out for out, _ in outputs)
    assert f'{point.name}: this run goes on from step' in out
    study = optuna.load_study(study_name='shared', storage=url)
    states = [trial.state.name for trial in study.get_trials()]
  assert sorted(states) == ['COMPLETE'] * 4 + ['FAIL']
  assert [row['state'] for row in rows(workdir)] == ['complete'] * 4
  # In the bits of a sweep that nothing disturbed.
  alone = tmp_path / 'alone'
  sweep(*run_flags, '--beta=0.5', '--seed=0', f'--workdir={alone}')
  jax.tree.map(
    np.testing.assert_array_equal,
    loading.load(point, 'last').variables,
    loading.load(alone / 'points' / point.name, 'last').variables,
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--latent_dim=2:4'], 'goes with --num_points=N'),
    (['--beta=1', '--num_points=2', '--objectives=x'], 'choose from'),
    ([], 'there is nothing to vary'),
    (['--latent_dim=2,1000000000'], 'parameters, and with config.'),
    (['--beta=1', '--config.data.dir=/nowhere'], '/nowhere'),
  ],
)
def test_mistakes_get_one_line_and_leave_no_sweep(flags, message, tmp_path):
  err = sweep(*SMALL, *flags, f'--workdir={tmp_path}/w', code=2)
  assert message in err and err.count('\n') == 1 and 'Traceback' not in err
  assert not list(tmp_path.glob('w/*'))
