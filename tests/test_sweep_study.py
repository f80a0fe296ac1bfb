"""The record of a sweep, on every storage that workers may share."""

import multiprocessing
import signal
import time

import optuna
import pytest
import sqlalchemy

from runs import processes
from sweeps import points
from sweeps import study as studies
from sweeps.results import Result
from sweeps.storage import file_url
from sweeps.storage import open_storage
from tests import postgres
from vae.errors import UserError

GRID = points.grid({'objective.beta': [0.5, 1.0, 2.0], 'seed': [0, 1]})
OBJECTIVES = {'rate': 'minimize', 'distortion': 'minimize'}

# Forks of one that has imported what they need, and done nothing else.
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload([__name__])


@pytest.fixture(scope='module')
def database():
  with postgres.server() as server:
    yield server


@pytest.fixture(params=['sqlite', 'journal', 'postgresql'])
def url(request, tmp_path):
  if request.param == 'sqlite':
    return f'sqlite:///{tmp_path}/sweep.db'
  if request.param == 'journal':
    return f'{tmp_path}/sweep.journal'
  return request.getfixturevalue('database').url


def open_study(url, name, grace_seconds=60.0, definition=None, **kwargs):
  return studies.Study(
    open_storage(url),
    name,
    definition or {'values': {'objective.beta': [1]}},
    kwargs.pop('objectives', OBJECTIVES),
    grace_seconds,
    **kwargs,
  )


def test_sqlite_file_is_where_it_is_named(tmp_path):
  """Also by characters that mean something in a URL."""
  path = tmp_path / 'a?b=%41#{c}[1].db'
  open_storage(file_url(path))
  assert [found.name for found in tmp_path.iterdir()] == [path.name]


def any_two(first, second):
  return True


def done(claim, rate=3.0, distortion=4.0):
  metrics = {'rate': rate, 'distortion': distortion}
  units = dict.fromkeys(metrics, 'nats')
  return Result(
    claim.name, claim.values, 'complete', metrics, units, [0.5], [True]
  )


def work(url, name, start):
  """A worker that takes whatever is there, one point at a time."""
  start.wait()
  with open_study(url, name) as study:
    study.add(GRID)
    while claims := study.claim(1, any_two):
      time.sleep(0.02)
      study.complete(claims[0], done(claims[0]))


def test_workers_that_begin_at_once_do_each_point_once(url, request):
  name = request.node.name
  start = PROCESSES.Event()
  workers = [
    PROCESSES.Process(target=work, args=(url, name, start)) for _ in range(3)
  ]
  for worker in workers:
    worker.start()
  start.set()
  for worker in workers:
    worker.join(120)
  assert [worker.exitcode for worker in workers] == [0, 0, 0]
  trials = optuna.load_study(
    study_name=name, storage=open_storage(url)
  ).get_trials()
  complete = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
  names = sorted(trial.user_attrs['name'] for trial in complete)
  assert names == sorted(points.name(values) for values in GRID)
  # What is not complete is a second trial that two beginners made.
  assert all('void' in t.user_attrs for t in trials if t not in complete)


def test_record_says_what_came_of_each_point(url, request):
  with open_study(url, request.node.name) as study:
    study.add(GRID[:3])
    (first,), (second,) = study.claim(1, any_two), study.claim(1, any_two)
    study.complete(first, done(first, 3.0, 4.0))
    study.fail(second, 'diverged')
    results = {result.name: result for result in study.results()}
  states = [results[points.name(values)].state for values in GRID[:3]]
  assert states == ['complete', 'failed', 'waiting']
  assert results[first.name].metrics == {'rate': 3.0, 'distortion': 4.0}
  assert results[first.name].values == GRID[0]
  assert results[second.name].error == 'diverged'
  # And Optuna's own tools read it.
  trial = study._study.get_trials()[0]
  assert trial.values == [3.0, 4.0] and trial.params == GRID[0]
  assert study._study.metric_names == ['rate', 'distortion']


def test_only_what_goes_together_is_taken_together(url, request):
  with open_study(url, request.node.name) as study:
    study.add(GRID)
    same_seed = lambda a, b: a['seed'] == b['seed']
    claims = study.claim(2, same_seed)
    assert [c.values['seed'] for c in claims] == [0, 0]
    assert len(study.claim(9, same_seed)) == 3  # The other seed's.
    assert study.num_waiting() == 1
    study.give_back()
    assert study.num_waiting() == 6


def make_foreign(study, claim):
  """Has a claim look as if it were a worker's on another machine."""
  worker = {'machine': 'elsewhere', 'pid': 1, 'started': 0.0, 'host': 'x'}
  study._storage.set_trial_user_attr(claim.trial_id, 'worker', worker)


def wait_until(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_point_of_a_silent_worker_waits_again_and_a_living_one_keeps_its(
  url, request
):
  name = request.node.name
  with (
    open_study(url, name, 3.0) as living,
    open_study(url, name, 3.0) as other,
  ):
    silent = open_study(url, name)
    living.add(GRID[:2])
    (kept,) = living.claim(1, any_two)
    (lost,) = silent.claim(1, any_two)
    make_foreign(living, kept)
    make_foreign(silent, lost)
    found = []
    wait_until(
      lambda: found.extend(other.give_back_those_of_the_dead()) or found
    )
    assert found == [lost.name]
    # Much longer than the grace of one that gives no sign.
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
      assert other.give_back_those_of_the_dead() == []
      time.sleep(0.1)
    living.complete(kept, done(kept))
    (again,) = other.claim(1, any_two)
    assert again.values == lost.values
    # It was not dead after all, and finds out before it tells of anything.
    with pytest.raises(studies.PointLostError):
      silent.complete(lost, done(lost))
    other.complete(again, done(again))
    assert [r.state for r in other.results()] == ['complete', 'complete']


def test_worker_notes_that_its_point_was_taken(url, request):
  name = request.node.name
  with open_study(url, name, 0.5) as slow:
    slow.add(GRID[:1])
    (claim,) = slow.claim(1, any_two)
    slow.check(claim)
    make_foreign(slow, claim)
    storage = open_storage(url)
    storage.set_trial_state_values(claim.trial_id, optuna.trial.TrialState.FAIL)

    def is_lost():
      try:
        slow.check(claim)
      except studies.PointLostError:
        return True
      return False

    wait_until(is_lost)


def take_one_and_die(url, name):
  with open_study(url, name) as study:
    study.claim(1, any_two)
    import os

    os.kill(os.getpid(), 9)


def test_dead_process_of_this_machine_is_not_waited_for(url, request):
  name = request.node.name
  with open_study(url, name, 3600.0) as study:
    study.add(GRID[:1])
    process = PROCESSES.Process(target=take_one_and_die, args=(url, name))
    process.start()
    process.join(60)
    assert study.num_running() == 1
    assert study.give_back_those_of_the_dead() == [points.name(GRID[0])]
    assert study.num_waiting() == 1


def test_failed_points_wait_again_only_where_asked(url, request):
  name = request.node.name
  with open_study(url, name) as study:
    study.add(GRID[:2])
    claims = study.claim(2, any_two)
    study.fail(claims[0], 'out of memory')
    study.complete(claims[1], done(claims[1]))
  time.sleep(0.01)
  with open_study(url, name) as study:
    study.add(GRID[:2])
    assert study.num_waiting() == 0
    study.add(GRID[:2], retry=True)
    (claim,) = study.claim(5, any_two)
    assert claim.name == claims[0].name
    study.complete(claim, done(claim))
    assert [r.state for r in study.results()] == ['complete', 'complete']


def test_another_sweep_of_that_name_is_refused(url, request):
  name = request.node.name
  open_study(url, name, definition={'values': {'objective.beta': [1, 2]}})
  with pytest.raises(UserError) as error:
    open_study(url, name, definition={'values': {'objective.beta': [1, 3]}})
  assert f'the study {name} holds another sweep' in str(error.value)
  assert 'objective.beta was [1, 2] and is now [1, 3]' in str(error.value)


def test_search_has_as_many_points_as_asked_for(url, request):
  space = {
    'objective.beta': points.Range(0.1, 10.0, True),
    'model.latent_dim': points.Range(2, 16),
    'model.hidden_channels': [(4, 8), (8,)],
  }
  with open_study(url, request.node.name) as study:
    claims = [study.ask(space, 5) for _ in range(7)]
    assert [claim is None for claim in claims] == [False] * 5 + [True] * 2
    for claim in claims[:4]:
      assert 0.1 <= claim.values['objective.beta'] <= 10
      assert claim.values['model.hidden_channels'] in [(4, 8), (8,)]
      study.complete(claim, done(claim))
    # What is given back is the same point again.
    study.give_back()
    again = study.ask(space, 5)
    assert again.name == claims[4].name and again.values == claims[4].values


def test_hopeless_points_are_pruned(url, request):
  pruner = optuna.pruners.ThresholdPruner(upper=100.0)
  with open_study(
    url, request.node.name, objectives={'distortion': 'minimize'}, pruner=pruner
  ) as study:
    claim = study.ask({'objective.beta': points.Range(0.1, 1.0)}, 3)
    study.report(claim, {'epoch': 1, 'val/distortion': 99.0})
    with pytest.raises(optuna.TrialPruned):
      study.report(claim, {'epoch': 2, 'val/distortion': 101.0})
    study.prune(claim, 'after epoch 2')
    (result,) = study.results()
    assert result.state == 'pruned'


def test_search_without_a_pruner_reports_nothing(url, request):
  """Nor has it to be for something that a validation tells."""
  objectives = {'elbo_optimal_sigma': 'maximize'}
  with open_study(url, request.node.name, objectives=objectives) as study:
    claim = study.ask({'objective.beta': points.Range(0.1, 1.0)}, 3)
    study.report(claim, {'epoch': 1, 'val/distortion': 99.0})


def give_all_back_and_die(url, name):
  with open_study(url, name) as study:
    study.add(GRID)
    study.claim(6, any_two)
    study.give_back()


def test_workers_that_go_on_with_what_was_given_back_are_not_taken_for_dead(
  url, request
):
  name = request.node.name
  before = PROCESSES.Process(target=give_all_back_and_die, args=(url, name))
  before.start()
  before.join(60)
  with open_study(url, name) as other, open_study(url, name) as owner:
    # As another sees it between the two writes by which a point is taken.
    trial = owner._trials()[0]
    owner._storage.set_trial_state_values(
      trial._trial_id, optuna.trial.TrialState.RUNNING
    )
    assert other.give_back_those_of_the_dead() == []


def test_worker_that_lost_points_knows_which(url, request):
  name = request.node.name
  with open_study(url, name) as study:
    study.add(GRID)
    claims = study.claim(3, any_two)
    for claim in claims[:2]:
      study._storage.set_trial_state_values(
        claim.trial_id, optuna.trial.TrialState.FAIL
      )
    assert [study.owns(claim) for claim in claims] == [False, False, True]


def test_worker_without_signs_of_life_asks_before_it_goes_on(url, request):
  name = request.node.name
  cut_off = open_study(url, name, 0.2)  # Its heart does not beat.
  cut_off.add(GRID[:2])
  kept, lost = cut_off.claim(2, any_two)
  cut_off._storage.set_trial_state_values(
    lost.trial_id, optuna.trial.TrialState.FAIL
  )
  time.sleep(0.3)
  cut_off.check(kept)
  with pytest.raises(studies.PointLostError):
    cut_off.check(lost)


@pytest.mark.parametrize(
  ('url', 'said'),
  [
    ('postgresql://u:secret@127.0.0.1:1/db', 'cannot be reached'),
    ('nonsense://x', 'cannot be reached'),
    ('://', 'is not the URL'),
    ('/nowhere/at/all.journal', 'cannot be opened'),
  ],
)
def test_storage_that_cannot_be_had_gets_one_line(url, said):
  with pytest.raises(UserError) as error:
    open_storage(url)
  assert said in str(error.value) and '\n' not in str(error.value)
  assert 'secret' not in str(error.value)


def test_wrong_password_is_told(database):
  user, _, rest = database.url.partition('://')[2].partition(':')
  host = rest.partition('@')[2]
  with pytest.raises(UserError, match='password authentication failed'):
    open_storage(f'postgresql://{user}:wrong@{host}')


def test_database_that_was_away_is_waited_for(database):
  naps = []

  def sleep(seconds):
    naps.append(seconds)
    if len(naps) == 2:
      database.start()

  with open_study(database.url, 'away', sleep=sleep) as study:
    study.add(GRID[:1])
    (claim,) = study.claim(1, any_two)
    database.stop()
    study.complete(claim, done(claim))
    assert len(naps) >= 2
    assert study.results()[0].state == 'complete'


@pytest.mark.parametrize(
  ('number', 'raised'),
  [
    (signal.SIGTERM, processes.TerminatedError),
    (signal.SIGINT, KeyboardInterrupt),
  ],
)
def test_signal_ends_the_wait_for_a_database(tmp_path, number, raised):
  tries = []

  def away():
    tries.append(number)
    signal.raise_signal(number)
    raise sqlalchemy.exc.OperationalError('', {}, Exception('gone'))

  with processes.StopSignals() as stop:
    stop()  # From here on a signal is only noted.
    study = open_study(f'sqlite:///{tmp_path}/db', 'x', sleep=stop.sleep)
    with pytest.raises(raised):
      study._patiently(away)
  assert tries == [number]
