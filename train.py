"""The training loop, from a config to a trained model.

It takes its data and its metric writer from outside, and imports neither
TensorFlow nor clu.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import math
import time

from etils import epath
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

import report as reports
import run_config
from vae import checkpoints
from vae import devices
from vae import optimizers
from vae import splits
from vae import training
from vae.population import Population
from vae.single import SingleRun
from vae.trainer import Trainer

# Images along a side of the grids of samples and reconstructions.
_GRID = 12

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


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is to be trained.

  Attributes:
    config: complete and valid (`run_config.validate`).
    workdir: where checkpoints and pictures go.
    writer: takes the metrics.
  """

  config: ml_collections.ConfigDict
  workdir: epath.Path
  writer: reports.Writer


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


def train_and_evaluate(
  config,
  workdir: epath.PathLike,
  data: splits.DataSet,
  writer: reports.Writer,
) -> training.TrainState:
  """Trains the model of `config`, going on from the workdir's last checkpoint.

  Args:
    config: complete and valid (`run_config.validate`).
    workdir: where checkpoints and pictures go.
    data: its train and validation splits are used.
    writer: takes the metrics.

  Returns:
    The state after the last step.
  """
  trainer = SingleRun(config, data)
  _train(trainer, [Run(config, epath.Path(workdir), writer)], data)
  (state,) = trainer.states(trainer.snapshot())
  return state


def train_population(
  runs: Sequence[Run], data: splits.DataSet, latent_dim: int
) -> None:
  """Trains several runs in one program; each as `train_and_evaluate` would.

  But they draw no pictures.

  Args:
    runs: whose last checkpoints are of the same step, and whose configs are
      the same but for `population.FREE_KEYS`.
    data: as of `train_and_evaluate`.
    latent_dim: that all are padded to.
  """
  population = Population([run.config for run in runs], data, latent_dim)
  _train(population, runs, data)


def _train(trainer: Trainer, runs: Sequence[Run], data: splits.DataSet) -> None:
  """The loop."""
  # What is told and saved, and when, is the same for all.
  config = runs[0].config
  topology = devices.current()
  batch_size = config.train.batch_size
  steps_per_epoch = data.train.num_examples // batch_size
  total_steps = steps_per_epoch * config.train.num_epochs
  where = str(runs[0].workdir)
  if len(runs) > 1:
    where = f'{runs[0].workdir.parent} ({len(runs)} runs together)'

  with contextlib.ExitStack() as stack:
    saved = [
      stack.enter_context(
        checkpoints.Checkpoints(run.workdir, run.config.checkpoint.keep_best)
      )
      for run in runs
    ]
    # Where the runs stand.
    trainer.restore(saved)
    step = trainer.step
    if step >= total_steps:
      print(f'{where}: this run is finished, at step {step}.')
      return
    # Read now, so that a picture that cannot be is told before training.
    pairs = min(_GRID * _GRID // 2, data.validation.num_examples)
    originals = next(data.validation.batches(np.arange(pairs), pairs))
    num_examples = {
      'train': data.train.num_examples,
      'validation': data.validation.num_examples,
    }
    for run in runs:
      if topology.process_index == 0:
        run_config.claim_workdir(run.config, run.workdir, num_examples)
      run.writer.rewind(step)
      if not step:
        run.writer.write_hparams(run_config.flatten(run.config))
    if step:
      print(f'{where}: this run goes on from step {step}.')
    print(
      f'Training {trainer.num_parameters:,} parameters on '
      f'{data.train.num_examples:,} images (validation: '
      f'{data.validation.num_examples:,}), {topology.num_devices} × '
      f'{jax.devices()[0].device_kind}, into {where}.',
      flush=True,
    )
    report = reports.Report(
      [(run.writer, run.workdir) for run in runs],
      step=step,
      total_steps=total_steps,
      steps_per_epoch=steps_per_epoch,
      batch_size=batch_size,
      log_every_steps=config.train.log_every_steps,
      learning_rates=[
        optimizers.learning_rates(run.config, config.train.num_epochs)
        for run in runs
      ],
    )

    steps_per_dispatch = config.train.steps_per_dispatch or _steps_per_dispatch(
      data.train,
      trainer.batches_per_step * batch_size // topology.process_count,
      config,
    )

    def is_validated(step: int) -> bool:
      """Whether the state at a step is validated, and saved with that."""
      epoch, within_epoch = divmod(step, steps_per_epoch)
      is_due = epoch % config.eval.every_epochs == 0 or step == total_steps
      return within_epoch == 0 and is_due

    last_save, num_told = time.monotonic(), 0
    # What was dispatched, oldest first, and whether all before it is settled.
    under_way, in_order = collections.deque(), True

    def settle() -> None:
      """Waits for what has been under way longest; tells of it, and saves."""
      nonlocal in_order
      # Ctrl-C comes while it is waited for, and then it is still under way.
      jax.block_until_ready((under_way[0].metrics, under_way[0].validation))
      done, in_order = under_way.popleft(), False
      if done.metrics is not None:
        metrics = trainer.by_run(done.metrics)
        report.training({k: v[:, : done.num_steps] for k, v in metrics.items()})
      val_metrics = [None] * len(runs)
      if done.validation is not None:
        sums = [trainer.by_run(chunk) for chunk in done.validation]
        means = mean_metrics(sums, data.validation.num_examples)
        report.validation(done.step, means)
        val_metrics = [{checkpoints.METRIC: loss} for loss in means['loss']]
      if done.snapshot is not None:
        states = trainer.states(done.snapshot)
        for one, state, metrics in zip(saved, states, val_metrics, strict=True):
          one.save(done.step, state, metrics)
      if done.draw is not None:
        report.pictures(done.step, done.draw)
      in_order = True

    # Loop. What is under way is settled when the devices have the next steps to
    # do, so that they do not wait for the host.
    try:
      while step < total_steps:
        epoch, first_step = divmod(step, steps_per_epoch)
        for chunk in trainer.train_chunks(
          epoch, first_step, steps_per_dispatch
        ):
          metrics = trainer.train(chunk)
          report.dispatched()
          step = trainer.step
          under_way.append(_UnderWay(step, metrics, chunk.num_batches))
          if len(under_way) > _AHEAD:
            settle()

          # A checkpoint where no metrics are left over.
          if report.is_told(step) and not is_validated(step):
            minutes = (time.monotonic() - last_save) / 60
            is_due = minutes >= config.checkpoint.every_minutes
            if _as_first_process(is_due, num_told):
              under_way[-1].snapshot = trainer.snapshot()
              last_save = time.monotonic()
            num_told += 1

        # Validation, with a checkpoint. The speed that is told is that of
        # training, so its end is waited for.
        if is_validated(step):
          while under_way:
            settle()
          under_way.append(
            _UnderWay(
              step,
              validation=_evaluate(trainer, data.validation, config),
              snapshot=trainer.snapshot(),
            )
          )
          last_save = time.monotonic()
          if topology.process_index == 0:
            under_way[-1].draw = trainer.draw(originals, _GRID)
    finally:
      # Also where the data, or Ctrl-C, ends the loop: what was computed counts.
      while under_way and in_order:
        settle()
      report.finish_pictures()
    report.done(saved[0].best_step())


def _evaluate(
  trainer: Trainer, split: splits.Split, config
) -> list[training.Metrics]:
  """Sets the evaluation of a split going, every example counted once.

  Returns:
    The sums of the metrics over each batch, by chunk, still being computed.
  """
  max_batches = _MAX_EVAL_BATCHES
  if splits.stored_images(split) is None:
    local_batch_size = config.eval.batch_size // jax.process_count()
    max_batches = min(max_batches, _num_batches(split, local_batch_size))
  sums = []
  for chunk, start in trainer.eval_chunks(max_batches):
    # As many images as the devices have before them, and no more.
    jax.block_until_ready(sums[-_AHEAD - 1 : -_AHEAD])
    sums.append(trainer.evaluate(chunk, start))
  return sums


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


def _steps_per_dispatch(
  split: splits.Split, local_batch_size: int, config
) -> int:
  """How many steps go to the devices at a time, where the config is silent."""
  if jax.default_backend() == 'cpu':
    return _STEPS_ON_CPU
  steps = _MAX_STEPS
  if splits.stored_images(split) is None:
    steps = min(steps, _num_batches(split, local_batch_size))
  # A dispatch that ends where metrics are told may end with a checkpoint.
  log_every_steps = config.train.log_every_steps
  return steps if steps < log_every_steps else steps - steps % log_every_steps


def _num_batches(split: splits.Split, local_batch_size: int) -> int:
  """Of images, that go to the devices at a time."""
  num_bytes = local_batch_size * math.prod(split.image_shape)
  return max(1, _MAX_BYTES // max(num_bytes, 1))


def _as_first_process(decision: bool, num_asked: int) -> bool:
  """What the first process decided; their clocks may differ.

  They can agree only by way of the devices, which have to be waited for, and so
  do it now and then.
  """
  if jax.process_count() == 1:
    return decision
  if num_asked % 10:
    return False
  return bool(multihost_utils.broadcast_one_to_all(np.array(decision)))
