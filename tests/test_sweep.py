"""Sweeps: `python sweep.py` in its own processes, and workers in this one."""

import csv
import errno
import os
import re
import shutil
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
from runs import metric_writer, processes, workdirs
from sweeps import points, report
from sweeps import study as studies
from sweeps import worker as workers
from tests import postgres
from tests.conftest import ROOT
from tests.preloaded import run
import train
from vae import loading
from vae.checkpoints import Checkpoints
from vae.errors import UserError, WriteError

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
OBJECTIVES = {'rate': 'minimize', 'distortion': 'minimize'}


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


@pytest.fixture
def make_worker(small_config, tmp_path):
  """Makes workers that train for one epoch, in folders of these names."""
  small_config.train.num_epochs = 1
  with processes.StopSignals() as stop:

    def make(axes, name='sweep', change=(), **options):
      config = small_config.copy_and_resolve_references()
      config.update_from_flattened_dict(dict(change))
      folder = epath.Path(tmp_path / name)
      folder.mkdir(exist_ok=True)
      url = studies.parse_storage(f'{folder}/sweep.db')
      study = studies.Study(
        url, 'sweep', config, axes, {}, OBJECTIVES, **options
      )
      settings = measure.Settings((), batch_size=8)
      return workers.Worker(folder, study, 'validation', settings, stop)

    yield make


@pytest.fixture
def work(make_worker, capsys):
  """Works in this process until a sweep is done; returns table and output."""

  def run_worker(*args, **kwargs):
    worker = make_worker(*args, **kwargs)
    with worker.study:
      worker.run()
    return rows(worker.folder), capsys.readouterr().out

  return run_worker


@pytest.mark.slow
def test_sweep_grows_from_its_checkpoints(work):
  """More values, a seed and epochs: the sweep that had them all at once."""
  work({'objective.beta': [1.0]})
  axes = {'objective.beta': [1.0, 2.0]}
  _, out = work(axes)
  assert out.count('Trained steps') == 1  # Of β = 2.
  last = (axes | {'seed': [7, 8]},)
  more = {'change': [('train.num_epochs', 2)]}
  grown, out = work(*last, **more)
  assert out.count('this run goes on from step 5') == 2
  assert out.count('Trained steps') == 4
  assert 'Trained' not in work(*last, **more)[1]
  at_once, _ = work(*last, name='at_once', **more)
  names = [row.pop('point') for row in grown]
  assert names == ['beta=1', 'beta=1,seed=8', 'beta=2', 'beta=2,seed=8']
  for row in at_once:
    del row['point']
  assert grown == at_once


@pytest.mark.slow
def test_failed_point_is_recorded_and_the_others_go_on(work, tmp_path):
  axes = {'optimizer.learning_rate': [1000.0, 0.001]}
  more = {'change': [('train.num_epochs', 2)]}
  (fine, diverged), out = work(axes, **more)
  assert 'learning_rate=1000: failed, ' in out
  assert fine['state'] == 'complete' and float(fine['rate']) > 0
  assert diverged['state'] == 'failed' and 'diverged' in diverged['error']
  assert 'diverged' in (tmp_path / 'sweep' / 'report.html').read_text()
  assert 'failed' not in work(axes, **more)[1]
  _, out = work(axes, retry_failed=True, **more)
  assert 'learning_rate=1000: failed, ' in out


@pytest.mark.slow
def test_search_trains_points_of_ranges(work):
  axes = {
    'optimizer.learning_rate': points.Range(1e-7, 1e-2, True),
    'model.latent_dim': points.Range(2, 3),
  }
  found, _ = work(axes, num_points=3, sampler=optuna.samplers.RandomSampler())
  assert [row['state'] for row in found] == ['complete'] * 3
  rates = [float(row['optimizer.learning_rate']) for row in found]
  assert all(1e-7 <= rate <= 1e-2 for rate in rates)
  assert {row['model.latent_dim'] for row in found} <= {'2', '3'}


@pytest.fixture
def worker(make_worker, monkeypatch):
  """Works on points that are trained and measured at once."""
  monkeypatch.setattr(train, 'train_population', lambda runs, *_: [None])
  row = {'rate': 2.0, 'distortion': 3.0, 'kl': [2.0], 'active': [True]}
  row |= {'active_units': 1.0, 'elbo_optimal_sigma': 1.0}
  units = dict.fromkeys(row.keys() - {'kl', 'active'}, 'nats')
  monkeypatch.setattr(workers, 'measure_run', lambda *_: (dict(row), units))
  monkeypatch.setattr(workers, 'load_data', lambda config: None)
  return make_worker({'objective.beta': [0.5, 1.0, 2.0]})


def unreadable():
  """As a checkpoint is that a disk fails to read."""
  error = UserError('/x cannot be read (No space left on device).')
  error.__cause__ = OSError(errno.ENOSPC, 'No space left on device')
  return error


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, 'No space left on device'),
    WriteError('No space left on device.'),
    unreadable(),
  ],
)
@pytest.mark.parametrize(
  ('module', 'name', 'first'),
  [
    (train, 'train_population', 'waiting'),
    (workers, 'measure_run', 'waiting'),
    (report, 'write_table', 'complete'),
  ],
)
def test_full_disk_fails_no_point(
  worker, monkeypatch, error, module, name, first
):

  def fail(*unused_args, **unused_kwargs):
    raise error

  monkeypatch.setattr(module, name, fail)
  with worker.study, pytest.raises(UserError, match='No space left'):
    worker.run()
  states = worker.study.results().frame.state.tolist()
  assert states == [first, 'waiting', 'waiting']


def test_failure_of_a_point_is_its_own(worker, monkeypatch):
  measure_run, errors = workers.measure_run, [MemoryError()]

  def fail_once(*args):
    if errors:
      raise errors.pop()
    return measure_run(*args)

  monkeypatch.setattr(workers, 'measure_run', fail_once)
  with worker.study:
    states = worker.run().frame.state.tolist()
  assert states == ['failed', 'complete', 'complete']


def test_points_of_an_earlier_command_may_be_larger(
  worker, make_worker, monkeypatch
):
  with make_worker({'model.latent_dim': [6]}, 'dims').study as study:
    study.take(1)
  padded = []
  monkeypatch.setattr(
    train, 'train_population', lambda *args: padded.append(args[2]) or [None]
  )
  smaller = make_worker({'model.latent_dim': [2]}, 'dims')
  with smaller.study:
    smaller.run()
  assert sorted(padded) == [2, 6]


def test_folder_in_use_is_waited_for(worker, monkeypatch, capsys):
  """Until the run in it ends, which here is this process itself."""
  folder = worker.folder / 'points' / 'beta=0.5'
  folder.mkdir(parents=True)
  holder = workdirs.hold(folder)
  holder.__enter__()
  monkeypatch.setattr(
    worker.stop, 'sleep', lambda seconds: holder.__exit__(None, None, None)
  )
  with worker.study:
    states = worker.run().frame.state.tolist()
  assert states == ['complete'] * 3
  assert capsys.readouterr().out.count('is in use by') == 1


@pytest.mark.slow
def test_measures_with_the_dimensions_of_the_point(trained_run, tmp_path):
  """Though models are padded to more."""
  workdir = epath.Path(tmp_path / 'run')
  shutil.copytree(trained_run, workdir)
  config = loading.read_config(workdir)
  settings = measure.Settings(('posterior',), batch_size=8)
  row, units = workers.measure_run(config, workdir, 'validation', settings, 3)
  assert len(row['kl']) == len(row['active']) == 2
  assert row['active_units'] == sum(row['active'])
  assert row['rate'] == pytest.approx(sum(row['kl']), rel=1e-5)
  assert 'gaussian_total_correlation_null' in row and set(units) <= set(row)
  assert units['active_units'] == 'dimensions'
  assert (workdir / report.SAMPLES).exists()
