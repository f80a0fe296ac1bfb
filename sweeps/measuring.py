"""What is measured of a point when it is trained."""

from collections.abc import Iterable
import dataclasses
import math
import statistics

import numpy as np

from evaluation import measure
from evaluation import posterior
from evaluation.measurements import Measurements
from evaluation.measurements import Metric
from runs import metric_writer
from sweeps import gallery
import train
from vae import loading
from vae import population
from vae import splits
from vae.errors import UserError


def measure_run(
  run: train.Run,
  data: splits.DataSet,
  split_name: str,
  settings: measure.Settings,
  latent_dim: int,
  finite: Iterable[str],
) -> tuple[dict[str, Metric], dict[str, list]]:
  """Measures a run's best checkpoint, and leaves its pictures in its folder.

  Args:
    run: that is trained.
    data: that it was trained on.
    split_name: of the split to measure on.
    settings: of what is measured beyond the summary; no groups for nothing.
    latent_dim: that models are padded to, so that they share the programs, and
      are shown the same z.
    finite: metrics that must be finite.

  Returns:
    The metrics; and `kl`, nats, and `active` of each latent dimension.

  Raises:
    UserError: if a metric is not finite that must be.
  """
  split = getattr(data, split_name)
  trained = loading.restore(run.config, run.workdir)
  count = trained.model.latent_dim
  padded = population.pad_trained(trained, max(latent_dim, count))
  results = measure.summarise(padded, split, settings)
  for name in finite:
    value = results.metrics[name].value
    if not math.isfinite(value):
      raise UserError(f'diverged: {name} is {value}.')
  kl = results.dimensions['kl'][:count]
  variance = results.dimensions['mean_variance'][:count]
  active = [v > posterior.ACTIVE_VARIANCE for v in variance]
  metrics = results.metrics
  # Of the padding nothing is told.
  for name in ('active_units', 'dimensions_of_90_percent'):
    metrics[name] = dataclasses.replace(metrics[name], unit=f'of {count}')
  if settings.groups:
    more = Measurements(split.num_examples)
    measure.measure(trained, data, split_name, settings, more)
    for name, metric in more.metrics.items():
      metrics[name] = metric
      if metric.null:  # A table has a column of its own for it.
        metrics[f'{name}_null'] = Metric(
          metric.null.value, metric.unit, f'{name} if there is nothing to find'
        )
  images_per_second, seconds = speed(run)
  metrics['images_per_second'] = Metric(
    images_per_second, 'images/s', 'while training, median'
  )
  metrics['seconds'] = Metric(
    seconds, 's of training steps', 'shared by those that train together'
  )
  gallery.save(run.workdir, *gallery.draw(padded, split))
  return metrics, {'kl': kl, 'active': active}


def speed(run: train.Run, first_step: int = 0) -> tuple[float, float]:
  """How fast a run's training steps were, as it told.

  Args:
    run: that is trained.
    first_step: after which they count.

  Returns:
    Images per second, median; seconds of all steps. NaN and 0 without any.
  """
  rows = [
    row
    for row in metric_writer.read(run.workdir)
    if 'images_per_second' in row and row['step'] > first_step
  ]
  if not rows:
    return math.nan, 0.0
  speeds = [row['images_per_second'] for row in rows]
  steps = np.diff([first_step, *(row['step'] for row in rows)])
  seconds = np.sum(steps * run.config.train.batch_size / np.array(speeds))
  return statistics.median(speeds), float(seconds)
