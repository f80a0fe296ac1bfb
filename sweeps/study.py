"""The record of a sweep: an Optuna study that several workers share.

A point is a trial whose user attributes hold its name and settings; its last
trial counts. A worker sends heartbeats while it trains points. If it dies, its
trials fail, which opens their points again; their runs go on from the
checkpoints, as folders are named by the points.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import fcntl
import json
import threading
import warnings

import ml_collections
import optuna
from optuna.trial import FrozenTrial, TrialState
import sqlalchemy

from runs import processes, progress, schema
from sweeps import points
from sweeps.points import Axes, Results, Values
from vae import paths
from vae.errors import UserError

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
# `Study` sends heartbeats itself, for several trials at a time.
warnings.filterwarnings('ignore', 'Heartbeat of storage is supposed')

# Heartbeats within the time after which a worker counts as dead.
_BEATS = 6
# A number that other programs do not use in the same database.
_ADVISORY_LOCK = 0x5EED
# Errors of a database that does not answer.
NO_ANSWER = (
  optuna.exceptions.StorageInternalError,
  sqlalchemy.exc.SQLAlchemyError,
)


_UNUSABLE = OSError, RuntimeError, ImportError, ValueError


def parse_storage(storage: str) -> sqlalchemy.URL:
  """The database of `--storage`, a path or a URL; UserError if unsupported."""
  if '://' not in storage:
    path = str(paths.expand(storage))
    return sqlalchemy.URL.create('sqlite', database=path)
  with contextlib.suppress(sqlalchemy.exc.ArgumentError, ValueError):
    url = sqlalchemy.make_url(storage)
    if url.get_backend_name() == 'postgresql':
      return url
  raise UserError(
    '--storage must be postgresql://USER:PASSWORD@HOST/DATABASE, or the local '
    'path of an SQLite file.'
  )


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


@dataclasses.dataclass(frozen=True)
class Point:
  """A point that this worker has taken: name, settings by key, and trial."""

  name: str
  values: Values
  trial: optuna.Trial


@dataclasses.dataclass
class Study:
  """A sweep's study and this worker's part in it; a context manager.

  Making one creates the study, or opens and extends it. It raises UserError if
  the database cannot be used, or has another sweep of this name.

  Attributes:
    axes: settings that vary, by config key; the seed is always one of them.
    measured: settings of the measurements, which are repeated if they change.
    objectives: `minimize` or `maximize`, by metric.
    num_points: of a search; None for a grid.
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

  def __post_init__(self):
    try:
      with _alone(self.url):
        self._open()
    except (*NO_ANSWER, *_UNUSABLE) as error:
      raise UserError(
        f'--storage={self.url.render_as_string()} cannot be used: '
        f'{one_line(error.__cause__ or error)}'
      ) from error
    axes = {points.SEED: [self.base.seed], **self.axes}
    # Names of points do not depend on the order of flags.
    order = lambda key: (key == points.SEED, key != points.BETA, key)
    self.axes = {key: axes[key] for key in sorted(axes, key=order)}
    # Failed trials before this number are tried again.
    self._first_trial = len(self._trials()) if self.retry_failed else 0
    self._trial_ids: set[int] = set()
    self._stop = threading.Event()
    self._heart = threading.Thread(target=self._beat, daemon=True)

  def _open(self) -> None:
    options = {'pool_pre_ping': True}
    if self.url.get_backend_name() == 'sqlite':
      options['connect_args'] = {'timeout': 60}
    self._storage = optuna.storages.RDBStorage(
      self.url.render_as_string(hide_password=False),
      engine_kwargs=options,
      heartbeat_interval=max(1, self.grace_seconds // _BEATS),
      grace_period=self.grace_seconds,
    )
    self._study = optuna.create_study(
      storage=self._storage,
      sampler=self.sampler,
      study_name=self.name,
      directions=list(self.objectives.values()),
      load_if_exists=True,
    )
    found = self._study.user_attrs.get('sweep', {})
    self._definition = self._define()
    if found or self._trials():
      _check_same(self._definition, found, f'the study {self.name}')
      self._definition['fixed'] = found['fixed']
    else:
      self._study.set_metric_names(list(self.objectives))
    self._study.set_user_attr('sweep', self._definition)

  def _define(self) -> dict[str, dict]:
    """The fixed settings, and the recipe that reopens points; as JSON."""
    flat = schema.flatten(schema.resolved(self.base))
    free = {*self.axes, *schema.FREE_KEYS}
    fixed = {f'config.{k}': v for k, v in flat.items() if k not in free}
    fixed['axes'] = sorted(self.axes.keys() - {points.SEED})
    fixed['search'] = self.num_points is not None
    fixed['objectives'] = list(self.objectives)
    recipe = {'num_epochs': self.base.train.num_epochs, **self.measured}
    return json.loads(json.dumps({'fixed': fixed, 'recipe': recipe}))

  def __enter__(self):
    self._heart.start()
    return self

  def __exit__(self, *unused_args):
    self._stop.set()
    self._heart.join()
    # If the database does not answer, others find out that this worker ended.
    with contextlib.suppress(Exception), _alone(self.url):
      for trial_id in self._trial_ids:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
          self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

  def _beat(self) -> None:
    while not self._stop.wait(self.grace_seconds / _BEATS):
      for trial_id in list(self._trial_ids):
        with contextlib.suppress(Exception):  # The database may come back.
          self._storage.record_heartbeat(trial_id)

  def take(self, limit: int) -> list[Point]:
    """Claims up to `limit` points; UserError if others extended the sweep."""
    with _alone(self.url):
      if self._study.user_attrs['sweep'] != self._definition:
        raise UserError('another worker has extended this sweep; start again.')
      optuna.storages.fail_stale_trials(self._study)
      for trial in self._trials(TrialState.RUNNING):
        # Missing only if its worker died in here, as others are excluded.
        worker = trial.user_attrs.get('worker')
        if worker is None or (
          worker['machine'] == processes.this_machine()
          and not processes.is_alive(worker)
        ):
          self._study.tell(trial.number, state=TrialState.FAIL)
      opened = list(self._open_points().items())[:limit]
      taken = [self._begin(name, values) for name, values in opened]
      missing = (self.num_points or 0) - len(self._by_name())
      chosen = range(min(limit - len(taken), missing))
      return taken + [self._begin() for _ in chosen]

  def _open_points(self) -> dict[str, Values]:
    """Settings, by name, of points to begin, continue, retry or measure again.

    Points of one program follow each other.
    """
    known = self._by_name()
    found = {name: trial.user_attrs['values'] for name, trial in known.items()}
    if not self.num_points:
      found |= {self._name(v): v for v in points.grid(self.axes)}
    for name, trial in known.items():
      attrs = trial.user_attrs
      is_open = attrs.get('recipe') != self._definition['recipe']
      if trial.state == TrialState.FAIL:
        # Without an error its worker ended.
        is_open = 'error' not in attrs or trial.number < self._first_trial
      if trial.state == TrialState.RUNNING or not is_open:
        del found[name]
    found = {name: points.from_json(values) for name, values in found.items()}
    return dict(sorted(found.items(), key=lambda i: points.program(i[1])))

  def _begin(self, name: str = '', values: Values | None = None) -> Point:
    """Begins a trial of a point, by default of one that the sampler chooses."""
    last = self._by_name().get(name)
    trial = self._study.ask()
    self._storage.record_heartbeat(trial._trial_id)
    if values is None:
      values = {k: points.suggest(trial, k, v) for k, v in self.axes.items()}
      name = f'{trial.number:04d},{self._name(values)}'
    for key, kind in (last.distributions if last else {}).items():
      value = kind.to_internal_repr(last.params[key])
      self._storage.set_trial_param(trial._trial_id, key, value, kind)
    # The name last: a trial that has one is complete, even after a kill.
    attrs = {'values': values, 'worker': processes.this_one(), 'name': name}
    for key, value in attrs.items():
      trial.set_user_attr(key, value)
    self._trial_ids.add(trial._trial_id)
    return Point(name, values, trial)

  def _name(self, values: Values) -> str:
    """Name of a point, without the seed that the sweep had before others."""
    first = self._definition['fixed'].get(f'config.{points.SEED}')
    is_first = lambda key: key == points.SEED and values[key] == first
    return points.name({k: v for k, v in values.items() if not is_first(k)})

  def record(self, point: Point, **facts) -> bool:
    """Records the end of a point; False if another worker has taken it over.

    The facts are its `error`, or else `row`, with metrics, `kl` and `active`,
    and `units` of the metrics.
    """
    trial, outcome = point.trial, {'state': TrialState.FAIL}
    if 'row' in facts:
      facts['recipe'] = self._definition['recipe']
      outcome = {'values': [facts['row'][name] for name in self.objectives]}
    with _alone(self.url):
      frozen = self._storage.get_trial(trial._trial_id)
      is_mine = not frozen.state.is_finished()
      if is_mine:
        for key, value in facts.items():
          trial.set_user_attr(key, value)
        self._study.tell(trial, **outcome)
      else:
        progress.say(f'{point.name}: another worker has taken this point over.')
    self._trial_ids.discard(trial._trial_id)
    return is_mine

  def _trials(self, *states: TrialState) -> list[FrozenTrial]:
    return self._study.get_trials(deepcopy=False, states=states or None)

  def _by_name(self) -> dict[str, FrozenTrial]:
    """The last trial of each point."""
    named = (trial for trial in self._trials() if 'name' in trial.user_attrs)
    return {trial.user_attrs['name']: trial for trial in named}

  def results(self) -> Results:
    """The table of all points so far."""
    waiting, units = self._open_points(), {}
    rows = [
      {'point': name, 'state': 'waiting', 'error': '', **values}
      for name, values in waiting.items()
    ]
    for name, trial in self._by_name().items():
      attrs, state = trial.user_attrs, trial.state.name.lower()
      units |= attrs.get('units', {})
      if name not in waiting:
        row = points.from_json(attrs['values']) | attrs.get('row', {})
        row |= {'point': name, 'error': attrs.get('error', '')}
        rows.append(row | {'state': state.replace('fail', 'failed')})
    return Results.of(rows, list(self.axes), units)


def _check_same(given: Mapping, found: Mapping, where: str) -> None:
  """Raises UserError if a sweep neither is the one found nor extends it."""
  if 'fixed' not in found:
    raise UserError(
      f'{where} was not made by this version of sweep.py; name another '
      '--workdir or --study.'
    )
  was, now = (sweep['recipe']['num_epochs'] for sweep in (found, given))
  pairs = [('config.train.num_epochs', max(was, now), now)]
  for key, value in given['fixed'].items():
    pairs.append((key, found['fixed'].get(key, value), value))
  for key, was, now in pairs:
    if was != now:
      raise UserError(
        f'{where} holds another sweep: {key} was {was} and is now {now}. Give '
        'the old value, or name another --workdir; values, seeds and epochs '
        'can be added.'
      )


def one_line(error: BaseException) -> str:
  """A message, after the type of an error that is not a UserError."""
  kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
  return kind + ' '.join(str(error).split())[:500]
