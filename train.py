"""The training loop, from a config to a trained model.

It takes its data and its metric writer from outside, and imports neither
TensorFlow nor clu.
"""

import time
from typing import Protocol

from etils import epath
import jax
import numpy as np

import progress as progress_lib
import run_config
from vae import checkpoints, figures, splits, training
from vae import model as models
from vae import objective as objectives

# Images along a side of the grids of samples and reconstructions.
_GRID = 12


class Writer(Protocol):
  """What the loop asks of `metric_writer.MetricWriter`; described there."""

  def rewind(self, step): ...

  def write_scalars(self, step, scalars): ...

  def write_images(self, step, images): ...

  def write_hparams(self, hparams): ...


def train_and_evaluate(
  config, workdir: epath.PathLike, data: splits.DataSet, writer: Writer
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
  num_devices = jax.device_count()
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

  with checkpoints.Checkpoints(workdir, config.checkpoint.keep_best) as saved:
    # Where the run stands.
    step = 0
    if saved.latest_step() is not None:
      state = saved.restore(state)
      step = int(state.step)
    if step >= total_steps:
      print(f'{workdir}: this run is finished, at step {step}.')
      return state
    writer.rewind(step)
    if step:
      print(f'{workdir}: this run goes on from step {step}.')
    else:
      writer.write_hparams(run_config.flatten(config))

    # Loop.
    progress = progress_lib.Progress(step, total_steps, batch_size)
    log_every = config.train.log_every_steps
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
        num_devices,
      ):
        state, chunk_sums = train_steps(state, train_key, images, num_steps)
        progress.dispatched()
        step += num_steps
        sums.append(chunk_sums)
        num_summed += num_steps

        # Metrics.
        if step % log_every < num_steps:
          means = mean_metrics(sums, num_summed)
          sums, num_summed = [], 0
          speed = progress.images_per_second(step)
          scalars = {f'train/{name}': value for name, value in means.items()}
          scalars['learning_rate'] = float(schedule(step - 1))
          scalars['images_per_second'] = speed
          writer.write_scalars(
            step, {'epoch': step / steps_per_epoch, **scalars}
          )
          progress.show(
            step,
            f'epoch {step / steps_per_epoch:.2f}  '
            f'loss {means["loss"]:.1f} nats  {speed:,.0f} images/s',
          )

        # A checkpoint within a long epoch.
        minutes = (time.monotonic() - last_save) / 60
        if (
          step % steps_per_epoch and minutes >= config.checkpoint.every_minutes
        ):
          saved.save(step, state)
          last_save = time.monotonic()

      # Validation.
      epoch += 1
      val_metrics = None
      if epoch % config.eval.every_epochs == 0 or step == total_steps:
        start = time.monotonic()
        means = evaluate_split(
          eval_step,
          state.variables,
          training.eval_key(config.seed),
          data.validation,
          config.eval.batch_size,
        )
        val_metrics = {f'val/{name}': value for name, value in means.items()}
        writer.write_scalars(step, {'epoch': epoch, **val_metrics})
        pictures = draw_pictures(
          model, state.variables, data.validation, config.seed
        )
        writer.write_images(step, pictures)
        for name, picture in pictures.items():
          path = workdir / name / f'epoch_{epoch:04d}.png'
          figures.save_png(picture, path)
        progress.line(
          f'epoch {epoch}/{config.train.num_epochs}  '
          + '  '.join(f'{k} {v:.5g}' for k, v in val_metrics.items())
        )
        progress.skip(time.monotonic() - start)
      saved.save(step, state, val_metrics)
      last_save = time.monotonic()

    print(f'Done: {step} steps. In {workdir}:')
    print(f'  checkpoints/{saved.best_step()} is the best by val/loss')
    for name in pictures:
      print(f'  {name}/epoch_{epoch:04d}.png')
  return state


def evaluate_split(
  eval_step, variables, key: jax.Array, split: splits.Split, batch_size: int
) -> dict[str, float]:
  """Means of the metrics over a split, every example counted once."""
  sums = [
    eval_step(variables, key, images, start, split.num_examples)
    for images, start in splits.eval_batches(
      split, batch_size, jax.device_count()
    )
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
  model: models.VAE, variables, split: splits.Split, seed: int
) -> dict[str, np.ndarray]:
  """Grids of samples, and of a split's first images beside reconstructions.

  The same z and the same images each time, so that epochs can be compared.
  """
  pairs = min(_GRID * _GRID // 2, split.num_examples)
  images = next(split.batches(np.arange(pairs), pairs))
  return {
    'samples': figures.sample_grid(
      model, variables, training.sample_key(seed), _GRID
    ),
    'reconstructions': figures.reconstruction_grid(
      model, variables, images, _GRID
    ),
  }
