"""Workers of a sweep, in this process."""

import errno
import shutil

from etils import epath
import optuna
import pytest

from evaluation import measure
from runs import processes, workdirs
from sweeps import points, report
from sweeps import study as studies
from sweeps import worker as workers
from tests.test_sweep import rows
import train
from vae import loading
from vae.errors import UserError, WriteError

OBJECTIVES = {'rate': 'minimize', 'distortion': 'minimize'}


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
