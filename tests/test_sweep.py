"""`python sweep.py` in processes of its own, and a worker on a failing disk."""

import csv
import errno
import json
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
from runs import metric_writer, processes
from sweeps import measuring, report
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
HOLD = """
import sys
from etils import epath
from runs import workdirs
with workdirs.hold(epath.Path(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""

# Saves at every chance, so that there is time to be interrupted.
OFTEN = '--config.checkpoint.every_minutes=1e-9'


def rows(workdir):
  with (workdir / 'results.csv').open() as file:
    return list(csv.DictReader(file))


def without_speed(table):
  for row in table:
    del row['images_per_second'], row['seconds']
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
  """A sweep of 3 × 2 points, and its flags."""
  workdir = tmp_path_factory.mktemp('sweep') / 'faces'
  flags = (
    *SMALL,
    f'--config.data.dir={celeba_dir}',
    '--beta=0.05,1,20',
    '--latent_dim=2,3',
  )
  sweep(*flags, f'--workdir={workdir}')
  return workdir, flags


def test_table_is_that_of_the_checkpoints(finished):
  """Recomputed one by one, without padding."""
  workdir, _ = finished
  table = rows(workdir)
  assert len(table) == 6
  for row in table:
    assert row['state'] == 'complete' and not row['error']
    model = loading.load(workdir / 'points' / row['point'])
    assert str(model.model.latent_dim) == row['model.latent_dim']
    assert model.config.objective.beta == float(row['objective.beta'])
    rate, dimensions = float(row['rate']), 16 * 16 * 3
    # Rybkin et al. 2021.
    mse = float(row['optimal_sigma']) ** 2
    bound = -dimensions / 2 * (1 + np.log(2 * np.pi * mse)) - rate
    assert float(row['elbo_optimal_sigma']) == pytest.approx(bound, rel=1e-5)
    elbo = -rate - float(row['distortion'])
    assert float(row['elbo']) == pytest.approx(elbo, rel=1e-6)
    images = input_pipeline.load(model.config).validation
    images = next(images.batches(np.arange(11), 11))
    squares = [
      np.sum((images / 255 - model.reconstruct(images, seed)) ** 2)
      for seed in range(200)
    ]
    distortion = np.mean(squares) / 11 / (2 * 0.1**2)
    distortion += dimensions / 2 * np.log(2 * np.pi * 0.1**2)
    # A few draws of z of a few images.
    assert float(row['distortion']) == pytest.approx(distortion, abs=15)
  for dim in ('2', '3'):
    rates = [float(r['rate']) for r in table if r['model.latent_dim'] == dim]
    assert rates[0] > rates[1] > rates[2]


def test_point_is_a_run_like_any_other(finished, tmp_path):
  workdir, flags = finished
  point = workdir / 'points' / 'beta=1,latent_dim=3'
  code, _, err = run(
    f'--workdir={point}',
    '--metrics=reconstruction',
    f'--output={tmp_path}',
    script='evaluate.py',
  )
  assert code == 0, err
  code, out, err = run(
    *flags[:-2], '--config.objective.beta=1', f'--workdir={point}'
  )
  assert code == 0 and 'is finished, at step 100' in out, err


def test_sweep_grows_from_its_checkpoints(finished, tmp_path):
  """More values, a seed and epochs: the sweep that had them all at once."""
  _, flags = finished
  flags = (*flags[:-2], '--config.eval.every_epochs=1')
  one, two = tmp_path / 'grown', tmp_path / 'at_once'
  sweep(*flags, '--config.train.num_epochs=1', '--beta=1', f'--workdir={one}')
  out = sweep(
    *flags, '--config.train.num_epochs=1', '--beta=1,2', f'--workdir={one}'
  )
  assert out.count('Trained steps') == 1  # Of β = 2.
  last = (*flags, '--config.train.num_epochs=2', '--seed=1265,7')
  out = sweep(*last, '--beta=1,2', f'--workdir={one}')
  assert out.count('this run goes on from step 5') == 2
  assert out.count('Trained steps') == 4
  out = sweep(*last, '--beta=1,2', f'--workdir={one}')
  assert 'Trained' not in out
  sweep(*last, '--beta=1,2', f'--workdir={two}')
  grown, at_once = (without_speed(rows(folder)) for folder in (one, two))
  names = [row.pop('point') for row in grown]
  assert names == [*('beta=1,seed=7', 'beta=1', 'beta=2,seed=7', 'beta=2')]
  for row in at_once:
    del row['point']
  assert grown == at_once


def test_points_on_two_devices_train_together(finished, tmp_path):
  workdir, flags = finished
  flags = (*flags[:-2], '--beta=0.05,1,20', '--latent_dim=3')
  out = sweep(*flags, f'--workdir={tmp_path}/two', devices=2)
  assert 'beta=0.05,latent_dim=3; beta=1,latent_dim=3' in out
  alone = {row['point']: row for row in rows(workdir)}
  for row in rows(tmp_path / 'two'):
    for metric in ('rate', 'distortion'):
      expected = float(alone[row['point']][metric])
      # Rounding, after a hundred steps.
      assert float(row[metric]) == pytest.approx(expected, rel=0.05)


def test_interrupted_and_terminated_sweep_goes_on(finished, tmp_path):
  undisturbed, flags = finished
  flags = (*flags, f'--workdir={tmp_path}/sweep')
  point = tmp_path / 'sweep' / 'points' / 'beta=0.05,latent_dim=2'
  for number, status, message in (
    (signal.SIGINT, 130, 'interrupted'),
    (signal.SIGTERM, 0, 'terminated'),
  ):
    logged = num_rows(point)
    process = start(*flags, OFTEN)
    wait_until(lambda n=logged: num_rows(point) >= n + 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and 'Traceback' not in err
    assert err.endswith(f'\n{message}; the same command goes on.\n')
    (step,) = re.findall(r'Stopped at step (\d+), which is saved', out)
    assert Checkpoints(point).latest_step() == int(step) < 100
  out = sweep(*flags)
  assert f'goes on from step {step}' in out
  tables = rows(tmp_path / 'sweep'), rows(undisturbed)
  assert without_speed(tables[0]) == without_speed(tables[1])


def wait_until(ready, *processes):
  deadline = time.monotonic() + 200
  while not ready():
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in processes)
    time.sleep(0.02)


def test_points_of_a_killed_worker_are_taken_over(celeba_dir, tmp_path):
  """On one PostgreSQL study: every point is done once, and none is lost."""
  workdir = tmp_path / 'shared'
  with postgres.server() as server:
    run_flags = (*SMALL, OFTEN, f'--config.data.dir={celeba_dir}')
    flags = (
      *run_flags,
      '--beta=0.5,2',
      '--seed=0,1',
      f'--workdir={workdir}',
      f'--storage={server.url}',
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
    assert f'{point.name}: requeued' in out
    assert f'{point.name}: this run goes on from step' in out
    study = optuna.load_study(study_name='shared', storage=server.url)
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


def test_failed_point_is_recorded_and_the_others_go_on(finished, tmp_path):
  _, flags = finished
  flags = (
    *flags[:-2],
    '--config.train.num_epochs=2',
    '--grid=config.optimizer.learning_rate=1000,0.001',
    f'--workdir={tmp_path}/sweep',
  )
  out = sweep(*flags)
  assert 'failed: learning_rate=1000: ' in out
  fine, diverged = rows(tmp_path / 'sweep')
  assert fine['state'] == 'complete' and float(fine['rate']) > 0
  assert diverged['state'] == 'failed' and 'diverged' in diverged['error']
  assert 'diverged' in (tmp_path / 'sweep' / 'report.html').read_text()
  out = sweep(*flags)
  assert 'Training' not in out and 'failed: learning_rate=1000' in out
  out = sweep(*flags, '--retry_failed')
  assert 'learning_rate=1000: requeued' in out


def test_search_prunes_points(finished, tmp_path):
  _, flags = finished
  out = sweep(
    *flags[:-2],
    '--config.eval.every_epochs=2',
    '--config.train.num_epochs=6',
    '--grid=config.optimizer.learning_rate=1e-7:1e-2:log',
    '--latent_dim=2:4',
    '--num_points=8',
    '--sampler=random',
    '--objectives=distortion',
    '--pruner=median',
    f'--workdir={tmp_path}/search',
  )
  found = rows(tmp_path / 'search')
  states = [row['state'] for row in found]
  assert len(found) == 8 and set(states) <= {'complete', 'pruned'}
  assert states.count('pruned') == out.count('pruned after epoch')
  assert all(
    1e-7 <= float(row['optimizer.learning_rate']) <= 1e-2 for row in found
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--beta=-1,2'], 'config.objective.beta is -1.0; it must be at least 0'),
    (['--beta=1', '--grid=config.objective.beta=2'], 'is given once'),
    (['--grid=config.objective.betta=2'], 'there is no such key'),
    (['--grid=objective.beta=2'], 'the form is config.GROUP.NAME'),
    (['--latent_dim=2:4'], 'go with --num_points=N'),
    (['--beta=1', '--sampler=random'], '--sampler: ranges'),
    (['--beta=1', '--metrics=bound'], '--metrics: there is no bound'),
    (['--beta=1', '--num_points=2', '--objectives=x'], 'there is no x'),
    (
      ['--beta=1', '--num_points=2', '--pruner=median'],
      'goes with one of the --objectives',
    ),
    (['--beta=1', '--storage=mysql://x'], 'is not a supported database'),
    ([], 'there is nothing to vary'),
    (['--latent_dim=2,1000000000'], 'parameters, and with config.'),
    (['--beta=1', '--config.data.dir=/nowhere'], '/nowhere'),
  ],
)
def test_mistakes_get_one_line_and_leave_no_sweep(flags, message, tmp_path):
  err = sweep(*SMALL, *flags, f'--workdir={tmp_path}/w', code=2)
  assert message in err and err.count('\n') == 1 and 'Traceback' not in err
  assert not list(tmp_path.glob('w/*'))


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ("{'objective.betta': [1.0]}", 'config.objective.betta: there is no such'),
    ("{'objective.beta': ['1']}", "config.objective.beta is '1'"),
    ("{'objective.beta': 1.0}", 'each with a list of values'),
    ("{'objective.beta': [1.0, 1]}", 'has the value 1 twice'),
  ],
)
def test_mistakes_in_a_config_get_one_line(axes, message, tmp_path):
  config = tmp_path / 'some.py'
  config.write_text(
    'from configs.celeba import get_config\n\n\ndef sweep():\n'
    f'  return {axes}\n'
  )
  err = sweep(f'--config={config}', f'--workdir={tmp_path}/w', code=2)
  assert message in err and err.count('\n') == 1 and 'Traceback' not in err


def test_workdir_of_something_else_is_refused(finished, trained_run):
  workdir, flags = finished
  flags = (*flags, f'--workdir={workdir}')
  assert 'config.seed was' in sweep(*flags, '--config.seed=3', code=2)
  err = sweep(*SMALL, '--beta=1,2', f'--workdir={trained_run}', code=2)
  assert 'holds a run' in err


GRID = {'objective.beta': [0.5, 1.0, 2.0]}


@pytest.fixture
def worker(small_config, tmp_path, monkeypatch):
  """Works on points that are trained and measured at once."""
  monkeypatch.setattr(train, 'train_population', lambda runs, *_: [None])
  row = {'rate': 2.0, 'distortion': 3.0, 'kl': [2.0], 'active': [True]}
  row |= {'active_units': 1.0, 'elbo_optimal_sigma': 1.0}
  units = dict.fromkeys(row.keys() - {'kl', 'active'}, 'nats')
  monkeypatch.setattr(measuring, 'measure_run', lambda *_: (dict(row), units))
  monkeypatch.setattr(workers, 'load_data', lambda config: None)
  objectives = {'rate': 'minimize', 'distortion': 'minimize'}
  url = studies.parse_storage(f'{tmp_path}/sweep.db')
  study = studies.Study(url, 'sweep', small_config, GRID, {}, objectives)
  settings = measure.Settings((), 1, 8)
  folder = epath.Path(tmp_path)
  with processes.StopSignals() as stop:
    yield workers.Worker(
      folder, study, small_config, 'validation', settings, stop
    )


def raises(error):
  def function(*unused_args, **unused_kwargs):
    raise error

  return function


def os_error(number):
  return OSError(number, os.strerror(number), '/some/file')


def unreadable():
  error = UserError('a checkpoint cannot be read')
  error.__cause__ = os_error(errno.EIO)
  return error


@pytest.mark.parametrize(
  'error',
  [
    os_error(errno.ENOSPC),
    os_error(errno.EROFS),
    unreadable(),
    WriteError('No space left on device.'),
  ],
)
@pytest.mark.parametrize('what', ['train', 'measure'])
def test_full_disk_fails_no_point(worker, monkeypatch, error, what):
  if what == 'train':
    monkeypatch.setattr(train, 'train_population', raises(error))
  else:
    monkeypatch.setattr(measuring, 'measure_run', raises(error))
  with worker.study, pytest.raises(WriteError) as caught:
    worker.run()
  assert worker.study.results().frame.state.tolist() == ['waiting'] * 3
  message = str(caught.value)
  reason = getattr(error.__cause__ or error, 'strerror', None) or str(error)
  assert reason in message and '\n' not in message


@pytest.mark.parametrize(
  'error', [UserError('diverged.'), os_error(errno.ENOENT), MemoryError()]
)
def test_failure_of_a_point_is_its_own(worker, monkeypatch, error):
  measure_run, errors = measuring.measure_run, [error]

  def fail_once(*args):
    if errors:
      raise errors.pop()
    return measure_run(*args)

  monkeypatch.setattr(measuring, 'measure_run', fail_once)
  with worker.study:
    states = worker.run().frame.state.tolist()
  assert states == ['failed', 'complete', 'complete']


def test_table_that_cannot_be_written_ends_no_sweep(
  worker, monkeypatch, capsys, tmp_path
):
  monkeypatch.setattr(report, 'write_table', raises(os_error(errno.ENOSPC)))
  with worker.study, pytest.raises(WriteError, match='No space left'):
    worker.run()
  assert worker.study.results().frame.state.tolist() == ['complete'] * 3
  assert capsys.readouterr().err.count('the next point tries again') == 3
  monkeypatch.undo()
  assert not (tmp_path / 'report.html').exists()


def test_point_whose_folder_is_in_use_is_done_when_it_is_free(
  worker, tmp_path, monkeypatch, capsys
):
  folder = tmp_path / 'points' / 'beta=0.5'
  folder.mkdir(parents=True)
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLD, folder],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert holder.stdout.readline() == 'held\n'
  naps = []

  def sleep(seconds):
    assert seconds > 0
    naps.append(worker.study.results().frame.state.tolist())
    if len(naps) == 3:
      holder.communicate('')

  monkeypatch.setattr(worker.stop, 'sleep', sleep)
  with worker.study:
    results = worker.run()
  # The others did not wait.
  assert naps == [['running', 'complete', 'complete']] * 3
  assert results.frame.state.tolist() == ['complete'] * 3
  out = capsys.readouterr().out
  assert out.count(f'in use by process {holder.pid}') == 1


def test_measures_with_the_dimensions_of_the_point(
  trained_run, celeba_dir, tmp_path
):
  """Though models are padded to more."""
  workdir = epath.Path(tmp_path / 'run')
  shutil.copytree(trained_run, workdir)
  config = loading.read_config(workdir)
  data = input_pipeline.load(config)
  settings = measure.Settings(('posterior',), batch_size=8)
  row, units = measuring.measure_run(
    config, workdir, data, 'validation', settings, 4
  )
  assert len(row['kl']) == len(row['active']) == 2
  assert row['active_units'] == sum(row['active'])
  assert row['rate'] == pytest.approx(sum(row['kl']), rel=1e-5)
  assert 'gaussian_total_correlation_null' in row and set(units) <= set(row)
  assert json.loads(json.dumps(row))['kl'] == row['kl']
  assert (workdir / measuring.SAMPLES).exists()
