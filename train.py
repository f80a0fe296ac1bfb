"""The training loop, from a config to a trained model.

It takes its data and its metric writer from outside, and imports neither
TensorFlow nor clu.
"""

import collections
from collections.abc import Callable
import dataclasses
import math
import time

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

import report as reports
import run_config
from vae import checkpoints
from vae import devices
from vae import figures
from vae import model as models
from vae import objective as objectives
from vae import splits
from vae import training

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
  workdir = epath.Path(workdir)
  topology = devices.current()
  batch_size = config.train.batch_size
  steps_per_epoch = data.train.num_examples // batch_size
  total_steps = steps_per_epoch * config.train.num_epochs

  # Model.
  model = models.from_config(config, axis_name=devices.AXIS)
  objective = objectives.from_config(config)
  schedule = training.learning_rate_schedule(config, steps_per_epoch)
  optimizer = training.make_optimizer(config, schedule)
  train_steps = training.make_train_steps(
    model, objective, optimizer, config.train.flip
  )
  eval_steps = training.make_eval_steps(model, objective)
  state = training.create_state(model, optimizer, config.seed)
  train_key = training.train_key(config.seed)
  eval_key = training.eval_key(config.seed)

  with checkpoints.Checkpoints(workdir, config.checkpoint.keep_best) as saved:
    # Where the run stands.
    step = 0
    if saved.latest_step() is not None:
      state = saved.restore(state)
      step = int(state.step)
    if step >= total_steps:
      print(f'{workdir}: this run is finished, at step {step}.')
      return state
    # Read now, so that a picture that cannot be is told before training.
    pairs = min(_GRID * _GRID // 2, data.validation.num_examples)
    originals = next(data.validation.batches(np.arange(pairs), pairs))
    if topology.process_index == 0:
      num_examples = {
        'train': data.train.num_examples,
        'validation': data.validation.num_examples,
      }
      run_config.claim_workdir(config, workdir, num_examples)
    writer.rewind(step)
    if step:
      print(f'{workdir}: this run goes on from step {step}.')
    else:
      writer.write_hparams(run_config.flatten(config))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(
      f'Training {num_parameters:,} parameters on '
      f'{data.train.num_examples:,} images (validation: '
      f'{data.validation.num_examples:,}), {topology.num_devices} × '
      f'{jax.devices()[0].device_kind}, into {workdir}.',
      flush=True,
    )
    report = reports.Report(
      writer,
      workdir,
      step=step,
      total_steps=total_steps,
      steps_per_epoch=steps_per_epoch,
      batch_size=batch_size,
      log_every_steps=config.train.log_every_steps,
      learning_rates=training.learning_rates(config, config.train.num_epochs),
    )
    stored = splits.stored_images(data.train)
    stored_validation = splits.stored_images(data.validation)

    steps_per_dispatch = config.train.steps_per_dispatch or _steps_per_dispatch(
      data.train, batch_size // topology.process_count, config
    )
    last_save, num_dispatches = time.monotonic(), 0
    # What was dispatched, oldest first, and whether all before it is settled.
    under_way, in_order = collections.deque(), True

    def settle() -> None:
      """Waits for what has been under way longest; tells of it, and saves."""
      nonlocal in_order
      # Ctrl-C comes while it is waited for, and then it is still under way.
      jax.block_until_ready((under_way[0].metrics, under_way[0].validation))
      done, in_order = under_way.popleft(), False
      if done.metrics is not None:
        metrics = jax.device_get(done.metrics)
        report.training({k: v[: done.num_steps] for k, v in metrics.items()})
      val_metrics = None
      if done.validation is not None:
        means = mean_metrics(done.validation, data.validation.num_examples)
        report.validation(done.step, means)
        val_metrics = {checkpoints.METRIC: means['loss']}
      if done.snapshot is not None:
        saved.save(done.step, done.snapshot, val_metrics)
      if done.draw is not None:
        report.pictures(done.step, done.draw)
      in_order = True

    # Loop. What is under way is settled when the devices have the next steps to
    # do, so that they do not wait for the host.
    try:
      while step < total_steps:
        epoch, first_step = divmod(step, steps_per_epoch)
        for chunk in splits.train_chunks(
          data.train,
          config.seed,
          epoch,
          first_step,
          batch_size,
          steps_per_dispatch,
          topology,
        ):
          state, metrics = train_steps(
            state, train_key, stored, chunk.batches, chunk.num_batches
          )
          report.dispatched()
          step += chunk.num_batches
          under_way.append(_UnderWay(step, metrics, chunk.num_batches))
          if len(under_way) > _AHEAD:
            settle()

          # A checkpoint within a long epoch, where no metrics are left over.
          if step % steps_per_epoch and report.is_told(step):
            minutes = (time.monotonic() - last_save) / 60
            is_due = minutes >= config.checkpoint.every_minutes
            if _as_first_process(is_due, num_dispatches):
              under_way[-1].snapshot = training.snapshot(state)
              last_save = time.monotonic()
          num_dispatches += 1

        # Validation, and the checkpoint at each epoch's end. The speed that is
        # told is that of training, so its end is waited for.
        while under_way:
          settle()
        epoch += 1
        under_way.append(_UnderWay(step, snapshot=training.snapshot(state)))
        last_save = time.monotonic()
        if epoch % config.eval.every_epochs == 0 or step == total_steps:
          under_way[-1].validation = evaluate_split(
            eval_steps,
            state.variables,
            eval_key,
            data.validation,
            stored_validation,
            config.eval.batch_size,
            topology,
          )
          if topology.process_index == 0:
            under_way[-1].draw = draw_pictures(
              model, state.variables, originals, config.seed
            )
    finally:
      # Also where the data, or Ctrl-C, ends the loop: what was computed counts.
      while under_way and in_order:
        settle()
      report.finish_pictures()
    report.done(saved.best_step())
  return state


def evaluate_split(
  eval_steps,
  variables,
  key: jax.Array,
  split: splits.Split,
  stored: jax.Array | None,
  batch_size: int,
  topology: devices.Topology,
) -> list[training.Metrics]:
  """Sets the evaluation of a split going, every example counted once.

  Returns:
    The sums of the metrics over each batch, by chunk, still being computed.
  """
  max_batches = _MAX_EVAL_BATCHES
  if stored is None:
    local_batch_size = batch_size // topology.process_count
    max_batches = min(max_batches, _num_batches(split, local_batch_size))
  sums = []
  for chunk, start in splits.eval_chunks(
    split, batch_size, max_batches, topology
  ):
    # As many images as the devices have before them, and no more.
    jax.block_until_ready(sums[-_AHEAD - 1 : -_AHEAD])
    sums.append(
      eval_steps(
        variables,
        key,
        stored,
        chunk.batches,
        chunk.num_batches,
        start,
        split.num_examples,
      )
    )
  return sums


def mean_metrics(sums: list[training.Metrics], count: int) -> dict[str, float]:
  """Waits for the device; the means of what was summed over `count` items."""
  rows = jax.device_get(sums)
  # In double precision: a large split has hundreds of millions of nats.
  return {
    name: sum(row[name].sum(dtype=np.float64) for row in rows).item() / count
    for name in rows[0]
  }


def draw_pictures(
  model: models.VAE, variables, originals: np.ndarray, seed: int
) -> Callable[[], dict[str, np.ndarray]]:
  """Sets samples and reconstructions going.

  Returns:
    A function that waits for them, and returns grids of the samples, and of
    the originals beside their reconstructions. The seed fixes the samples' z,
    so that epochs can be compared.
  """
  variables = devices.on_first(variables)
  key = training.sample_key(seed)
  samples = figures.samples(model, variables, key, _GRID**2)
  reconstructions = figures.reconstructions(model, variables, originals)

  def draw():
    pairs = figures.side_by_side(originals, reconstructions)
    return {
      'samples': figures.image_grid(samples, _GRID),
      'reconstructions': figures.image_grid(pairs, _GRID),
    }

  return draw


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


def _as_first_process(decision: bool, num_dispatches: int) -> bool:
  """What the first process decided; their clocks may differ.

  They can agree only by way of the devices, which have to be waited for, and so
  do it now and then.
  """
  if jax.process_count() == 1:
    return decision
  if num_dispatches % 10:
    return False
  return bool(multihost_utils.broadcast_one_to_all(np.array(decision)))
