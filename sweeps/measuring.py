"""Measurements and pictures of a trained point."""

import math

from etils import epath
import ml_collections
import numpy as np

from evaluation import measure, posterior
from evaluation.measure import Metric
from runs import metric_writer
from vae import figures, loading, population, splits

# Pictures in a point's folder, and images in each.
ORIGINALS = 'gallery/originals.png'
RECONSTRUCTIONS = 'gallery/reconstructions.png'
SAMPLES = 'gallery/samples.png'
_NUM_IMAGES = 8


def measure_run(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  data: splits.DataSet,
  split_name: str,
  settings: measure.Settings,
  latent_dim: int,
) -> tuple[dict[str, object], dict[str, str]]:
  """Measures a run's best checkpoint and saves its pictures.

  Args:
    config: of the run.
    workdir: of the run.
    data: that it was trained on.
    split_name: split to measure on.
    settings: measurements besides the summary; no groups for the summary alone.
    latent_dim: models are padded to this, so that they share compiled programs.

  Returns:
    Metrics by name with `kl`, nats, and `active` [latent_dim]; units by name.
  """
  split = getattr(data, split_name)
  trained = loading.restore(config, workdir)
  # Models without this setting are not padded.
  count = getattr(trained.model, 'latent_dim', None)
  padded = population.pad_trained(trained, max(latent_dim, count or 0))
  results = measure.summarise(padded, split, settings)
  dimensions = {k: v[:count] for k, v in results.dimensions.items()}
  if settings.groups:
    more = measure.measure(trained, data, split_name, settings)
    for name, metric in more.metrics.items():
      results.metrics[name] = metric
      if metric.null:
        null = Metric(metric.null.value, metric.unit, '')
        results.metrics[f'{name}_null'] = null
  for name, metric in _speed(config, workdir).items():
    results.metrics[name] = metric
  number = min(_NUM_IMAGES, split.num_examples)
  originals = next(split.batches(np.arange(number), number))
  # Models of more dimensions share the first ones.
  u = np.random.default_rng(0).random((*padded.latent_shape[::-1], _NUM_IMAGES))
  z = np.asarray(padded.prior.quantile(u.T.astype(np.float32)))
  for name, images in (
    (ORIGINALS, originals),
    (RECONSTRUCTIONS, padded.reconstruct(originals)),
    (SAMPLES, padded.decode(z)),
  ):
    strip = figures.image_grid(images, columns=len(images))
    figures.save_png(strip, workdir / name)
  row = {name: metric.value for name, metric in results.metrics.items()}
  row['kl'] = list(dimensions.get('kl', []))
  variances = dimensions.get('mean_variance', [])
  row['active'] = [v > posterior.ACTIVE_VARIANCE for v in variances]
  units = {name: metric.unit for name, metric in results.metrics.items()}
  # Not `of 16`, which is not the unit of all points.
  return row, {
    n: 'dimensions' if u[:3] == 'of ' and u[3:].isdigit() else u
    for n, u in units.items()
  }


def _speed(config, workdir: epath.Path) -> dict[str, Metric]:
  """Speed and time of the training steps, as the run logged them."""
  rows = metric_writer.read(workdir)
  rows = [row for row in rows if 'images_per_second' in row]
  speeds = np.array([row['images_per_second'] for row in rows])
  steps = np.diff([0, *(row['step'] for row in rows)])
  seconds = float(np.sum(steps * config.train.batch_size / speeds))
  speed = float(np.median(speeds)) if rows else math.nan
  return {
    'images_per_second': Metric(speed, 'images/s', ''),
    'seconds': Metric(seconds, 's of training steps', ''),
  }
