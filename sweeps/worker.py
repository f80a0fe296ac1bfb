"""A worker of a sweep: takes points, trains and measures them, tells of it."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import math
import time

from etils import epath
import jax
import ml_collections
import optuna
import psutil

from evaluation import measure
from runs import metric_writer
from runs import progress
from runs import schema
from runs import workdir_lock
from runs import workdirs
from runs.processes import StopSignals
from sweeps import disk
from sweeps import measuring
from sweeps import points
from sweeps.point_writer import PointWriter
from sweeps.points import Range
from sweeps.points import Values
from sweeps.results import Result
from sweeps.results_writer import ResultsWriter
from sweeps.study import Claim
from sweeps.study import PointLostError
from sweeps.study import Study
import train
from vae import checkpoints
from vae import population
from vae import splits
from vae.errors import UserError
from vae.errors import WriteError

# Members of a population on each device, at most, where the user leaves it to
# the program.
_MEMBERS_PER_DEVICE = 8

# Between two looks at what other workers do.
_POLL_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a sweep is.

  Attributes:
    base: the config that its points start from.
    grid: the settings of its points; empty in a search.
    space: where a search looks, by config key.
    num_points: of a search.
    population: runs that are trained together; 0 leaves it to the program.
    split: that the points are measured on.
    measurements: what is measured beyond the summary; no groups for nothing.
  """

  base: ml_collections.ConfigDict
  grid: Sequence[Values]
  space: Mapping[str, list[object] | Range]
  num_points: int
  population: int
  split: str
  measurements: measure.Settings


class Data:
  """The data of the points, read once for all that have the same."""

  def __init__(
    self,
    load: Callable[[ml_collections.ConfigDict], splits.DataSet],
    config: ml_collections.ConfigDict | None = None,
  ):
    """Takes what gives the data of a config, and reads that of a first."""
    self._load = load
    self._config, self._data = None, None
    if config is not None:
      self.of(config)

  def of(self, config: ml_collections.ConfigDict) -> splits.DataSet:
    """The data of a config."""
    data_config = config.data.to_dict()
    if self._config != data_config:
      # Let go of what was there before what is to come is read.
      self._config = self._data = None
      self._data = self._load(config)
      self._config = data_config
    return self._data


class Worker:
  """Takes points until none is left, and then writes what came of all."""

  def __init__(
    self,
    plan: Plan,
    folder: epath.Path,
    study: Study,
    data: Data,
    stop: StopSignals,
    retry_failed: bool = False,
  ):
    """Takes what it works on.

    Args:
      plan: of the sweep.
      folder: of the sweep; its points have folders in it.
      study: the record, that other workers share.
      data: of its points.
      stop: asked between steps, and between points.
      retry_failed: whether points that failed before are tried again.
    """
    self._plan, self._folder, self._study = plan, folder, study
    self._data, self._stop = data, stop
    self._retry_failed = retry_failed
    self._training_seconds = 0.0
    self._writer = ResultsWriter(folder, plan.base, plan.split)
    # Points of this worker whose folders are in use by others.
    self._in_use: list[Claim] = []
    self._told_in_use: set[str] = set()
    # Where a point's program is shared, it has room for the largest there is.
    dims = [values.get('model.latent_dim', 0) for values in plan.grid]
    choices = plan.space.get('model.latent_dim', [0])
    dims += [choices.high] if isinstance(choices, Range) else choices
    self._latent_dim = max(dims) or plan.base.model.latent_dim

  def run(self) -> list[Result]:
    """Works until every point of the sweep is done, by whomever.

    Returns:
      What came of each.
    """
    if self._plan.grid:
      self._study.add(self._plan.grid, self._retry_failed)
    said, others_end_it = '', False
    try:
      while True:
        self._stop.raise_if_received()
        for name in self._study.give_back_those_of_the_dead():
          progress.say(f'{name}: its worker died; point requeued.')
        if claims := self._take():
          said, others_end_it = '', False
          self._work(claims)
          continue
        if self._in_use:
          self._stop.sleep(_POLL_SECONDS)
          claims, self._in_use = self._in_use, []
          self._work(claims)
          said, others_end_it = '', False
          continue
        running = self._study.num_running()
        if not running and not self._study.num_waiting():
          break
        if self._plan.grid:
          # Of a point whose worker died, and then the one that noticed.
          self._study.add(self._plan.grid)
        now = f'waiting for {running} points that other workers have.'
        if now != said:
          progress.say(now)
        said, others_end_it = now, True
        self._stop.sleep(_POLL_SECONDS)
    finally:
      self._study.give_back()
    results = self._study.results()
    if not others_end_it:
      self._writer.write_patiently(results, self._stop.sleep)
    self._tell_time()
    return results

  def _take(self) -> list[Claim]:
    size = self._population_size()
    if not self._plan.space:
      return self._study.claim(size, self._go_together)
    claims = []
    while len(claims) < size:
      claim = self._study.ask(self._plan.space, self._plan.num_points)
      if claim is None:
        break
      claims.append(claim)
    return claims

  def _population_size(self) -> int:
    """How many points to take now."""
    most = self._plan.population
    if most:
      return most
    most = _MEMBERS_PER_DEVICE * jax.local_device_count()
    if self._plan.space:
      # A sampler learns from those that are done.
      return min(most, max(1, self._plan.num_points // 8))
    # All of one size, so that one program serves all; and some for the others.
    waiting = max(self._study.num_waiting(), 1)
    waiting = math.ceil(waiting / (1 + self._study.num_other_workers()))
    return math.ceil(waiting / math.ceil(waiting / most))

  def _go_together(self, first: Values, second: Values) -> bool:
    return self._program(first) == self._program(second)

  def _program(self, values: Values) -> dict[str, object]:
    """What the members of a population have in common."""
    config = schema.flatten(self._plan.base) | values
    for key in population.FREE_KEYS:
      config.pop(key)
    return config

  def _work(self, claims: list[Claim]) -> None:
    """Trains and measures points; those that go together at once."""
    groups = {}
    for claim in claims:
      # Where a worker died while it saved, some are a step ahead.
      step = checkpoints.Checkpoints(self._folder_of(claim)).latest_step()
      key = repr((sorted(self._program(claim.values).items()), step))
      groups.setdefault(key, []).append(claim)
    for group in groups.values():
      self._train(group)

  def _folder_of(self, claim: Claim) -> epath.Path:
    return self._folder / points.FOLDER / claim.name

  def _train(self, claims: list[Claim]) -> None:
    with contextlib.ExitStack() as locks:
      # Before a folder is opened that another worker may write.
      claims = [
        claim
        for claim in claims
        if self._study.owns(claim) and self._lock(claim, locks)
      ]
      again = self._try(claims) if claims else []
    # Not while the error holds on to what filled the memory.
    for claims in again:
      self._work(claims)

  def _lock(self, claim: Claim, locks: contextlib.ExitStack) -> bool:
    """Keeps other runs out of a point's folder, until the stack is left.

    Where one is in it, a user's own or that of a worker that was taken for
    dead, the point is left for later.
    """
    folder = self._folder_of(claim)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      locks.enter_context(workdir_lock.hold(folder))
    except workdir_lock.InUseError as error:
      self._in_use.append(claim)
      if claim.name not in self._told_in_use:
        self._told_in_use.add(claim.name)
        progress.say(
          f'{claim.name}: its folder is in use by {error.holder}; the point is '
          'left for later.',
        )
      return False
    except OSError as error:
      raise self._unwritten(claim, error) from error
    return True

  def _try(self, claims: list[Claim]) -> list[list[Claim]]:
    """Trains and measures points together; returns what to try by itself."""
    progress.say(f'\n{self._heading(claims)}')
    again = []
    try:
      with contextlib.ExitStack() as stack:
        runs = [self._begin(claim, stack) for claim in claims]
        data = self._data.of(runs[0].config)
        first_step = checkpoints.Checkpoints(runs[0].workdir).latest_step() or 0
        errors = self._train_runs(runs, data)
      self._stop.raise_if_received()
      _, seconds = measuring.speed(runs[0], first_step)
      self._training_seconds += seconds
    except PointLostError as error:
      _tell_of_loss(error)
      again = [claims]
    except optuna.TrialPruned as pruned:
      progress.say(f'{claims[0].name}: pruned, {pruned}')
      try:
        self._study.prune(claims[0], str(pruned))
      except PointLostError as error:
        _tell_of_loss(error)
    except Exception as error:
      if disk.is_at_fault(error):
        raise self._unwritten(claims[0], error) from error
      if len(claims) > 1:
        # One of them may be at fault, or all be too much for the memory.
        progress.say(f'{_one_line(error)}\nTrying them in two halves.')
        half = len(claims) // 2
        again = [claims[:half], claims[half:]]
      else:
        self._fail(claims[0], error)
    else:
      for claim, run, error in zip(claims, runs, errors, strict=True):
        self._stop.raise_if_received()
        if error is None:
          self._finish(claim, run, data)
        else:
          self._fail(claim, error)
      self._writer.write_if_cheap(self._study.results())
    return again

  def _heading(self, claims: list[Claim]) -> str:
    done = len([r for r in self._study.results() if r.state == 'complete'])
    total = len(self._plan.grid) or self._plan.num_points
    names = '; '.join(claim.name for claim in claims)
    together = f' {len(claims)} points together:' if len(claims) > 1 else ''
    return f'[{done} of {total} points done]{together} {names}'

  def _begin(self, claim: Claim, stack: contextlib.ExitStack) -> train.Run:
    """The run of a point, whose writer the stack closes."""
    config = points.configure(self._plan.base, claim.values)
    folder = self._folder_of(claim)
    workdirs.check_writable(folder, '--workdir')
    workdirs.check(config, folder)
    writer = metric_writer.MetricWriter(folder)
    stack.callback(writer.close)
    return train.Run(config, folder, PointWriter(writer, self._study, claim))

  def _train_runs(
    self, runs: list[train.Run], data: splits.DataSet
  ) -> list[UserError | None]:
    """Together, or the one by itself, its batch over all devices.

    Returns:
      What ended each before the others, if anything did.
    """
    run = runs[0]
    divides = run.config.train.batch_size % jax.device_count() == 0
    if len(runs) == 1 and divides:
      train.train_and_evaluate(
        run.config, run.workdir, data, run.writer, self._stop
      )
      return [None]
    return train.train_population(runs, data, self._latent_dim, self._stop)

  def _finish(self, claim: Claim, run: train.Run, data: splits.DataSet) -> None:
    """Measures a point and records it."""
    try:
      metrics, dimensions = measuring.measure_run(
        run,
        data,
        self._plan.split,
        self._plan.measurements,
        self._latent_dim,
        self._study.objectives,
      )
      result = Result(
        claim.name,
        claim.values,
        'complete',
        {name: metric.value for name, metric in metrics.items()},
        {name: metric.unit for name, metric in metrics.items()},
        **dimensions,
      )
      self._study.complete(claim, result)
    except PointLostError as error:
      _tell_of_loss(error)
    except Exception as error:
      if disk.is_at_fault(error):
        raise self._unwritten(claim, error) from error
      self._fail(claim, error)
    else:
      progress.say(
        f'{claim.name}: rate {result.metrics["rate"]:.2f}, distortion '
        f'{result.metrics["distortion"]:,.1f} nats, '
        f'{result.metrics["active_units"]:.0f} active units',
      )

  def _unwritten(self, claim: Claim, error: Exception) -> WriteError:
    """What ends this worker: its other points would fail alike.

    All that it has wait again.
    """
    return disk.told(
      error,
      self._folder_of(claim),
      'Nothing that is saved is lost; once it can be, the same command goes '
      'on.',
    )

  def _fail(self, claim: Claim, error: Exception) -> None:
    message = _one_line(error)
    progress.say(f'{claim.name}: failed, {message}')
    try:
      self._study.fail(claim, message)
    except PointLostError as lost:
      _tell_of_loss(lost)

  def _tell_time(self) -> None:
    # All of it: the time that it took to start, too.
    seconds = time.time() - psutil.Process().create_time()
    if self._training_seconds:
      progress.say(
        f'This worker took {progress.duration(seconds)}, '
        f'{self._training_seconds / seconds:.0%} of it in training steps.'
      )


def _tell_of_loss(lost: PointLostError) -> None:
  progress.say(f'{lost}: another worker has taken this point over.')


def _one_line(error: Exception) -> str:
  text = ' '.join(str(error).split())[:500]
  if isinstance(error, UserError):
    return text
  return f'{type(error).__name__}: {text}' if text else type(error).__name__
