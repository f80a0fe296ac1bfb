"""Runs side by side: at the same images, with paired differences.

The choice of images moves the metrics of all runs together, so that the
standard error of their difference, image by image, is far below that of each.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any

from etils import epath
from matplotlib.figure import Figure
import numpy as np

from evaluation import bounds, html_page, plots, titles
from evaluation.measure import mean_and_error
from runs import metric_writer, schema
from vae import conditioning, figures, paths
from vae.loading import TrainedVAE
from vae.splits import Examples

# What is compared, and its unit.
METRICS = {
  'elbo_optimal_sigma': 'nats per image',
  'elbo': 'nats per image',
  'rate': 'nats per image',
  'distortion': 'nats per image',
  'mse_of_mean': 'mean over pixels',
  'psnr': 'dB',
  'ssim': 'at most 1',
}

# Images in a row of pictures.
NUM_IMAGES = 12


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a comparison.

  Attributes:
    name: in the tables.
    workdir: of the run.
    trained: its model.
    values: `METRICS` of each image, [num_images], by name.
    originals: the first images, with labels if the model sees any.
  """

  name: str
  workdir: epath.Path
  trained: TrainedVAE
  values: Mapping[str, np.ndarray]
  originals: Examples


def of_images(
  values: Mapping[str, np.ndarray], draws_z: bool, dimensions: int
) -> dict:
  """`METRICS` of each image, from `measure.Context.images`.

  `dimensions` are the numbers of an image. A plain autoencoder has no bound,
  rate or distortion.
  """
  found = {'mse_of_mean': values['mse']}
  found |= {name: values[name] for name in ('psnr', 'ssim') if name in values}
  if draws_z:
    rate, distortion, squares = (
      values[name].astype(np.float64)
      for name in ('rate', 'distortion', 'squared_error')
    )
    best, _ = bounds.elbo_optimal_sigma(rate, squares, dimensions)
    found |= {'elbo_optimal_sigma': best, 'elbo': -rate - distortion}
    found |= {'rate': rate, 'distortion': distortion}
  return found


def difference(values: np.ndarray) -> str:
  """Mean and standard error of paired differences [n], with a sign."""
  mean, error = values.mean(), None
  if len(values) > 1:
    mean, error = mean_and_error(values)
  return f'{"+" * (mean > 0)}{html_page.number(mean, error)}'


def differing(settings: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
  """Rows of the config's keys whose values differ, a column each."""
  rows = []
  for key in dict.fromkeys(key for column in settings for key in column):
    cells = [column.get(key, '–') for column in settings]
    if len(set(cells)) > 1:
      rows.append((f'config.{key}', *cells))
  return rows


def differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
  """Rows of metric, unit, the first run's mean, and each other's difference."""
  rows = []
  for name, unit in METRICS.items():
    if not all(name in run.values for run in runs):
      continue
    first = runs[0].values[name].astype(np.float64)
    cells = [html_page.number(*mean_and_error(first))]
    for run in runs[1:]:
      cells.append(difference(run.values[name].astype(np.float64) - first))
    rows.append((name, *cells, unit, titles.better(name)))
  return rows


def write(path: epath.Path, runs: Sequence[Run], split: str) -> None:
  """Writes the page of a comparison, one file.

  Args:
    path: of the page.
    runs: at least two, measured on the same images.
    split: the name of their split.
  """
  names = [run.name for run in runs]
  page = html_page.Page(' and '.join(names))
  count = len(next(iter(runs[0].values.values())))
  page.heading('Numbers')
  page.text(
    f'On the same {count:,} {split} images. The other columns are '
    f'differences from {names[0]}, image by image; ± is the standard error '
    'over the choice of images. ELBOs and distortions of different likelihoods '
    'are not comparable; their ELBOs at the optimal σ, that of a Gaussian '
    'likelihood fitted to the same images, are.'
  )
  header = ('', names[0], *(f'{n} − {names[0]}' for n in names[1:]))
  page.table((*header, 'unit', 'better'), differences(runs), stacks=True)
  for heading, caption, images, columns in _pictures(runs):
    page.heading(heading)
    grid = figures.image_grid(images, columns)
    page.figure(figures.png(grid), caption, width=768)
  if curves := _curves(runs):
    page.heading('Training')
    page.figure(plots.png(curves), 'Validation loss, nats per image.', 768)
  page.heading('Settings')
  page.table(('', *names), _settings(runs), stacks=True)
  page.text('Settings that differ.')
  paths.replace(path, page.html().encode())


def _pictures(runs: Sequence[Run]) -> Iterator[tuple[str, str, Any, int]]:
  """Heading, caption, images and columns of each grid."""
  rows = [figures.to_uint8(runs[0].originals.images)]
  for run in runs:
    images, labels = run.originals
    made = run.trained.reconstruct(images, labels=labels)
    rows.append(figures.to_uint8(made))
  order = ', '.join(run.name for run in runs)
  caption = f'From the top: originals, {order}; through the posterior mean.'
  yield 'Reconstructions', caption, np.concatenate(rows), len(rows[0])
  shapes = {run.trained.latent_shape for run in runs}
  # With latents of one shape, all models decode the same draws.
  z = runs[0].trained.sample_latents(NUM_IMAGES)
  rows = [
    figures.to_uint8(
      run.trained.decode(
        z if len(shapes) == 1 else run.trained.sample_latents(NUM_IMAGES),
        conditioning.in_turn(run.trained.model, NUM_IMAGES),
      )
    )
    for run in runs
  ]
  which = f'the same z, drawn from the prior of {runs[0].name}'
  if len(shapes) > 1:
    which = 'z from the prior of each, as their latents have other shapes'
  caption = f'From the top: {order}; {which}.'
  yield 'Samples', caption, np.concatenate(rows), NUM_IMAGES


def _curves(runs: Sequence[Run]) -> Figure | None:
  figure, axes = plots.new_axes(width=8, height=3.6)
  axes.set(xlabel='epoch', ylabel='validation loss')
  drawn = 0
  for run in runs:
    rows = [r for r in metric_writer.read(run.workdir) if 'val/loss' in r]
    if rows:
      epochs = [row['epoch'] for row in rows]
      losses = [row['val/loss'] for row in rows]
      style = {'marker': '.', 'ls': '--' if drawn else '-'}
      axes.plot(epochs, losses, label=plots.readable(run.name), **style)
      drawn += 1
  if not drawn:
    return None
  axes.legend(frameon=False)
  return figure


def _settings(runs: Sequence[Run]) -> list[tuple[str, ...]]:
  """The settings in which the runs differ, and their steps."""
  flat = [schema.flatten(schema.resolved(run.trained.config)) for run in runs]
  texts = [{key: str(value) for key, value in f.items()} for f in flat]
  steps = 'step', *(f'{run.trained.step:,}' for run in runs)
  return [steps, *differing(texts)]
