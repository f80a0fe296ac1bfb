"""The record of a sweep, an Optuna study that several workers share.

A point is a trial. A grid's points wait in the study from the start; a worker
takes one by changing its state, which the storage lets one worker do. (Optuna's
own GridSampler may give two workers the same point.) While it is trained a
worker keeps counting in it. Where the count stands still for too long, or the
worker was a process of this machine that is no more, another worker declares
the trial failed, and its point waits again in a trial of its own. Of several
living trials of a point, which workers that begin at the same moment may make,
the first counts.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import time
from typing import Any

import optuna
from optuna import exceptions
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
import sqlalchemy

from runs import processes
from sweeps import definition as definitions
from sweeps import liveness
from sweeps import points
from sweeps import trials
from sweeps.heart import Heart
from sweeps.points import Range
from sweeps.points import Values
from sweeps.results import Result
from vae.errors import UserError
from vae.errors import WriteError

# Why a failed trial says nothing about its point.
_LOST, _SUPERSEDED = 'worker lost', 'superseded'

# A database that is away, as when it is restarted, is waited for so long.
_PATIENCE = 300.0

# What validation calls the objectives that points can be pruned by; its mse is
# that with z drawn, and orders points much as that of the mean does.
VALIDATION_METRICS = {
  'rate': 'val/kl',
  'distortion': 'val/distortion',
  'elbo': 'val/elbo',
  'mse_of_mean': 'val/mse',
}


class PointLostError(Exception):
  """Another worker took a point, as this one seemed dead."""


@dataclasses.dataclass(frozen=True)
class Claim:
  """A point that this worker has.

  Attributes:
    number: of the trial.
    trial_id: of the trial, in the storage.
    values: settings by config key.
    name: of the point.
    trial: to report to, in a search.
  """

  number: int
  trial_id: int
  values: Values
  name: str
  trial: optuna.Trial | None = None


class Study:
  """A sweep's study, and this worker's part in it; a context manager."""

  def __init__(
    self,
    storage: optuna.storages.BaseStorage,
    name: str,
    definition: Mapping[str, object],
    objectives: Mapping[str, str],
    grace_seconds: float,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    sleep: Callable[[float], None] = time.sleep,
  ):
    """Creates the study, or opens it.

    Args:
      storage: of the study.
      name: of the study.
      definition: what the sweep is, as JSON has it.
      objectives: `minimize` or `maximize`, by the name of the metric.
      grace_seconds: how long a worker without a sign of life is not dead.
      sampler: of a search.
      pruner: of a search.
      sleep: waits for so many seconds; what it raises ends the waiting.

    Raises:
      UserError: if there is a study of that name that is another sweep.
    """
    self._storage = storage
    self._sleep = sleep
    self.objectives = dict(objectives)
    try:
      self._study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=list(objectives.values()),
        sampler=sampler,
        pruner=pruner,
        load_if_exists=True,
      )
      definition = json.loads(json.dumps(definition))
      found = self._study.user_attrs.get('definition')
      if found is None:
        self._study.set_metric_names(list(objectives))
        self._study.set_user_attr('definition', definition)
        found = self._study.user_attrs['definition']
    except (
      sqlalchemy.exc.SQLAlchemyError,
      exceptions.StorageInternalError,
      OSError,  # Of a journal.
    ) as error:
      raise UserError(
        f'the study {name} cannot be written: {_first_line(error)}'
      ) from error
    definitions.check_same(definition, found, f'the study {name}')
    self._begun = time.time()
    # `None` prunes nothing, and need not be told how a point is doing.
    self._prunes = pruner is not None
    self._watch = liveness.Watch(grace_seconds)
    self._heart = Heart(storage, grace_seconds)

  def __enter__(self):
    self._heart.start()
    return self

  def __exit__(self, *unused_args):
    self._heart.stop()

  def check(self, claim: Claim) -> None:
    """Whether a point is still this worker's.

    Raises:
      PointLostError: if not.
    """
    is_lost = claim.trial_id in self._heart.lost
    # Others may have had reason to take this worker for dead.
    if is_lost or (self._heart.seems_dead() and not self.owns(claim)):
      raise PointLostError(claim.name)

  def owns(self, claim: Claim) -> bool:
    """Asks the storage whether a point is this worker's."""
    trial = self._patiently(self._storage.get_trial, claim.trial_id)
    return (
      trial.state == TrialState.RUNNING
      and trial.user_attrs.get('worker') == processes.this_one()
    )

  def _patiently(self, function: Callable[..., Any], *args, **kwargs) -> Any:
    """Calls a function, and again while the database is away."""
    start, pause = time.monotonic(), 0.5
    while True:
      try:
        return function(*args, **kwargs)
      except (
        exceptions.StorageInternalError,
        sqlalchemy.exc.OperationalError,
        OSError,  # Of a journal.
      ) as error:
        if time.monotonic() - start > _PATIENCE:
          # Without its cause, as it is no file of a point.
          raise WriteError(
            f'the storage is away: {_first_line(error)} The same command goes '
            'on once it is back.'
          ) from None
        print(
          f'the storage is away, trying again in {pause:.0f} s.', flush=True
        )
        self._sleep(pause)
        pause = min(2 * pause, 30)
        # Nobody could give a sign of life in the meantime.
        self._watch.forget()

  def report(self, claim: Claim, scalars: Mapping[str, float]) -> None:
    """Tells the pruner of a search how a point is doing.

    Args:
      claim: the point.
      scalars: metrics of a validation, such as `val/kl`, and its `epoch`.

    Raises:
      optuna.TrialPruned: if it is not worth going on.
    """
    if not self._prunes:
      return
    (objective,) = self.objectives
    value, epoch = scalars[VALIDATION_METRICS[objective]], scalars['epoch']
    self._patiently(claim.trial.report, value, epoch)
    if self._patiently(claim.trial.should_prune):
      raise optuna.TrialPruned(f'after epoch {epoch}')

  def add(self, grid: Sequence[Values], retry: bool = False) -> None:
    """Has the points wait that are missing in the study.

    Args:
      grid: all points.
      retry: also those that failed before this worker began.
    """
    known = self._by_name()
    distributions = {
      key: CategoricalDistribution(
        list(dict.fromkeys(trials.plain(values[key]) for values in grid))
      )
      for key in grid[0]
    }
    for values in grid:
      trial = known.get(points.name(values))
      attrs = {'name': points.name(values), 'values': values}
      if trial is not None:
        has_failed = (
          trial.user_attrs.get('failed_at', self._begun) < self._begun
        )
        if not retry or not has_failed or trial.state != TrialState.FAIL:
          continue
        attrs['again'] = True
      self._patiently(
        self._study.add_trial,
        optuna.create_trial(
          state=TrialState.WAITING,
          params={key: trials.plain(value) for key, value in values.items()},
          distributions=distributions,
          user_attrs=attrs,
        ),
      )

  def _trials(self) -> list[optuna.trial.FrozenTrial]:
    """All that count, in order."""
    return [
      trial
      for trial in self._patiently(self._study.get_trials, deepcopy=False)
      if not trials.is_void(trial)
      # Being made by a worker's sampler at this moment.
      and 'name' in trial.user_attrs
    ]

  def _by_name(self) -> dict[str, optuna.trial.FrozenTrial]:
    """The trial that counts of each point."""
    found = {}
    for trial in self._trials():
      earlier = found.setdefault(trial.user_attrs['name'], trial)
      if earlier.state == TrialState.FAIL and 'again' in trial.user_attrs:
        found[trial.user_attrs['name']] = trial
    return found

  def claim(
    self, limit: int, together: Callable[[Values, Values], bool]
  ) -> list[Claim]:
    """Takes points that wait.

    Args:
      limit: how many at most.
      together: whether the second point may be trained with the first.
    """
    claims = []
    for trial in self._trials():
      if len(claims) == limit:
        break
      if trial.state != TrialState.WAITING:
        continue
      values = trials.values(trial)
      if claims and not together(claims[0].values, values):
        continue
      name = trial.user_attrs['name']
      claim = Claim(trial.number, trial._trial_id, values, name)
      if not self._take(claim):
        continue
      counts = self._by_name().get(name)
      if counts is not None and counts.number == claim.number:
        claims.append(claim)
      else:
        self._void(claim)
    return claims

  def _take(self, claim: Claim) -> bool:
    """Whether this worker, of all that may try, has a point now."""
    try:
      is_taken = self._patiently(
        self._storage.set_trial_state_values,
        claim.trial_id,
        TrialState.RUNNING,
      )
      if is_taken:
        self._sign(claim)
      return is_taken
    except exceptions.UpdateFinishedTrialError:
      return False  # Another took it, and is done already.

  def _sign(self, claim: Claim) -> None:
    """Says whose a point is, and begins to give signs of life for it."""
    self._patiently(
      self._storage.set_trial_user_attr,
      claim.trial_id,
      'worker',
      processes.this_one(),
    )
    self._heart.beat_for(claim.trial_id)

  def ask(
    self, space: Mapping[str, list[object] | Range], num_points: int
  ) -> Claim | None:
    """Takes the next point of a search; None where there are enough."""
    if len(self._trials()) >= num_points and not self.num_waiting():
      return None
    trial = self._patiently(self._study.ask)
    values = {
      key: self._patiently(trials.suggest, trial, key, choices)
      for key, choices in space.items()
    }
    # One that was begun before has its name already.
    name = trial.user_attrs.get('name')
    name = name or f'{trial.number:04d},{points.name(values)}'
    claim = Claim(trial.number, trial._trial_id, values, name, trial)
    self._sign(claim)
    self._patiently(trial.set_user_attr, 'values', values)
    self._patiently(trial.set_user_attr, 'name', name)
    earlier = [t for t in self._trials() if t.number < trial.number]
    if len(earlier) >= num_points:
      self._void(claim)
      return None
    return claim

  def _void(self, claim: Claim) -> None:
    """Has a trial not count: the point has another, or is one too many."""
    self._heart.forget(claim.trial_id)
    with contextlib.suppress(exceptions.UpdateFinishedTrialError):
      self._patiently(
        self._storage.set_trial_user_attr, claim.trial_id, 'void', _SUPERSEDED
      )
      self._patiently(
        self._storage.set_trial_state_values, claim.trial_id, TrialState.FAIL
      )

  def complete(self, claim: Claim, result: Result) -> None:
    """Records what a point came to.

    Raises:
      PointLostError: if another worker has taken the point.
    """
    values = [result.metrics[name] for name in self.objectives]
    content = dataclasses.asdict(result)
    facts = {key: content[key] for key in ('metrics', 'units', 'kl', 'active')}
    # In one piece: each write waits for the disk.
    self._finish(claim, {'result': facts}, values=values)

  def fail(self, claim: Claim, error: str) -> None:
    """Records that a point failed, and why."""
    facts = {'error': error, 'failed_at': time.time()}
    self._finish(claim, facts, state=TrialState.FAIL)

  def prune(self, claim: Claim, why: str) -> None:
    """Records that a point of a search was not worth its end."""
    self._finish(claim, {'error': why}, state=TrialState.PRUNED)

  def _finish(self, claim: Claim, facts: dict[str, Any], **outcome) -> None:
    try:
      for key, value in facts.items():
        self._patiently(
          self._storage.set_trial_user_attr, claim.trial_id, key, value
        )
      self._patiently(self._study.tell, claim.number, **outcome)
    except exceptions.UpdateFinishedTrialError as error:
      raise PointLostError(claim.name) from error
    except ValueError as error:  # As `tell` says it.
      if self._storage.get_trial(claim.trial_id).state == TrialState.RUNNING:
        raise
      raise PointLostError(claim.name) from error
    finally:
      self._heart.forget(claim.trial_id)

  def give_back(self) -> None:
    """Lets all points of this worker wait again, for it or another."""
    for trial_id in self._heart.trial_ids():
      self._heart.forget(trial_id)
      # Where it cannot be said now, others find out.
      with contextlib.suppress(Exception):
        # The next owner is not to be taken for this one, who may be dead.
        for key in ('worker', 'heartbeat'):
          self._storage.set_trial_user_attr(trial_id, key, None)
        self._storage.set_trial_state_values(trial_id, TrialState.WAITING)

  def give_back_those_of_the_dead(self) -> list[str]:
    """Lets points wait again whose worker is no more; returns their names."""
    names = []
    for trial in self._trials():
      if trial.state != TrialState.RUNNING or not self._is_dead(trial):
        continue
      trial_id, attrs = trial._trial_id, trial.user_attrs
      try:
        self._patiently(
          self._storage.set_trial_user_attr, trial_id, 'void', _LOST
        )
        self._patiently(
          self._storage.set_trial_state_values, trial_id, TrialState.FAIL
        )
      except exceptions.UpdateFinishedTrialError:
        continue  # Another was faster, or it was not dead.
      kept = ('name', 'values', 'again')
      self._patiently(
        self._study.add_trial,
        optuna.create_trial(
          state=TrialState.WAITING,
          params=trial.params,
          distributions=trial.distributions,
          user_attrs={key: attrs[key] for key in kept if key in attrs},
        ),
      )
      names.append(attrs['name'])
    return names

  def _is_dead(self, trial: optuna.trial.FrozenTrial) -> bool:
    attrs = trial.user_attrs
    return trial._trial_id not in self._heart.trial_ids() and (
      self._watch.is_dead(
        trial._trial_id, attrs.get('worker'), attrs.get('heartbeat')
      )
    )

  def has_results(self) -> bool:
    """Whether some point is complete."""
    return self._count(TrialState.COMPLETE) > 0

  def num_waiting(self) -> int:
    """Points that nobody has."""
    return self._count(TrialState.WAITING)

  def num_running(self) -> int:
    """Points that some worker has."""
    return self._count(TrialState.RUNNING)

  def num_other_workers(self) -> int:
    """Workers that have points, without this one."""
    workers = {
      (worker['machine'], worker['pid'])
      for trial in self._by_name().values()
      if trial.state == TrialState.RUNNING
      and (worker := trial.user_attrs.get('worker'))
      and worker != processes.this_one()
    }
    return len(workers)

  def _count(self, state: TrialState) -> int:
    return sum(t.state == state for t in self._by_name().values())

  def results(self) -> list[Result]:
    """What is known of each point, in the order of the points."""
    return [trials.result(name, t) for name, t in self._by_name().items()]


def _first_line(error: Exception) -> str:
  cause = error.__cause__ or error
  text = str(getattr(cause, 'orig', None) or cause)
  return text.strip().split('\n')[0]
