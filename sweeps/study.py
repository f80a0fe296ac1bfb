"""The record of a sweep: an Optuna study that several workers share.

A point is a trial whose user attributes hold its name and settings. A worker
asks for trials, sends heartbeats while it trains them, and records their
results.
If a worker dies, its trial fails and a new trial of the point waits; the run
goes on from its checkpoint, as its folder is named by the point. Of several
trials of a point the last one counts.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import fcntl
import functools
import json
import threading
import time
import warnings

import ml_collections
import optuna
from optuna.trial import FrozenTrial, TrialState
import sqlalchemy

from configs import default
from runs import processes, progress, schema
from sweeps import points
from sweeps.points import Axes, Point, Results, Values
from vae import paths
from vae.errors import UserError, WriteError

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
# `Study` sends heartbeats itself, for several trials at a time.
warnings.filterwarnings('ignore', 'Heartbeat of storage is supposed')

# Heartbeats within the time after which a worker counts as dead.
_BEATS = 6
# A database that does not answer, as while it restarts, is retried this long.
_PATIENCE_SECONDS = 300.0
# A number that other programs do not use in the same database.
_ADVISORY_LOCK = 0x5EED
_NO_ANSWER = (
  optuna.exceptions.StorageInternalError,
  sqlalchemy.exc.OperationalError,
)


def parse_storage(storage: str) -> sqlalchemy.URL:
  """The database of `--storage`, a URL or a path; UserError if unsupported."""
  url = sqlalchemy.URL.create('sqlite', database=storage)
  if '://' in storage:
    with contextlib.suppress(sqlalchemy.exc.ArgumentError):
      url = sqlalchemy.make_url(storage)
  if url.get_backend_name() == 'sqlite' and '://' not in url.database:
    return url.set(database=str(paths.expand(url.database)))
  if url.get_backend_name() != 'postgresql':
    raise UserError(
      '--storage is not a supported database; give '
      'postgresql://USER:PASSWORD@HOST/DATABASE, or the path of an SQLite file.'
    )
  return url


@contextlib.contextmanager
def _alone(url: sqlalchemy.URL) -> Iterator[None]:
  """Excludes all other workers of a database, until left or dead."""
  if url.get_backend_name() == 'sqlite':
    with open(f'{url.database}.lock', 'ab') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      yield
    return
  engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
  with engine.connect() as connection:
    # The server frees the lock of a machine that lost its network.
    connection.exec_driver_sql(
      "set idle_in_transaction_session_timeout = '300s'; "
      f'select pg_advisory_xact_lock({_ADVISORY_LOCK})'
    )
    yield


def _requeue(study: optuna.Study, trial: FrozenTrial) -> None:
  """Adds a waiting trial of the same point."""
  attrs = trial.user_attrs
  progress.say(f'{attrs.get("name", f"trial {trial.number}")}: requeued.')
  study.add_trial(
    optuna.create_trial(
      state=TrialState.WAITING,
      params=trial.params,
      distributions=trial.distributions,
      user_attrs={k: attrs[k] for k in ('name', 'values') if k in attrs},
    )
  )


def _patient(method):
  """Retries a method of `Study` while the database does not answer."""

  @functools.wraps(method)
  def retried(self, *args, **kwargs):
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
      try:
        return method(self, *args, **kwargs)
      except _NO_ANSWER as error:
        message = f'the storage does not answer ({_reason(error)})'
      if time.monotonic() > deadline:
        raise WriteError(f'{message}; once it does, the same command goes on.')
      progress.say(f'{message}; trying again.')
      self.sleep(5)

  return retried


@dataclasses.dataclass
class Study:
  """A sweep's study and this worker's part in it; a context manager.

  Making one creates the study, or opens and extends it. It raises UserError if
  the database cannot be used, or has another sweep of this name.

  Attributes:
    url: of the database.
    name: of the study.
    base: config that the points start from.
    axes: what varies now, or varied in earlier commands, by config key.
    measured: settings of the measurements; if they change, points are measured
      again.
    objectives: `minimize` or `maximize`, by metric.
    num_points: of a search; None for a grid.
    retry_failed: whether points that failed before are queued again.
    grace_seconds: age of the last heartbeat at which a worker is dead.
    sampler, pruner: of a search.
    sleep: waits this many seconds; its exceptions end the wait.
  """

  url: sqlalchemy.URL
  name: str
  base: ml_collections.ConfigDict
  axes: Axes
  measured: Mapping[str, object]
  objectives: Mapping[str, str]
  num_points: int | None = None
  retry_failed: bool = False
  grace_seconds: int = 120
  sampler: optuna.samplers.BaseSampler | None = None
  pruner: optuna.pruners.BasePruner | None = None
  sleep: Callable[[float], None] = time.sleep

  def __post_init__(self):
    config = schema.flatten(self.base)
    self._recipe = {'num_epochs': config['train.num_epochs'], **self.measured}
    try:
      with _alone(self.url):
        self._storage = _open(self.url, self.grace_seconds)
        self._study = optuna.create_study(
          storage=self._storage,
          sampler=self.sampler,
          pruner=self.pruner or optuna.pruners.NopPruner(),
          study_name=self.name,
          directions=list(self.objectives.values()),
          load_if_exists=True,
        )
        self._definition = self._define()
        self._study.set_user_attr('sweep', self._definition)
    except UserError:
      raise
    except Exception as error:  # Of any driver.
      raise UserError(
        f'--storage={self.url.render_as_string()} cannot be used: '
        f'{_reason(error)}'
      ) from error
    # What varied in an earlier command only has the base's value.
    before = {key: [config[key]] for key in self._definition['axes']}
    self.axes = before | dict(self.axes)
    # Trials of this worker, and points that `take` did not return yet.
    self._trial_ids: set[int] = set()
    self._begun: list[Point] = []
    self._stop = threading.Event()
    self._heart = threading.Thread(target=self._beat, daemon=True)

  def _define(self) -> dict[str, object]:
    """The sweep as JSON has it, checked against the one in the database."""
    given = {
      'config': schema.flatten(schema.resolved(self.base)),
      'axes': list(self.axes),
      'search': self.num_points is not None,
      'objectives': list(self.objectives),
      'recipe': self._recipe,
    }
    given = _json(given)
    found = self._study.user_attrs.get('sweep')
    if found is None and not self._trials():
      self._study.set_metric_names(list(self.objectives))
      return given
    _check_same(given, found or {}, f'the study {self.name}')
    return found | {'recipe': given['recipe']}

  def __enter__(self):
    self._heart.start()
    return self

  def __exit__(self, *unused_args):
    self._stop.set()
    self._heart.join()
    # If the database does not answer, others find out that this worker ended.
    with contextlib.suppress(Exception), _alone(self.url):
      for trial_id in self._trial_ids:
        self._fail_and_requeue(trial_id)

  def _beat(self) -> None:
    while not self._stop.wait(self.grace_seconds / _BEATS):
      for trial_id in list(self._trial_ids):
        with contextlib.suppress(Exception):  # The database may come back.
          self._storage.record_heartbeat(trial_id)

  def _fail_and_requeue(self, trial_id: int) -> None:
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
      self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
      _requeue(self._study, self._storage.get_trial(trial_id))

  @_patient
  def take(self, limit: int) -> list[Point]:
    """Claims up to `limit` points; UserError if others extended the sweep."""
    with _alone(self.url):
      if self._study.user_attrs['sweep'] != self._definition:
        raise UserError('another worker has extended this sweep; start again.')
      optuna.storages.fail_stale_trials(self._study)
      for trial in self._trials(TrialState.RUNNING):
        # Missing only if its worker died in here, as others are excluded.
        worker = trial.user_attrs.get('worker')
        if worker is None or _is_dead(worker):
          self._fail_and_requeue(trial._trial_id)
      self._queue_open()
      while len(self._begun) < limit:
        if not self._trials(TrialState.WAITING):
          if len(self._by_name()) >= (self.num_points or 0):
            break
          self._study.enqueue_trial({})  # For the sampler.
        self._begun.append(self._begin(self._study.ask()))
    begun, self._begun = self._begun, []
    return begun

  def _queue_open(self) -> None:
    """Queues points that are missing, or are to be continued or retried."""
    known = self._by_name()
    grid = [] if self.num_points else points.grid(self.axes)
    for values in sorted(grid, key=points.program):
      if (name := self._name(values)) not in known:
        attrs = {'name': name, 'values': values}
        self._study.enqueue_trial({}, user_attrs=attrs)
    for trial in known.values():
      attrs = trial.user_attrs
      recipe = self._recipe_of(attrs['values'])
      is_open = self.retry_failed or 'error' not in attrs
      if trial.state == TrialState.COMPLETE:
        is_open = attrs.get('recipe') != recipe
      if is_open and trial.state in (TrialState.COMPLETE, TrialState.FAIL):
        _requeue(self._study, trial)
    self.retry_failed = False

  def _begin(self, trial: optuna.Trial) -> Point:
    """Signs a trial as this worker's and gives it its settings."""
    self._storage.record_heartbeat(trial._trial_id)
    trial.set_user_attr('worker', processes.this_one())
    attrs = trial.user_attrs
    values, name = attrs.get('values'), attrs.get('name')
    if values is None:
      values = {k: points.suggest(trial, k, v) for k, v in self.axes.items()}
      name = f'{trial.number:04d},{self._name(values)}'
      trial.set_user_attr('values', values)
      trial.set_user_attr('name', name)
    elif not trial.params:
      # For Optuna's own tools. Categories could not be added to.
      for key, value in values.items():
        if points.is_number(value):
          trial.suggest_float(key, value, value)
    self._trial_ids.add(trial._trial_id)
    return Point(name, points.from_json(values), trial)

  def _name(self, values: Values) -> str:
    """Name of a point, without later axes at their value of before."""
    first, before = self._definition['axes'], self._definition['config']
    is_old = lambda k: k not in first and _json(values[k]) == before.get(k)
    return points.name({k: v for k, v in values.items() if not is_old(k)})

  def _recipe_of(self, values: Values) -> dict[str, object]:
    epochs = values.get('train.num_epochs', self._recipe['num_epochs'])
    return self._recipe | {'num_epochs': epochs}

  def complete(self, point: Point, row: dict, units: dict[str, str]) -> bool:
    """Records metrics, `kl` and `active`; False if another has the point."""
    result = {'row': row, 'units': units}
    facts = {'result': result, 'recipe': self._recipe_of(point.values)}
    return self._tell(point, facts, values=[row[n] for n in self.objectives])

  def fail(self, point: Point, error: str, state=TrialState.FAIL) -> bool:
    """Records that a point failed or was pruned; as `complete`."""
    return self._tell(point, {'error': error}, state=state)

  @_patient
  def _tell(self, point: Point, facts: dict[str, object], **outcome) -> bool:
    try:
      for key, value in facts.items():
        point.trial.set_user_attr(key, value)
      self._study.tell(point.trial, **outcome)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
      trial = self._storage.get_trial(point.trial._trial_id)
      if not trial.state.is_finished():
        raise
      progress.say(f'{point.name}: another worker has taken this point over.')
      return False
    finally:
      self._trial_ids.discard(point.trial._trial_id)
    return True

  def _trials(self, *states: TrialState) -> list[FrozenTrial]:
    return self._study.get_trials(deepcopy=False, states=states or None)

  def _by_name(self) -> dict[str, FrozenTrial]:
    """The last trial of each point."""
    named = (trial for trial in self._trials() if 'name' in trial.user_attrs)
    return {trial.user_attrs['name']: trial for trial in named}

  @_patient
  def count(self, state: TrialState) -> int:
    """Number of trials in a state."""
    return len(self._trials(state))

  @_patient
  def results(self) -> Results:
    """The table of all points so far."""
    trials = self._by_name().values()
    return Results.of_trials(trials, self._definition['config'])


def _open(url: sqlalchemy.URL, grace: int) -> optuna.storages.RDBStorage:
  options = {'pool_pre_ping': True}
  if url.get_backend_name() == 'sqlite':
    options['connect_args'] = {'timeout': 60}
  return optuna.storages.RDBStorage(
    url.render_as_string(hide_password=False),
    engine_kwargs=options,
    heartbeat_interval=max(1, grace // _BEATS),
    grace_period=grace,
    heartbeat_stale_trial_callback=_requeue,
  )


def _check_same(given: Mapping, found: Mapping, where: str) -> None:
  """Raises UserError if a sweep neither is the one found nor extends it."""
  if 'recipe' not in found:
    raise UserError(
      f'{where} was not made by this version of sweep.py; name another '
      '--workdir or --study.'
    )
  # Sweeps that are older than a key had its default.
  before = _json(schema.flatten(default.get_config())) | found['config']
  free = {*given['axes'], *found['axes'], *schema.FREE_KEYS}
  pairs = {
    f'config.{key}': (before.get(key), value)
    for key, value in given['config'].items()
    if key not in free
  }
  pairs |= {key: (found[key], given[key]) for key in ('search', 'objectives')}
  was, now = (sweep['recipe']['num_epochs'] for sweep in (found, given))
  pairs['config.train.num_epochs'] = (max(was, now), now)
  for key, (was, now) in pairs.items():
    if was != now:
      raise UserError(
        f'{where} holds another sweep: {key} was {was} and is now {now}. Give '
        'the old value, or name another --workdir; settings can begin to vary '
        '(--seed, --grid), and epochs can rise.'
      )


def _is_dead(worker: Mapping) -> bool:
  is_here = worker['machine'] == processes.this_machine()
  return is_here and not processes.is_alive(worker)


def _json(value):
  return json.loads(json.dumps(value))


def _reason(error: Exception) -> str:
  cause = error.__cause__ or error
  return ' '.join(str(getattr(cause, 'orig', None) or cause).split())[:300]
