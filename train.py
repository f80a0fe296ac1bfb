"""Training: restore, train, validate, save.

The host runs ahead of the devices. A dispatch is several steps; while the
devices make them the host sends the next, and reads the metrics of an earlier
one. A checkpoint between validations is saved once the loss and the gradient of
the step after it are finite, as only they prove that its state is good.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import math
import time

from etils import epath
import jax
import ml_collections
import numpy as np

from runs import processes, schema, workdirs
from runs import progress as progress_lib
from runs.divergence import Divergence, is_finite
from runs.progress import Schedule
from vae import (
  checkpoints,
  conditioning,
  numerics,
  optimizers,
  splits,
  steps,
)
from vae.checkpoints import Checkpoints, CheckpointWriter
from vae.errors import UserError
from vae.population import Population
from vae.trainer import Trainer

# Images along a side of the grids of samples and reconstructions.
GRID = 12

# Dispatches that the devices have before them while an earlier one is read.
_AHEAD = 2

# Seconds for which a finished run waits for a full disk.
_PATIENCE_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Run:
  """A run to be trained, with a valid config (`schema.validate`)."""

  config: ml_collections.ConfigDict
  workdir: epath.Path
  writer: progress_lib.Writer


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  data: splits.DataSet,
  writer: progress_lib.Writer,
  stop: Callable[[], bool] = lambda: False,
) -> steps.TrainState:
  """Trains the model of a config, from the workdir's last checkpoint on.

  The config is complete and valid (`schema.validate`). `stop` is called after
  each dispatch; True ends training, with a checkpoint. Returns the last state.

  Raises:
    UserError: if a loss or gradient is not finite, or the run cannot start.
  """
  run = Run(config, epath.Path(workdir), writer)
  with numerics.fixed(config.model.get('dtype', 'float32')):
    trainer = Trainer(config, data)
    (error,) = _train(trainer, [run], data, stop)
    if error is not None:
      raise error
    (state,) = trainer.states(trainer.snapshot())
    return state


def train_population(
  runs: Sequence[Run],
  data: splits.DataSet,
  latent_dim: int | None = None,
  stop: Callable[[], bool] = lambda: False,
) -> list[UserError | None]:
  """Trains several runs in one program, each as `train_and_evaluate` would.

  No pictures are drawn. There is at most one run for each local device; their
  last checkpoints are of the same step, and their configs the same but for
  `population.FREE_KEYS`. They are padded to `latent_dim`, or to the largest.

  Returns:
    The error of each run that ended before the others, else None.
  """
  configs = [run.config for run in runs]
  with numerics.fixed(configs[0].model.get('dtype', 'float32')):
    trainer = Population(configs, data, latent_dim)
    return _train(trainer, runs, data, stop)


def _train(
  trainer: Trainer,
  runs: Sequence[Run],
  data: splits.DataSet,
  stop: Callable[[], bool],
) -> list[UserError | None]:
  """Restores the runs, and trains them to their end."""
  # Restore.
  config = runs[0].config
  saved = [Checkpoints(run.workdir) for run in runs]
  trainer.restore(saved)
  schedule = Schedule(
    data.train.num_examples // config.train.batch_size,
    config.train.num_epochs,
    config.eval.every_epochs,
    config.train.log_every_steps,
  )
  # A run can have been stopped between an epoch's end and its validation.
  validate_first = schedule.validates(trainer.step) and not trainer.is_validated
  where = str(runs[0].workdir)
  if len(runs) > 1:
    where = f'{runs[0].workdir.parent} ({len(runs)} runs together)'
  if trainer.step >= schedule.total_steps and not validate_first:
    progress_lib.say(f'{where}: this run is finished, at step {trainer.step}.')
    return [None] * len(runs)
  _claim_workdirs(runs, data, trainer.step, validate_first)
  _announce(trainer, data, where)

  # Train, validate, save.
  progress = progress_lib.Progress(
    [(run.writer, run.workdir) for run in runs],
    schedule,
    trainer.step,
    config.train.batch_size,
    [optimizers.learning_rates(r.config, schedule.num_epochs) for r in runs],
  )
  with contextlib.ExitStack() as stack:
    writers = []
    # All processes have the same state, and one of them writes it.
    if jax.process_index() == 0:
      for run in runs:
        keep_best = run.config.checkpoint.keep_best
        writer = CheckpointWriter(run.workdir, keep_best, progress_lib.warn)
        writers.append(stack.enter_context(writer))
    loop = _Loop(trainer, data, config, schedule, progress, writers, stop)
    loop.run(validate_first)
    patience = 0.0 if loop.is_stopped else _PATIENCE_SECONDS
    # All processes must call `stop` together, and only this one waits here.
    ends = stop if jax.process_count() == 1 else lambda: False
    for writer, error in zip(writers, loop.divergence.errors, strict=False):
      if error is None:
        writer.finish(patience, ends)
  if loop.divergence.running():
    if loop.is_stopped:
      progress_lib.say(f'Stopped at step {trainer.step:,}, which is saved.')
    else:
      progress.done(saved[0].best_step())
  return loop.divergence.errors_with_advice(saved, config)


class _Loop:
  """The loop over dispatches."""

  def __init__(self, trainer, data, config, schedule, progress, writers, stop):
    self._trainer, self._config, self._schedule = trainer, config, schedule
    self._progress, self._writers, self._stop = progress, writers, stop
    self.divergence = Divergence(trainer.num_runs)
    self.is_stopped = False  # By `stop`, which ends all runs.
    # Read now, so that an unreadable image is reported before training.
    pairs = min(GRID * GRID // 2, data.validation.num_examples)
    self._originals = next(data.validation.batches(np.arange(pairs), pairs))
    self._last_save, self._saved_step = time.monotonic(), trainer.step
    # Dispatched and not yet read, oldest first.
    self._in_flight: collections.deque[_Dispatch] = collections.deque()
    self._is_settling = False
    # For each run, checkpoints whose state is not yet proved to be good.
    self._unproved: list[list[tuple]] = [[] for _ in range(trainer.num_runs)]
    self._compiling: futures.Future | None = None  # The validation.

  def run(self, validate_first: bool) -> None:
    """Trains until the last step, or until stopped or no run is left."""
    trainer, schedule = self._trainer, self._schedule
    try:
      if validate_first:
        self._validate()
      while self._goes_on() and trainer.step < schedule.total_steps:
        self._train_epoch()
        if self._goes_on() and schedule.validates(trainer.step):
          self._validate()
      if self.is_stopped:
        self._save_last()
      self._settle_all()
      # No step comes after the last to show that its update was finite.
      self.divergence.check_states(
        trainer.states(trainer.snapshot()), trainer.step
      )
    except UserError:
      # Such as an image that cannot be decoded. Saving needs no other process,
      # which may wait for this one.
      self._save_last()
      raise
    finally:
      # After an error or Ctrl-C too: what was computed counts.
      self._settle_all()
      self._progress.stopped()
      for run in self.divergence.running():
        # If all steps after several were skipped, the last is enough.
        last = self._unproved[run][-1:]
        self._unproved[run] = [kept for kept in last if is_finite(kept[1])]
        self._write(run)
      # After the states, which matter more if a kill is to follow.
      self._progress.finish_pictures()
      if self._compiling is not None:
        futures.wait([self._compiling])

  def _goes_on(self) -> bool:
    return not self.is_stopped and bool(self.divergence.running())

  def _train_epoch(self) -> None:
    """Dispatches the rest of the epoch, unless it is stopped."""
    trainer, schedule = self._trainer, self._schedule
    for chunk in trainer.train_chunks(
      *divmod(trainer.step, schedule.steps_per_epoch)
    ):
      with self._progress.dispatching():
        metrics = trainer.train(chunk)
      self._compile_validation()
      step = trainer.step
      self._in_flight.append(_Dispatch(step, metrics, chunk.num_batches))
      if len(self._in_flight) > _AHEAD:
        self._settle()
      self.is_stopped = self._stop()
      if not self._goes_on():
        return
      minutes = (time.monotonic() - self._last_save) / 60
      is_due = minutes >= self._config.checkpoint.every_minutes
      # Only if a row ends here, so that after a restart rows are the same.
      if is_due and schedule.logs(step) and not schedule.validates(step):
        self._snapshot()

  def _compile_validation(self) -> None:
    """Starts to compile the validation, while the first steps run."""
    if self._compiling is None and _compiles_beside():
      dtype = self._config.model.get('dtype', 'float32')
      compile_ = numerics.fixed(dtype)(self._trainer.compile_validation)
      thread = futures.ThreadPoolExecutor(1, 'compiler')
      self._compiling = thread.submit(compile_)
      thread.shutdown(wait=False)

  def _validate(self) -> None:
    """Dispatches a validation, and queues the state for saving."""
    # The logged speed is that of training, so its end is waited for.
    self._settle_all()
    if self._compiling is not None:
      self._compiling.result()
    sums = []
    for part in self._trainer.validate():
      sums.append(part)
      self.is_stopped = self._stop()
      if self.is_stopped:
        return
    self._in_flight.append(_Dispatch(self._trainer.step, sums=sums))
    self._snapshot()
    if self._writers:
      self._in_flight[-1].draw = self._trainer.draw(self._originals, GRID)

  def _snapshot(self) -> None:
    """Queues the state for saving, after what was dispatched before it."""
    self._last_save = time.monotonic()
    self._saved_step = self._trainer.step
    if self._writers:
      self._in_flight[-1].snapshot = self._trainer.snapshot()

  def _save_last(self) -> None:
    """Queues the state that the loop ends with."""
    if self._trainer.step != self._saved_step:
      self._in_flight.append(_Dispatch(self._trainer.step))
      self._snapshot()

  def _settle_all(self) -> None:
    # Ctrl-C can come while one is settled; those after it do not count.
    while self._in_flight and not self._is_settling:
      self._settle()

  def _settle(self) -> None:
    """Waits for the oldest dispatch; logs its metrics, and saves its state."""
    first = self._in_flight[0]
    # Ctrl-C while it is waited for leaves it in flight.
    jax.block_until_ready((first.metrics, first.sums))
    done, self._is_settling = self._in_flight.popleft(), True
    if done.metrics is not None:
      self._settle_training(done)
    means = None
    if done.sums is not None:
      means = self._trainer.means(done.sums)
      self._progress.validation(done.step, means)
    if done.snapshot is not None:
      states = self._trainer.states(done.snapshot)
      for run in self.divergence.running():
        loss = math.inf if means is None else means['loss'][run]
        scores = {} if means is None else {checkpoints.METRIC: loss}
        self._unproved[run].append((done.step, states[run], scores))
        if math.isfinite(loss):
          self._write(run)
    if done.draw is not None and self.divergence.running():
      self._progress.pictures(done.step, done.draw)
    self._is_settling = False

  def _settle_training(self, done: '_Dispatch') -> None:
    metrics = {
      name: values[:, : done.num_steps]
      for name, values in self._trainer.by_run(done.metrics).items()
    }
    before = self.divergence.running()
    for run in self.divergence.check_steps(done.step - done.num_steps, metrics):
      self._write(run)
    for run in set(before) - set(self.divergence.running()):
      self._unproved[run] = []
      self._progress.drop(run)
    self._progress.training(metrics)

  def _write(self, run: int) -> None:
    """Hands the queued checkpoints of a run to its writer."""
    for kept in self._unproved[run]:
      self._writers[run].save(*kept, first=self._progress.flush(run))
    self._unproved[run] = []


@dataclasses.dataclass
class _Dispatch:
  """Work of the devices whose results are still to be read."""

  step: int  # After it.
  metrics: steps.Metrics | None = None  # Of training steps, [..., max_steps].
  num_steps: int = 0  # Of the metrics.
  sums: list[steps.Metrics] | None = None  # Of a validation, by chunk.
  draw: Callable[[], dict[str, np.ndarray]] | None = None  # Its pictures.
  snapshot: steps.TrainState | None = None  # If it is to be saved.


def _compiles_beside() -> bool:
  """True where compiling in a thread gains time.

  A CPU's steps need the cores that compile; the first validation comes a second
  later. And several processes have to compile in the same order.
  """
  return jax.default_backend() != 'cpu' and jax.process_count() == 1


def _claim_workdirs(
  runs: Sequence[Run], data: splits.DataSet, step: int, validate_first: bool
) -> None:
  """Records each run's config and data in its workdir."""
  # Of a population all runs see the same label.
  identity = data.identity() | conditioning.identity(runs[0].config, data)
  processes.check_same(identity, f'images (here {identity})')
  for run in runs:
    if jax.process_index() == 0:
      workdirs.claim(run.config, run.workdir, identity)
    run.writer.rewind(step, validated=not validate_first)
    if not step:
      run.writer.write_hparams(schema.flatten(run.config))


def _announce(trainer: Trainer, data: splits.DataSet, where: str) -> None:
  if trainer.step:
    progress_lib.say(f'{where}: this run goes on from step {trainer.step}.')
  progress_lib.say(
    f'Training {trainer.num_parameters:,} parameters on '
    f'{data.train.num_examples:,} images (validation: '
    f'{data.validation.num_examples:,}), {jax.device_count()} × '
    f'{jax.devices()[0].device_kind}, into {where}.'
  )
