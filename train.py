"""Training a config, or several: where a run stands, and how it ends.

The loop itself is `training_loop`. Data and metric writers come from outside;
neither TensorFlow nor clu is imported.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json

from etils import epath
import jax
import ml_collections
import numpy as np

from runs import progress
from runs import schema
from runs import workdirs
from training_loop import GRID
from training_loop import Loop
from training_loop import Schedule
from vae import devices
from vae import numerics
from vae import optimizers
from vae import splits
from vae import training
from vae.checkpoints import Checkpoints
from vae.checkpoints import CheckpointWriter
from vae.errors import UserError
from vae.population import Population
from vae.single import SingleRun
from vae.trainer import Trainer

# For so long a run that is finished waits for a disk that takes its last state.
_PATIENCE_SECONDS = 600.0

# Numbers that a TPU computes side by side: where channels are few XLA lays the
# images of a batch along them, and fills up what the batch lacks.
_TPU_LANES = 128


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is to be trained.

  Attributes:
    config: complete and valid (`schema.validate`).
    workdir: where checkpoints and pictures go.
    writer: takes the metrics.
  """

  config: ml_collections.ConfigDict
  workdir: epath.Path
  writer: progress.Writer


def _never() -> bool:
  return False


def train_and_evaluate(
  config,
  workdir: epath.PathLike,
  data: splits.DataSet,
  writer: progress.Writer,
  stop: Callable[[], bool] = _never,
) -> training.TrainState:
  """Trains the model of `config`, going on from the workdir's last checkpoint.

  Args:
    config: complete and valid (`schema.validate`).
    workdir: where checkpoints and pictures go.
    data: its train and validation splits are used.
    writer: takes the metrics.
    stop: asked after each dispatch; True ends training, with a checkpoint.

  Returns:
    The state after the last step, or the one at which it was stopped.

  Raises:
    UserError: if a loss or gradient is not finite, or a mistake shows.
  """
  run = Run(config, epath.Path(workdir), writer)
  with numerics.fixed(config.model.dtype):
    trainer = SingleRun(config, data)
    (error,) = _train(trainer, [run], data, stop)
    if error is not None:
      raise error
    (state,) = trainer.states(trainer.snapshot())
    return state


def train_population(
  runs: Sequence[Run],
  data: splits.DataSet,
  latent_dim: int,
  stop: Callable[[], bool] = _never,
) -> list[UserError | None]:
  """Trains several runs in one program; each as `train_and_evaluate` would.

  But they draw no pictures.

  Args:
    runs: whose last checkpoints are of the same step, and whose configs are
      the same but for `population.FREE_KEYS`.
    data: as of `train_and_evaluate`.
    latent_dim: that all are padded to.
    stop: as of `train_and_evaluate`.

  Returns:
    What ended each run before the others, if anything did.
  """
  with numerics.fixed(runs[0].config.model.dtype):
    population = Population([run.config for run in runs], data, latent_dim)
    return _train(population, runs, data, stop)


def _train(
  trainer: Trainer,
  runs: Sequence[Run],
  data: splits.DataSet,
  stop: Callable[[], bool],
) -> list[UserError | None]:
  """Restores the runs, says where they stand, and trains them to their end."""
  # What is told and saved, and when, is the same for all.
  config = runs[0].config
  topology = devices.current()
  schedule = Schedule(
    data.train.num_examples // config.train.batch_size,
    config.train.num_epochs,
    config.eval.every_epochs,
  )
  where = str(runs[0].workdir)
  if len(runs) > 1:
    where = f'{runs[0].workdir.parent} ({len(runs)} runs together)'

  saved = [Checkpoints(run.workdir) for run in runs]
  trainer.restore(saved)
  step = trainer.step
  # As where the run was stopped at an epoch's end.
  validate_first = schedule.validates(step) and not trainer.is_validated
  if step >= schedule.total_steps and not validate_first:
    progress.say(f'{where}: this run is finished, at step {step}.')
    return [None] * len(runs)
  # Read now, so that a picture that cannot be is told before training.
  pairs = min(GRID * GRID // 2, data.validation.num_examples)
  originals = next(data.validation.batches(np.arange(pairs), pairs))
  identity = data.identity()
  digest = hashlib.sha256(json.dumps(identity).encode()).digest()
  if not devices.all_have(np.frombuffer(digest, np.uint8)):
    raise UserError(
      f'this process has other images ({identity}) than another of this run; '
      'give all the same data.'
    )
  for run in runs:
    if topology.process_index == 0:
      workdirs.claim(run.config, run.workdir, identity)
    run.writer.rewind(step, validated=not validate_first)
    if not step:
      run.writer.write_hparams(schema.flatten(run.config))
  if step:
    progress.say(f'{where}: this run goes on from step {step}.')
  progress.say(
    f'Training {trainer.num_parameters:,} parameters on '
    f'{data.train.num_examples:,} images (validation: '
    f'{data.validation.num_examples:,}), {topology.num_devices} × '
    f'{jax.devices()[0].device_kind}, into {where}.'
  )
  note = _note_on_batch(config.train.batch_size, trainer.per_device_batch_size)
  if note is not None:
    progress.say(note)
  report = progress.Report(
    [(run.writer, run.workdir) for run in runs],
    step=step,
    total_steps=schedule.total_steps,
    steps_per_epoch=schedule.steps_per_epoch,
    batch_size=config.train.batch_size,
    log_every_steps=config.train.log_every_steps,
    learning_rates=[
      optimizers.learning_rates(run.config, config.train.num_epochs)
      for run in runs
    ],
  )
  with contextlib.ExitStack() as stack:
    writers = []
    # All processes have the same state, and one of them writes it.
    if topology.process_index == 0:
      writers = [
        stack.enter_context(
          CheckpointWriter(
            run.workdir, run.config.checkpoint.keep_best, progress.warn
          )
        )
        for run in runs
      ]
    loop = Loop(
      trainer, data, config, schedule, report, writers, stop, originals
    )
    loop.run(validate_first)
    patience = 0.0 if loop.is_stopped else _PATIENCE_SECONDS
    for writer, error in zip(writers, loop.errors, strict=False):
      if error is None:
        writer.finish(patience, stop if topology.process_count == 1 else _never)
  if not all(loop.errors):
    if loop.is_stopped:
      progress.say(f'Stopped at step {trainer.step:,}, which is saved.')
    else:
      report.done(saved[0].best_step())
  return [
    error and UserError(f'{error} {_advice(one, since, config)}')
    for error, one, since in zip(
      loop.errors, saved, loop.bad_since, strict=True
    )
  ]


def _note_on_batch(batch_size: int, per_device: int) -> str | None:
  """What to say of a batch that leaves a part of a TPU idle."""
  if jax.default_backend() != 'tpu' or per_device % _TPU_LANES == 0:
    return None
  full = -(-per_device // _TPU_LANES) * _TPU_LANES
  return (
    f'config.train.batch_size={batch_size} is {per_device} images on a chip, '
    f'which computes {_TPU_LANES} side by side and so is '
    f'{per_device / full:.0%} full; '
    f'{full * (batch_size // per_device):,} would fill it.'
  )


def _advice(
  saved: Checkpoints, bad_since: int, config: ml_collections.ConfigDict
) -> str:
  """What is left of a run that ended in what is not finite, and what to do."""
  # That of the step before, if the run was stopped there, led to this.
  good = [step for step in saved.all_steps() if step < bad_since - 1]
  left = 'There is no good checkpoint yet.'
  if good:
    left = f'The last good checkpoint is {saved.directory / str(good[-1])}.'
  for step in saved.all_steps()[len(good) :]:
    left += f' Delete {saved.directory / str(step)}, which led to this.'
  advice = (
    f'{left} The same command would end there again: try a lower '
    'config.optimizer.learning_rate, or a limit to the gradient, '
    'config.optimizer.clip_norm'
  )
  if config.train.on_nonfinite != 'skip':
    advice += ', or leave such steps out with config.train.on_nonfinite=skip'
  return f'{advice}.'
