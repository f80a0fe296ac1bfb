"""The record of a sweep, in each kind of database that workers can share."""

import contextlib
import multiprocessing
import os
import re
import signal
import time

import optuna
from optuna.trial import TrialState
import pytest

from configs import default
from sweeps import points
from sweeps import study as studies
from sweeps.study import parse_storage
from tests import postgres
from vae.errors import UserError

AXES = {'objective.beta': [0.5, 1.0, 2.0], 'seed': [0, 1]}
OBJECTIVES = {'rate': 'minimize', 'distortion': 'minimize'}
MEASURED = {'split': 'validation', 'metrics': []}
UNITS = dict.fromkeys(OBJECTIVES, 'nats')

# Forks of a process that has imported what they need, and done nothing else.
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload([__name__])


@pytest.fixture(scope='module')
def database():
  with postgres.server() as url:
    yield url


@pytest.fixture(params=['sqlite', 'postgresql'])
def place(request, tmp_path):
  """A storage and the name of a study."""
  if request.param == 'sqlite':
    return f'{tmp_path}/a?b=%41#{{c}}[1].db', 'sweep'  # A path, not a URL.
  return request.getfixturevalue('database'), request.node.name


def open_study(place, axes=AXES, measured=MEASURED, change=(), **options):
  url, name = place
  base = default.get_config()
  base.update_from_flattened_dict(dict(change))
  objectives = options.pop('objectives', OBJECTIVES)
  return studies.Study(
    parse_storage(url), name, base, axes, measured, objectives, **options
  )


def complete(study, point, rate=3.0):
  row = {'rate': rate, 'distortion': 4.0, 'kl': [0.5], 'active': [True]}
  return study.record(point, row=row, units=UNITS)


def states(study):
  frame = study.results().frame
  return dict(zip(frame.point, frame.state, strict=True))


def work(place, start):
  start.wait()
  with open_study(place) as study:
    while taken := study.take(1):
      time.sleep(0.02)
      complete(study, *taken)


def take_one_and_die(place, start):
  del start
  open_study(place).take(1)
  os.kill(os.getpid(), signal.SIGKILL)


def run_workers(place, target, count):
  start = PROCESSES.Event()
  workers = [
    PROCESSES.Process(target=target, args=(place, start)) for _ in range(count)
  ]
  for worker in workers:
    worker.start()
  start.set()
  for worker in workers:
    worker.join(120)
  return [worker.exitcode for worker in workers]


@pytest.mark.slow
def test_workers_that_begin_at_once_do_each_point_once(place):
  assert run_workers(place, work, 3) == [0, 0, 0]
  url = parse_storage(place[0]).render_as_string(hide_password=False)
  study = optuna.load_study(study_name=place[1], storage=url)
  trials = study.get_trials()
  names = [trial.user_attrs['name'] for trial in trials]
  assert sorted(names) == sorted(map(points.name, points.grid(AXES)))
  assert {trial.state for trial in trials} == {TrialState.COMPLETE}
  # As Optuna's own tools read it.
  assert trials[0].values == [3.0, 4.0]
  assert study.metric_names == ['rate', 'distortion']


def test_table_has_what_each_point_came_to(place):
  with open_study(place) as study:
    first, second, third = study.take(3)
    complete(study, first)
    study.record(second, error='diverged')
    results = study.results()
    rows = results.frame.set_index('point')
    assert rows.state.tolist() == [
      *('complete', 'failed', 'running', 'waiting', 'waiting', 'waiting')
    ]
    assert rows.rate[first.name] == 3.0 and rows.kl[first.name] == [0.5]
    assert rows.error[second.name] == 'diverged'
    assert third.values == {'objective.beta': 1.0, 'seed': 0}
    assert results.keys == list(AXES) and results.units == UNITS
  # What a worker that ends leaves is open again, at once.
  with open_study(place) as study:
    assert len(study.take(9)) == 4


def test_point_of_a_dead_process_of_this_machine_is_requeued_at_once(place):
  assert run_workers(place, take_one_and_die, 1) == [-signal.SIGKILL]
  with open_study(place, grace_seconds=3600) as study:
    taken = study.take(9)
    assert len(taken) == 6
    assert set(states(study).values()) == {'running'}


def test_kill_while_a_point_begins_loses_nothing(tmp_path, monkeypatch):
  """After any of the writes."""
  place, write = (f'{tmp_path}/sweep.db', 'sweep'), optuna.Trial.set_user_attr
  for num_writes in range(4):
    written = []

    def set_user_attr(trial, key, value, num_writes=num_writes, done=written):
      if len(done) == num_writes:
        raise KeyboardInterrupt
      done.append(key)
      write(trial, key, value)

    with monkeypatch.context() as patch:
      patch.setattr(optuna.Trial, 'set_user_attr', set_user_attr)
      with contextlib.suppress(KeyboardInterrupt):
        open_study(place).take(1)
    assert len(states(open_study(place))) == 6
  with open_study(place) as study:
    assert len(study.take(9)) == 5  # The last was taken.


def test_order_of_the_settings_changes_no_name(tmp_path):
  place = f'{tmp_path}/sweep.db', 'sweep'
  axes = {'model.latent_dim': [2], 'train.batch_size': [8], 'seed': [0, 1]}
  axes |= {'objective.beta': [1.0]}
  with open_study(place, axes) as study:
    for point in study.take(9):
      complete(study, point)
  with open_study(place, dict(reversed(axes.items()))) as study:
    assert not study.take(9) and len(states(study)) == 2


def test_point_of_a_silent_worker_is_requeued_and_a_living_one_keeps_its(
  place, monkeypatch
):
  """Workers of other machines are known by their heartbeats alone."""
  monkeypatch.setattr(studies.processes, 'is_alive', lambda worker: True)
  silent = open_study(place, grace_seconds=2)
  living = open_study(place, grace_seconds=2)
  other = open_study(place, grace_seconds=2)
  with living, other:
    (lost,), (kept,) = silent.take(1), living.take(1)
    names = [point.name for point in other.take(4)]
    deadline = time.monotonic() + 60
    while not (again := other.take(1)):
      assert time.monotonic() < deadline
      time.sleep(0.1)
    assert again[0].name == lost.name and lost.name not in names
    # It was not dead after all.
    assert not complete(silent, lost, rate=100.0)
    assert complete(other, again[0]) and complete(living, kept)
    assert states(other)[lost.name] == 'complete'
    assert other.results().frame.rate.max() == 3.0


def test_failed_points_are_retried_only_if_asked(place):
  with open_study(place) as study:
    for point in study.take(6):
      study.record(point, error='out of memory')
  with open_study(place) as study:
    assert not study.take(1)
  with open_study(place, retry_failed=True) as study:
    assert len(study.take(9)) == 6 and not study.take(1)


def test_sweep_grows_and_keeps_what_is_done(place):
  axes = {'objective.beta': [0.5, 1.0]}
  with open_study(place, axes) as study:
    for point in study.take(9):
      complete(study, point)
  # More values and seeds, which did not vary, as in the config.
  wider = {'objective.beta': [1.0, 2.0], 'seed': [0, 1]}
  with open_study(place, wider) as study:
    taken = study.take(9)
    assert sorted(point.name for point in taken) == [
      *('beta=1,seed=1', 'beta=2', 'beta=2,seed=1')
    ]
    for point in taken:
      complete(study, point)
    assert study.results().frame.seed.tolist() == [0, 0, 1, 0, 1]
  # More epochs, or other measurements: all points again, from checkpoints.
  change = [('train.num_epochs', default.get_config().train.num_epochs + 1)]
  for options in ({}, {'measured': {'split': 'test', 'metrics': ['bounds']}}):
    with open_study(place, wider, change=change, **options) as study:
      assert len(study.take(99)) == 5
      assert set(states(study).values()) == {'running'}
  with pytest.raises(UserError, match='num_epochs was'):
    open_study(place, wider)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'change': [('seed', 3)]}, 'config.seed was 0 and is now 3'),
    ({'axes': {'model.latent_dim': [2]}}, 'axes was'),
    ({'objectives': {'rate': 'minimize'}}, 'objectives was'),
    ({'num_points': 3}, 'search was False and is now True'),
  ],
)
def test_another_sweep_of_that_name_is_refused(tmp_path, options, message):
  place = f'{tmp_path}/sweep.db', 'sweep'
  axes = {'objective.beta': [0.5]}
  open_study(place, axes)
  with pytest.raises(UserError, match=message):
    open_study(place, **{'axes': axes, **options})


def test_worker_notices_that_another_extended_the_sweep(tmp_path):
  place = f'{tmp_path}/sweep.db', 'sweep'
  study = open_study(place)
  open_study(place, change=[('train.num_epochs', 999)])
  with pytest.raises(UserError, match='has extended this sweep'):
    study.take(1)


SPACE = {
  'objective.beta': points.Range(0.1, 10.0, True),
  'model.latent_dim': points.Range(2, 16),
  'model.hidden_channels': [(4, 8), (8,)],
}


def test_search_has_as_many_points_as_asked_for(place):
  with open_study(place, SPACE, num_points=5) as study:
    taken = study.take(3) + study.take(9)
    assert len(taken) == 5 and not study.take(1)
    for point in taken[:4]:
      assert 0.1 <= point.values['objective.beta'] <= 10
      assert point.values['model.latent_dim'] in range(2, 17)
      assert point.values['model.hidden_channels'] in [(4, 8), (8,)]
      complete(study, point)
  # What was given back is the same point; a range and a list are wider.
  wider = SPACE | {
    'objective.beta': points.Range(0.01, 100.0, True),
    'model.hidden_channels': [(4, 8), (8,), (16,)],
  }
  with open_study(place, wider, num_points=7) as study:
    again, *new = study.take(9)
    assert (again.name, again.values) == (taken[4].name, taken[4].values)
    assert len(new) == 2


def test_database_that_cannot_be_used_gets_one_line(database, tmp_path):
  wrong = re.sub(':[^:@]+@', ':wrong@', database)
  for url, message in (
    ('postgresql://u:secret@127.0.0.1:1/db', 'cannot be used'),
    ('mysql://u:secret@127.0.0.1:1/db', 'must be postgresql://'),
    ('://', 'must be postgresql://'),
    (f'{tmp_path}/nowhere/a.db', 'No such file'),
    (wrong, 'password authentication failed'),
  ):
    with pytest.raises(UserError) as error:
      open_study((url, 'x'))
    assert message in str(error.value) and '\n' not in str(error.value)
    assert 'secret' not in str(error.value)


def test_study_of_something_else_is_refused(tmp_path):
  path = f'{tmp_path}/other.db'
  study = optuna.create_study(
    storage=f'sqlite:///{path}', study_name='x', directions=['minimize'] * 2
  )
  study.add_trial(optuna.create_trial(values=[1.0, 2.0]))
  with pytest.raises(UserError, match='not made by this version'):
    open_study((path, 'x'))
