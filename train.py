"""The training loop, from a config to a trained model.

It takes its data and its metric writer from outside, and imports neither
TensorFlow nor clu.
"""

import collections
from collections.abc import Callable
import dataclasses
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

# Batches of a validation's dispatches: images of the host go to the devices by
# as many, while these work on those before.
_EVAL_BATCHES = 10


@dataclasses.dataclass
class _UnderWay:
  """What the devices are doing, to be told and saved when it is done.

  Attributes:
    step: after it.
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
  steps_per_dispatch = config.train.steps_per_dispatch or _steps_per_dispatch()

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

    def settle(done: _UnderWay) -> None:
      """Waits for it; tells of it, and saves."""
      if done.metrics is not None:
        metrics = jax.device_get(done.metrics)
        report.training({k: v[: done.num_steps] for k, v in metrics.items()})
      val_metrics = None
      if done.validation is not None:
        means = mean_metrics(done.validation, data.validation.num_examples)
        report.validation(done.step, means, done.draw)
        val_metrics = {checkpoints.METRIC: means['loss']}
      if done.snapshot is not None:
        saved.save(done.step, done.snapshot, val_metrics)

    # Loop. What is under way is settled when the devices have their next steps
    # to do, so that they never wait for the host.
    last_save = time.monotonic()
    under_way = collections.deque()
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
            settle(under_way.popleft())

          # A checkpoint within a long epoch, where no metrics are left over.
          if step % steps_per_epoch and report.is_told(step):
            minutes = (time.monotonic() - last_save) / 60
            if _as_first_process(minutes >= config.checkpoint.every_minutes):
              under_way[-1].snapshot = training.snapshot(state)
              last_save = time.monotonic()

        # Validation, and the checkpoint at each epoch's end. The speed that is
        # told is that of training, so its end is waited for.
        while under_way:
          settle(under_way.popleft())
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
      while under_way:
        settle(under_way.popleft())
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
  return [
    eval_steps(
      variables,
      key,
      stored,
      chunk.batches,
      chunk.num_batches,
      start,
      split.num_examples,
    )
    for chunk, start in splits.eval_chunks(
      split, batch_size, _EVAL_BATCHES, topology
    )
  ]


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


def _steps_per_dispatch() -> int:
  """As many as keep a CPU's answers, and an accelerator's queue, short."""
  return 10 if jax.default_backend() == 'cpu' else 100


def _as_first_process(decision: bool) -> bool:
  """What the first process decided; their clocks may differ."""
  if jax.process_count() == 1:
    return decision
  return bool(multihost_utils.broadcast_one_to_all(np.array(decision)))
