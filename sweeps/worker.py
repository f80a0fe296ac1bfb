"""A worker of a sweep: takes points, trains and measures them."""

import contextlib
import dataclasses
import errno
import math
import time

from etils import epath
import jax
import ml_collections
import optuna
from optuna.trial import TrialState

from evaluation import measure
import input_pipeline
from runs import metric_writer, progress, workdirs
from runs.processes import StopSignals
from sweeps import measuring, points, report
from sweeps.points import Point, Results, VALIDATION_METRICS
from sweeps.study import Study
import train
from vae import splits
from vae.checkpoints import Checkpoints
from vae.errors import UserError, WriteError

_SECONDS_BETWEEN_POLLS = 2.0
# The page takes seconds; the table is written after every point.
_SECONDS_BETWEEN_PAGES = 300.0

# Errors of a disk, with which the next point would fail as well.
_DISK_ERRORS = 'EACCES EDQUOT EFBIG EIO ENOSPC EPERM EROFS ESTALE'.split()


_data: dict[str, splits.DataSet] = {}


def load_data(config: ml_collections.ConfigDict) -> splits.DataSet:
  """The data of a config; the last is kept for points that share it."""
  key = str(config.data)
  if key not in _data:
    _data.clear()  # Frees the memory before more is loaded.
    _data[key] = input_pipeline.load(config)
  return _data[key]


class _Writer(metric_writer.MetricWriter):
  """A run's metric writer that asks the pruner of the sweep."""

  def __init__(self, folder: epath.Path, trial: optuna.Trial, objective: str):
    super().__init__(folder)
    self._trial, self._metric = trial, VALIDATION_METRICS[objective]

  def write_scalars(self, step, scalars):
    """Raises optuna.TrialPruned if the point is not worth its end."""
    super().write_scalars(step, scalars)
    if self._metric in scalars:
      self._trial.report(scalars[self._metric], int(scalars['epoch']))
      if self._trial.should_prune():
        raise optuna.TrialPruned(f'pruned after epoch {scalars["epoch"]:g}')


@dataclasses.dataclass
class Worker:
  """Works until every point of the sweep is done.

  Attributes:
    folder: workdir of the sweep.
    study: its record, which other workers share.
    base: config that points start from.
    split: that points are measured on.
    measurements: what is measured besides the summary.
    stop: ends training and waiting.
  """

  folder: epath.Path
  study: Study
  base: ml_collections.ConfigDict
  split: str
  measurements: measure.Settings
  stop: StopSignals

  def __post_init__(self):
    # Models are padded to the largest, so that they share programs.
    dims = self.study.axes.get(points.LATENT_DIM)
    if isinstance(dims, points.Range):
      dims = [dims.high]
    self._latent_dim = max(dims or [self.base.model.get('latent_dim', 0)])
    self._prunes = self.study.pruner is not None
    # Points whose folders other runs have, and the names of all such points.
    self._in_use: list[Point] = []
    self._reported: set[str] = set()
    self._last_page = time.monotonic()

  def run(self) -> Results:
    """Trains and measures open points until no worker has any.

    Raises:
      WriteError: if the disk or the storage does not take what is written.
    """
    # A pruner judges one point at a time.
    limit = 1 if self._prunes else jax.local_device_count()
    last_running = 0
    while True:
      self.stop.raise_if_received()
      taken = self.study.take(limit)
      if not taken and self._in_use:
        self.stop.sleep(_SECONDS_BETWEEN_POLLS)
        taken, self._in_use = self._in_use, []
      if taken:
        self._work(taken)
        continue
      running = self.study.count(TrialState.RUNNING)
      if not running:
        break
      if running != last_running:
        progress.say(f'waiting for {running} points that other workers have.')
      last_running = running
      self.stop.sleep(_SECONDS_BETWEEN_POLLS)
    results = self.study.results()
    with self._disk_errors(self.folder):
      report.write(self.folder, results, self._facts())
    return results

  def _facts(self) -> dict[str, object]:
    data = self.base.data
    return {
      'data': f'{data.source} {data.dir}'.strip(),
      'split': self.split,
      'images': f'{data.image_size}×{data.image_size}',
      'epochs': self.base.train.num_epochs,
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
    }

  def _work(self, taken: list[Point]) -> None:
    """Trains and measures points, those of one program together."""
    groups = {}
    for point in taken:
      # After a kill some may be a checkpoint ahead.
      step = Checkpoints(self._folder_of(point)).latest_step()
      key = (points.program(point.values), step)
      groups.setdefault(key, []).append(point)
    for group in groups.values():
      with contextlib.ExitStack() as locks:
        locked = [point for point in group if self._lock(point, locks)]
        if locked:
          self._train(locked)
      self._write_results()

  def _folder_of(self, point: Point) -> epath.Path:
    return self.folder / points.FOLDER / point.name

  def _lock(self, point: Point, locks: contextlib.ExitStack) -> bool:
    """Excludes other runs from a point's folder; False if there is one."""
    folder = self._folder_of(point)
    workdirs.check_writable(folder, '--workdir')
    try:
      locks.enter_context(workdirs.hold(folder))
    except workdirs.InUseError as error:
      self._in_use.append(point)
      if point.name not in self._reported:
        progress.say(f'{error} Other points come first.')
      self._reported.add(point.name)
      return False
    return True

  def _train(self, group: list[Point]) -> None:
    """Trains and measures points together, or each alone if that fails."""
    done = self.study.count(TrialState.COMPLETE)
    names = '; '.join(point.name for point in group)
    progress.say(f'\n[{done} points done] {names}')
    outcomes, alone = [], []
    try:
      with self._disk_errors(self._folder_of(group[0])):
        outcomes = self._train_runs(group)
      self.stop.raise_if_received()
    except optuna.TrialPruned as pruned:
      progress.say(f'{group[0].name}: {pruned}')
      self.study.fail(group[0], str(pruned), TrialState.PRUNED)
    except WriteError:
      raise
    except Exception as error:
      if len(group) == 1:
        self._fail(group[0], error)
      else:
        # One is at fault, or together they need too much memory.
        progress.say(f'{_one_line(error)}\nTrying them one by one.')
        alone = group
    for point, error in zip(group, outcomes, strict=False):
      self.stop.raise_if_received()
      if error is None:
        self._measure(point)
      else:
        self._fail(point, error)
    # The error, and with it the memory that it held, is freed by now.
    for point in alone:
      self._train([point])

  def _train_runs(self, group: list[Point]) -> list[UserError | None]:
    """Trains the runs of points; returns what ended each early, if anything."""
    with contextlib.ExitStack() as stack:
      runs = []
      for point in group:
        folder = self._folder_of(point)
        config = points.configure(self.base, point.values)
        workdirs.check(config, folder)
        if self._prunes:
          writer = _Writer(folder, point.trial, *self.study.objectives)
        else:
          writer = metric_writer.MetricWriter(folder)
        stack.callback(writer.close)
        runs.append(train.Run(config, folder, writer))
      config, data = runs[0].config, load_data(runs[0].config)
      devices = jax.device_count()
      if len(runs) == 1 < devices and config.train.batch_size % devices == 0:
        # Its batches are split over the devices.
        train.train_and_evaluate(
          config, runs[0].workdir, data, runs[0].writer, self.stop
        )
        return [None]
      return train.train_population(runs, data, self._latent_dim, self.stop)

  def _measure(self, point: Point) -> None:
    """Measures a trained point and records it."""
    config, folder = (
      points.configure(self.base, point.values),
      self._folder_of(point),
    )
    try:
      with self._disk_errors(folder):
        row, units = measuring.measure_run(
          config,
          folder,
          load_data(config),
          self.split,
          self.measurements,
          self._latent_dim,
        )
      for name in self.study.objectives:
        if not math.isfinite(row[name]):
          raise UserError(f'diverged: {name} is {row[name]}.')
    except WriteError:
      raise
    except Exception as error:
      self._fail(point, error)
      return
    if self.study.complete(point, row, units):
      progress.say(
        f'{point.name}: rate {row["rate"]:.2f}, distortion '
        f'{row["distortion"]:,.1f} nats, {row["active_units"]:.0f} active units'
      )

  def _fail(self, point: Point, error: Exception) -> None:
    message = _one_line(error)
    progress.say(f'{point.name}: failed, {message}')
    self.study.fail(point, message)

  def _write_results(self) -> None:
    """Writes the table, and now and then the page, if the disk takes them."""
    results = self.study.results()
    try:
      report.write_table(self.folder, results)
      if time.monotonic() - self._last_page > _SECONDS_BETWEEN_PAGES:
        report.write(self.folder, results, self._facts())
        self._last_page = time.monotonic()
    except OSError as error:
      progress.warn(
        f'warning: the results cannot be written into {self.folder} '
        f'({_one_line(error)}); the next point tries again.'
      )

  @contextlib.contextmanager
  def _disk_errors(self, what: epath.Path):
    """Raises WriteError, which ends the worker, if a disk is at fault."""
    try:
      yield
    except (OSError, UserError) as error:
      # Reading a checkpoint raises UserError from OSError.
      cause = error.__cause__ if isinstance(error, UserError) else error
      if not isinstance(cause, OSError):
        raise
      name = errno.errorcode.get(cause.errno)
      if name not in _DISK_ERRORS and not isinstance(error, WriteError):
        raise
      reason = cause.strerror or _one_line(cause)
      raise WriteError(
        f'{what} cannot be written ({reason}). Nothing that is saved is lost; '
        'once it can be, the same command goes on.'
      ) from error


def _one_line(error: Exception) -> str:
  text = ' '.join(str(error).split())[:500]
  if isinstance(error, UserError):
    return text
  return f'{type(error).__name__}: {text}' if text else type(error).__name__
