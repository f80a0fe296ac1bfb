"""The training loop, from a config to a trained model.

It takes its data and its metric writer from outside, and imports neither
TensorFlow nor clu.
"""

import time

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

import report as reports
import run_config
from vae import checkpoints
from vae import figures
from vae import model as models
from vae import objective as objectives
from vae import splits
from vae import training

# Images along a side of the grids of samples and reconstructions.
_GRID = 12


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
  topology = splits.Topology(
    jax.local_device_count(), jax.process_index(), jax.process_count()
  )
  batch_size = config.train.batch_size
  steps_per_epoch = data.train.num_examples // batch_size
  total_steps = steps_per_epoch * config.train.num_epochs

  # Model.
  model = models.from_config(config, axis_name=training.AXIS)
  objective = objectives.from_config(config)
  schedule = training.learning_rate_schedule(config, steps_per_epoch)
  optimizer = training.make_optimizer(config, schedule)
  train_steps = training.make_train_steps(
    model, objective, optimizer, config.train.flip
  )
  eval_step = training.make_eval_step(model, objective)
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
    )

    # Loop.
    sums, num_summed = [], 0
    last_save = time.monotonic()
    while step < total_steps:
      epoch, first_step = divmod(step, steps_per_epoch)
      for images, num_steps in splits.train_chunks(
        data.train,
        config.seed,
        epoch,
        first_step,
        batch_size,
        config.train.steps_per_dispatch,
        topology,
      ):
        state, chunk_sums = train_steps(state, train_key, images, num_steps)
        report.dispatched()
        step += num_steps
        sums.append(chunk_sums)
        num_summed += num_steps
        within_epoch = step % steps_per_epoch > 0
        if within_epoch and step % config.train.log_every_steps >= num_steps:
          continue

        # Metrics: here alone the host waits for the device.
        metrics = mean_metrics(sums, num_summed)
        sums, num_summed = [], 0
        report.training(step, metrics, float(schedule(step - 1)))

        # A checkpoint within a long epoch; validation makes the one at its
        # end.
        minutes = (time.monotonic() - last_save) / 60
        due = minutes >= config.checkpoint.every_minutes
        if within_epoch and _as_first_process(due):
          saved.save(step, state)
          last_save = time.monotonic()

      # Validation.
      val_metrics = None
      epoch += 1
      if epoch % config.eval.every_epochs == 0 or step == total_steps:
        jax.block_until_ready(state)
        with report.pause():
          metrics = evaluate_split(
            eval_step,
            state.variables,
            eval_key,
            data.validation,
            config.eval.batch_size,
            topology,
          )
          val_metrics = {'val/loss': metrics['loss']}
          pictures = {}
          if topology.process_index == 0:
            pictures = draw_pictures(
              model,
              jax.device_get(state.variables),
              originals,
              config.seed,
            )
          report.validation(step, metrics, pictures)
      saved.save(step, state, val_metrics)
      last_save = time.monotonic()
    report.done(saved.best_step())
  return state


def evaluate_split(
  eval_step,
  variables,
  key: jax.Array,
  split: splits.Split,
  batch_size: int,
  topology: splits.Topology,
) -> dict[str, float]:
  """Means of the metrics over a split, every example counted once."""
  sums = [
    eval_step(variables, key, images, start, split.num_examples)
    for images, start in splits.eval_batches(split, batch_size, topology)
  ]
  return mean_metrics(sums, split.num_examples)


def mean_metrics(
  sums: list[dict[str, jax.Array]], count: int
) -> dict[str, float]:
  """Waits for the device; the means of what was summed over `count` items."""
  rows = jax.device_get(sums)
  # In double precision: a large split has hundreds of millions of nats.
  return {
    name: sum(float(row[name]) for row in rows) / count for name in rows[0]
  }


def draw_pictures(
  model: models.VAE, variables, originals: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
  """Grids of samples, and of originals beside their reconstructions.

  The seed fixes the samples' z, so that epochs can be compared.
  """
  return {
    'samples': figures.sample_grid(
      model, variables, training.sample_key(seed), _GRID
    ),
    'reconstructions': figures.reconstruction_grid(
      model, variables, originals, _GRID
    ),
  }


def _as_first_process(decision: bool) -> bool:
  """What the first process decided; their clocks may differ."""
  if jax.process_count() == 1:
    return decision
  return bool(multihost_utils.broadcast_one_to_all(np.array(decision)))
