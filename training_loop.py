"""The training loop: what the devices are sent, and what comes of it.

What was dispatched is settled when the devices have the next steps to do, so
that they do not wait for the host: only then its metrics are told and its
checkpoint is written. Without a validation that waits for one step more, as
only the loss and the gradient of the next say whether a state is any good.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
import time

import jax
import ml_collections
import numpy as np

from runs import progress
from vae import checkpoints
from vae import splits
from vae import training
from vae.checkpoints import CheckpointWriter
from vae.errors import UserError
from vae.trainer import Trainer

# Images along a side of the grids of samples and reconstructions.
GRID = 12

# Dispatches that the devices have before them while an earlier one is settled,
# so that they have something to do even while a checkpoint is begun.
_AHEAD = 2

# Steps of a dispatch where the config does not say. A CPU is slow, and Ctrl-C
# and progress wait for what is under way; images of the host must not crowd the
# devices' memory.
_STEPS_ON_CPU = 10
_MAX_STEPS = 100
_MAX_BYTES = 64_000_000

# Batches of a dispatch of the validation, at most.
_MAX_EVAL_BATCHES = 10

# Skipping ends where so many steps in a row had to be.
_MAX_SKIPPED = 100


@dataclasses.dataclass
class _UnderWay:
  """What the devices are doing, to be told and saved when it is done.

  Attributes:
    step: how many updates were made when it is done.
    metrics: of each of so many training steps.
    num_steps: how many these are.
    validation: sums of the metrics over the split, by chunk.
    draw: makes the pictures that go with a validation.
    snapshot: of the state, if that is to be saved.
  """

  step: int
  metrics: training.Metrics | None = None
  num_steps: int = 0
  validation: list[training.Metrics] | None = None
  draw: Callable[[], dict[str, np.ndarray]] | None = None
  snapshot: training.TrainState | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When what happens.

  Attributes:
    steps_per_epoch: whole batches.
    num_epochs: to be trained.
    every_epochs: the state is validated, and saved with that.
  """

  steps_per_epoch: int
  num_epochs: int
  every_epochs: int

  @property
  def total_steps(self) -> int:
    """After which training is over."""
    return self.steps_per_epoch * self.num_epochs

  def validates(self, step: int) -> bool:
    """Whether the state at a step is validated."""
    epoch, within_epoch = divmod(step, self.steps_per_epoch)
    is_due = epoch % self.every_epochs == 0 or step == self.total_steps
    return step > 0 and within_epoch == 0 and is_due


class Loop:
  """Training, from where the trainer stands.

  Attributes:
    errors: what ended each run before its time, if anything did.
    bad_since: of these, the first step whose loss or gradient is not finite.
    is_stopped: whether `stop` ended all.
  """

  def __init__(
    self,
    trainer: Trainer,
    data: splits.DataSet,
    config: ml_collections.ConfigDict,
    schedule: Schedule,
    report: progress.Report,
    writers: Sequence[CheckpointWriter],
    stop: Callable[[], bool],
    originals: np.ndarray,
  ):
    """Takes what it works on; `writers` is empty where nothing is written."""
    self._trainer, self._data, self._config = trainer, data, config
    self._schedule, self._report = schedule, report
    self._writers, self._stop = writers, stop
    self._originals = originals
    self.errors: list[UserError | None] = [None] * trainer.num_runs
    self.bad_since: list[int | None] = [None] * trainer.num_runs
    self.is_stopped = False
    self._steps_per_dispatch = (
      config.train.steps_per_dispatch
      or steps_per_dispatch(
        data.train,
        trainer.batches_per_step
        * config.train.batch_size
        // jax.process_count(),
        config,
      )
    )
    # Steps in a row that were skipped, of each run.
    self._skipped = np.zeros(trainer.num_runs, int)
    self._last_save, self._saved_step = time.monotonic(), trainer.step
    # What was dispatched, oldest first, and whether all before it is settled.
    self._under_way, self._in_order = collections.deque(), True
    # What each run's writer is given when the state has proved to be good.
    self._unproved: list[list[tuple]] = [[] for _ in range(trainer.num_runs)]

  def run(self, validate_first: bool) -> None:
    """Trains until the last step, until stopped, or until no run is left.

    Args:
      validate_first: whether the state where it stands is to be validated.
    """
    try:
      if validate_first:
        self._validate()
      while self._goes_on() and self._trainer.step < self._schedule.total_steps:
        self._train_epoch()
        if self._goes_on() and self._schedule.validates(self._trainer.step):
          self._validate()
      if self.is_stopped:
        self._snapshot_last()
      self._settle_all()
      self._check_last()
    except UserError:
      # Of the data, as an image that cannot be decoded. The snapshot needs no
      # other process, which may wait for this one.
      self._snapshot_last()
      raise
    finally:
      # Also where the data, or Ctrl-C, ends the loop: what was computed counts.
      self._settle_all()
      for run, kept in enumerate(self._unproved):
        # Of several, whose next steps were all skipped, the last will do.
        self._unproved[run] = [k for k in kept[-1:] if _is_finite(k[1])]
        self._save(run)
      # After the states, which matter more to who is about to be killed.
      self._report.finish_pictures()

  def _goes_on(self) -> bool:
    return not self.is_stopped and not all(self.errors)

  def _train_epoch(self) -> None:
    """What is left of the epoch; or less, if told to stop."""
    schedule, config = self._schedule, self._config
    epoch, first_step = divmod(self._trainer.step, schedule.steps_per_epoch)
    for chunk in self._trainer.train_chunks(
      epoch, first_step, self._steps_per_dispatch
    ):
      self._report.dispatching()
      metrics = self._trainer.train(chunk)
      self._report.dispatched()
      step = self._trainer.step
      self._under_way.append(_UnderWay(step, metrics, chunk.num_batches))
      if len(self._under_way) > _AHEAD:
        self._settle()
      self.is_stopped = self._stop()
      if not self._goes_on():
        return
      minutes = (time.monotonic() - self._last_save) / 60
      is_due = minutes >= config.checkpoint.every_minutes
      # Where no metrics are left over, which a kill would lose.
      is_due = is_due and self._report.is_told(step)
      if is_due and not schedule.validates(step):
        self._snapshot()

  def _validate(self) -> None:
    """Validates the state, and saves it with that."""
    # The speed that is told is that of training, so its end is waited for.
    self._settle_all()
    sums = self._evaluate()
    if self.is_stopped:
      return
    self._under_way.append(_UnderWay(self._trainer.step, validation=sums))
    self._snapshot()
    if self._writers:
      self._under_way[-1].draw = self._trainer.draw(self._originals, GRID)

  def _evaluate(self) -> list[training.Metrics]:
    """Sets the evaluation of the split going, every example counted once.

    Returns:
      The sums of the metrics over each batch, by chunk, still being computed.
    """
    split = self._data.validation
    max_batches = _MAX_EVAL_BATCHES
    if splits.stored_images(split) is None:
      batch_size = self._config.eval.batch_size // jax.process_count()
      max_batches = min(max_batches, _num_batches(split, batch_size))
    sums = []
    for chunk, start in self._trainer.eval_chunks(max_batches):
      # As many images as the devices have before them, and no more.
      jax.block_until_ready(sums[-_AHEAD - 1 : -_AHEAD])
      sums.append(self._trainer.evaluate(chunk, start))
      self.is_stopped = self._stop()
      if self.is_stopped:
        break
    return sums

  def _snapshot(self) -> None:
    """Has the state saved when what was dispatched last is settled."""
    self._last_save = time.monotonic()
    self._saved_step = self._trainer.step
    if self._writers:
      self._under_way[-1].snapshot = self._trainer.snapshot()

  def _snapshot_last(self) -> None:
    """Has the state saved that the loop ends with."""
    if self._trainer.step != self._saved_step:
      self._under_way.append(_UnderWay(self._trainer.step))
      self._snapshot()

  def _settle_all(self) -> None:
    while self._under_way and self._in_order:
      self._settle()

  def _settle(self) -> None:
    """Waits for what has been under way longest; tells of it, and saves."""
    first = self._under_way[0]
    # Ctrl-C comes while it is waited for, and then it is still under way.
    jax.block_until_ready((first.metrics, first.validation))
    done, self._in_order = self._under_way.popleft(), False
    if done.metrics is not None:
      metrics = {
        name: values[:, : done.num_steps]
        for name, values in self._trainer.by_run(done.metrics).items()
      }
      self._check_finite(done.step - done.num_steps, metrics)
      self._report.training(metrics)
    means = None
    if done.validation is not None:
      sums = [self._trainer.by_run(chunk) for chunk in done.validation]
      means = mean_metrics(sums, self._data.validation.num_examples)
      self._report.validation(done.step, means)
    if done.snapshot is not None:
      self._keep(done, means)
    if done.draw is not None and not all(self.errors):
      self._report.pictures(done.step, done.draw)
    self._in_order = True

  def _check_finite(
    self, first_step: int, metrics: dict[str, np.ndarray]
  ) -> None:
    """Ends the runs whose loss or gradient is not finite.

    And has the states saved that led to what is.

    Args:
      first_step: before these.
      metrics: of each run and step, [num_runs, num_steps].
    """
    checked = {name: metrics[name] for name in ('loss', 'grad_norm')}
    finite = np.all([np.isfinite(v) for v in checked.values()], axis=0)
    for run in [i for i, error in enumerate(self.errors) if error is None]:
      index = self._first_to_end(run, finite[run], 'skipped' in metrics)
      if np.any(finite[run, :index]):
        self._save(run)
      if index is None:
        continue
      what = ' and '.join(
        f'{name} is {values[run, index]}'
        for name, values in checked.items()
        if not np.isfinite(values[run, index])
      )
      if self._skipped[run] > 1:
        what += f', and {self._skipped[run]} steps in a row were skipped'
      step = first_step + index + 1
      self._end(run, step, what, bad_since=step + 1 - self._skipped[run])

  def _check_last(self) -> None:
    """Ends the runs whose last update made what is not finite.

    No step comes after it to tell.
    """
    states = self._trainer.states(self._trainer.snapshot())
    for run, state in enumerate(states):
      if self.errors[run] is None and not _is_finite(state):
        what = 'its update made parameters that are not finite'
        step = self._trainer.step
        self._end(run, step, what, bad_since=step + 1)

  def _end(self, run: int, step: int, what: str, bad_since: int) -> None:
    self.errors[run] = UserError(f'diverged at step {step:,}: {what}.')
    self.bad_since[run] = bad_since
    self._unproved[run] = []
    self._report.drop(run)

  def _first_to_end(
    self, run: int, finite: np.ndarray, skips: bool
  ) -> int | None:
    """Which of a run's steps ends it, if any; `finite` is [num_steps]."""
    for index in range(len(finite)) if skips else np.flatnonzero(~finite):
      self._skipped[run] = 0 if finite[index] else self._skipped[run] + 1
      if self._skipped[run] == (_MAX_SKIPPED if skips else 1):
        return int(index)
    return None

  def _keep(
    self, done: _UnderWay, means: dict[str, list[float]] | None
  ) -> None:
    """Has what was taken a snapshot of ready to be saved."""
    states = self._trainer.states(done.snapshot)
    for run, state in enumerate(states):
      if self.errors[run] is None:
        metrics = {}
        if means is not None:
          metrics = {checkpoints.METRIC: means['loss'][run]}
        self._unproved[run].append((done.step, state, metrics))
        if checkpoints.loss(metrics) < math.inf:
          self._save(run)

  def _save(self, run: int) -> None:
    """Has a run's writer write what was kept."""
    for kept in self._unproved[run]:
      self._writers[run].save(*kept, first=self._report.flush(run))
    self._unproved[run] = []


def _is_finite(state: training.TrainState) -> bool:
  """Whether all numbers of a state's model are; waits for the devices."""
  variables = jax.device_get(jax.tree.leaves(state.variables))
  return all(np.all(np.isfinite(array)) for array in variables)


def mean_metrics(
  sums: Sequence[dict[str, np.ndarray]], count: int
) -> dict[str, list[float]]:
  """Means of what was summed over `count` items.

  Args:
    sums: of each chunk, [num_runs, max_batches] by name.
    count: of items, in all.

  Returns:
    By name, one for each run.
  """
  # In double precision: a large split has hundreds of millions of nats.
  return {
    name: (
      sum(row[name].sum(axis=-1, dtype=np.float64) for row in sums) / count
    ).tolist()
    for name in sums[0]
  }


def steps_per_dispatch(
  split: splits.Split, local_batch_size: int, config
) -> int:
  """How many steps go to the devices at a time, where the config is silent."""
  if jax.default_backend() == 'cpu':
    return _STEPS_ON_CPU
  steps = _MAX_STEPS
  if splits.stored_images(split) is None:
    steps = min(steps, _num_batches(split, local_batch_size))
  # A dispatch that ends where metrics are told tells of its own speed.
  log_every_steps = config.train.log_every_steps
  return steps if steps < log_every_steps else steps - steps % log_every_steps


def _num_batches(split: splits.Split, local_batch_size: int) -> int:
  """Of images, that go to the devices at a time."""
  num_bytes = local_batch_size * math.prod(split.image_shape)
  return max(1, _MAX_BYTES // max(num_bytes, 1))
