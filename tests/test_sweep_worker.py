"""A worker of a sweep where what it writes to gives way."""

import csv
import dataclasses
import errno
import os
import subprocess
import sys

from etils import epath
import pytest

from evaluation import measure
from evaluation.measure import Metric
from runs import processes
from runs import workdir_lock
from sweeps import disk
from sweeps import points
from sweeps import results_writer
from sweeps import study as studies
from sweeps import worker as workers
from sweeps.storage import open_storage
from tests.conftest import ROOT
from tests.test_workdir_lock import HOLD
from tests.test_workdir_lock import try_to_hold
import train
from vae import paths
from vae.errors import UserError
from vae.errors import WriteError

BETAS = [0.5, 1.0, 2.0]
GRID = points.grid({'objective.beta': BETAS})


@pytest.fixture
def stop():
  with processes.StopSignals() as stop:
    yield stop


@pytest.fixture
def study(tmp_path):
  with studies.Study(
    open_storage(f'sqlite:///{tmp_path}/sweep.db'),
    'sweep',
    {'values': {'objective.beta': BETAS}},
    {'rate': 'minimize', 'distortion': 'minimize'},
    grace_seconds=60.0,
  ) as study:
    yield study


@pytest.fixture
def worker(small_config, study, stop, tmp_path):
  """Takes its points one by one; of their data nothing is read."""
  settings = measure.Settings((), 1, 8)
  plan = workers.Plan(small_config, GRID, {}, 0, 1, 'validation', settings)
  data = workers.Data(lambda config: None)
  return workers.Worker(plan, epath.Path(tmp_path), study, data, stop)


def states(study):
  return [result.state for result in study.results()]


def raises(*errors):
  """Raises one at each call, and the last from then on."""
  left = list(errors)

  def function(*unused_args, **unused_kwargs):
    raise left.pop(0) if len(left) > 1 else left[0]

  return function


def os_error(number):
  return OSError(number, os.strerror(number), '/some/file')


@pytest.mark.parametrize(
  'error',
  [
    *map(os_error, [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]),
    WriteError('the checkpoint could not be written. It can be tried again.'),
  ],
)
@pytest.mark.parametrize('where', ['train', 'measure'])
def test_what_cannot_be_written_fails_no_point(
  worker, study, monkeypatch, error, where
):
  done = lambda *unused_args: None
  fails = raises(error)
  monkeypatch.setattr(
    train, 'train_and_evaluate', fails if where == 'train' else done
  )
  monkeypatch.setattr(workers.measuring, 'measure_run', fails)
  with pytest.raises(UserError) as caught:
    worker.run()
  assert states(study) == ['waiting'] * 3
  message = str(caught.value)
  assert (getattr(error, 'strerror', None) or str(error)) in message
  assert '\n' not in message and len(message) < 300


def test_of_a_population_none_fails_either(worker, study, monkeypatch):
  worker._plan = dataclasses.replace(worker._plan, population=3)
  monkeypatch.setattr(train, 'train_population', raises(os_error(errno.ENOSPC)))
  with pytest.raises(WriteError, match='No space left'):
    worker.run()
  assert states(study) == ['waiting'] * 3


def test_file_in_the_place_of_a_folder_is_told_and_can_be_mended(
  worker, study, tmp_path
):
  """As of any folder that cannot be made."""
  (tmp_path / 'points').write_text('')
  with pytest.raises(WriteError) as caught:
    worker.run()
  assert f'{tmp_path}/points/beta=0.5 cannot be written' in str(caught.value)
  assert 'the same command goes on' in str(caught.value)
  assert states(study) == ['waiting'] * 3


@pytest.mark.parametrize(
  'error', [UserError('diverged.'), os_error(errno.ENOENT), ValueError('x')]
)
def test_what_is_the_points_own_fault_fails_it_alone(
  worker, study, monkeypatch, error
):
  fails = raises(error, WriteError('enough.'))
  monkeypatch.setattr(train, 'train_and_evaluate', fails)
  with pytest.raises(WriteError):
    worker.run()
  assert states(study) == ['failed', 'waiting', 'waiting']


@pytest.fixture
def quick(monkeypatch):
  """Points that are trained and measured at once."""
  names = ('rate', 'distortion', 'elbo_optimal_sigma', 'active_units')
  metrics = {name: Metric(2.0, 'nats', '') for name in names}
  dimensions = {'kl': [2.0], 'active': [True]}
  monkeypatch.setattr(train, 'train_and_evaluate', lambda *unused_args: None)
  monkeypatch.setattr(
    workers.measuring, 'measure_run', lambda *unused_args: (metrics, dimensions)
  )


def test_disk_that_does_not_take_the_table_is_waited_for(
  quick, worker, stop, study, tmp_path, monkeypatch, capsys
):
  table = tmp_path / 'results.csv'
  table.mkdir()
  naps = []

  def mend(seconds):
    assert states(study) == ['complete'] * 3
    naps.append(seconds)
    if len(naps) == 2:
      table.rmdir()

  monkeypatch.setattr(stop, 'sleep', mend)
  worker.run()
  assert len(naps) == 2
  with table.open() as file:
    assert [row['state'] for row in csv.DictReader(file)] == ['complete'] * 3
  assert (tmp_path / 'report.html').exists()
  assert not list(tmp_path.glob('*.partial'))
  (warning,) = capsys.readouterr().err.splitlines()
  assert f'cannot be written into {tmp_path} (' in warning


def test_disk_that_never_takes_the_page_gets_one_line(
  quick, worker, study, tmp_path, monkeypatch
):
  (tmp_path / 'report.html').mkdir()
  monkeypatch.setattr(results_writer, '_PATIENCE_SECONDS', 0.0)
  with pytest.raises(WriteError) as caught:
    worker.run()
  assert f'{tmp_path} cannot be written (' in str(caught.value)
  assert 'All points are done' in str(caught.value)
  assert states(study) == ['complete'] * 3


def test_file_that_cannot_be_replaced_leaves_nothing_beside(tmp_path):
  (tmp_path / 'file').mkdir()
  with pytest.raises(OSError):
    paths.replace(epath.Path(tmp_path / 'file'), b'content')
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_point_whose_folder_is_in_use_is_done_when_it_is_free(
  quick, worker, stop, study, tmp_path, monkeypatch, capsys
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
    naps.append(states(study))
    if len(naps) == 3:
      holder.communicate('')

  monkeypatch.setattr(stop, 'sleep', sleep)
  worker.run()
  # The others were not waited with, and its own worker kept it.
  assert naps == [['running', 'complete', 'complete']] * 3
  assert states(study) == ['complete'] * 3
  said = [s for s in capsys.readouterr().out.splitlines() if 'in use' in s]
  assert len(said) == 1
  assert f'beta=0.5: its folder is in use by process {holder.pid}' in said[0]


def test_nobody_else_gets_into_a_point_until_it_is_measured(
  quick, worker, study, monkeypatch
):
  tried, measure_run = [], workers.measuring.measure_run

  def train_one(config, workdir, *unused_args):
    del config
    with pytest.raises(workdir_lock.InUseError, match=str(os.getpid())):
      try_to_hold(workdir)
    tried.append(workdir)

  def measure_one(run, *args):
    with pytest.raises(workdir_lock.InUseError):
      try_to_hold(run.workdir)
    tried.append(run.workdir)
    return measure_run(run, *args)

  monkeypatch.setattr(train, 'train_and_evaluate', train_one)
  monkeypatch.setattr(workers.measuring, 'measure_run', measure_one)
  worker.run()
  assert states(study) == ['complete'] * 3
  assert len(tried) == 6 and all(map(try_to_hold, tried))


def test_halves_of_a_population_get_into_their_folders(
  quick, worker, study, monkeypatch
):
  worker._plan = dataclasses.replace(worker._plan, population=3)
  monkeypatch.setattr(train, 'train_population', raises(MemoryError('full')))
  worker.run()
  assert states(study) == ['complete'] * 3


@pytest.mark.parametrize(
  ('number', 'ends'), [(errno.EIO, True), (errno.ENOENT, False)]
)
def test_worker_ends_if_a_checkpoint_cannot_be_read(number, ends):
  """The next point's could not be either; one that is gone is its own."""
  try:
    raise UserError('a checkpoint cannot be read') from OSError(number, 'so')
  except UserError as error:
    assert disk.is_at_fault(error) == ends
