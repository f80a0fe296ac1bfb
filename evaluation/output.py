"""What `evaluate.py` leaves: metrics.json, figures, and a page with both."""

import contextlib
import dataclasses
import json
import math
import os
import tempfile

from etils import epath
import numpy as np

from evaluation import html_page
from evaluation import plots
from evaluation import posterior
from evaluation.measurements import Measurements
from vae import figures
from vae import paths
from vae import walks
from vae.loading import TrainedVAE

METRICS = 'metrics.json'
PAGE = 'report.html'

# Of the pictures: images along a side, dimensions and steps of traversals.
_SIDE = 8
_DIMENSIONS = 10
_STEPS = 11
_REACH = 3.0

# Of the page: what is told in large figures.
_HEADLINES = (
  'elbo',
  'rate',
  'bits_per_dim_optimal_sigma',
  'active_units',
  'dimensions_of_90_percent',
  'mse_of_mean',
  'fid_samples',
)


def write(
  folder: epath.Path,
  facts: dict[str, object],
  results: Measurements,
  trained: TrainedVAE,
  originals: np.ndarray,
  validation_path: np.ndarray,
) -> None:
  """Writes everything aside first, so that a failure leaves the old as it was.

  Args:
    folder: is made, if it is not there.
    facts: what was measured: run, checkpoint, split.
    results: the numbers.
    trained: the model, for its pictures.
    originals: images of the split, uint8 [n, height, width, channels].
    validation_path: (rate, distortion) of the run's validations, [n, 2].
  """
  with contextlib.ExitStack() as stack:
    if paths.is_remote(folder):
      temporary = tempfile.TemporaryDirectory()
      aside = epath.Path(stack.enter_context(temporary))
    else:
      aside = folder / f'.partial.{os.getpid()}'
      aside.mkdir(parents=True)
    captions = _draw(aside, facts, results, trained, originals, validation_path)
    (aside / METRICS).write_text(_json(facts, results))
    (aside / PAGE).write_text(_page(aside, facts, results, captions))
    if paths.is_remote(folder):
      paths.copy(aside, folder)
      return
    for path in aside.iterdir():
      path.replace(folder / path.name)
    aside.rmdir()


def write_partial(
  folder: epath.Path, facts: dict[str, object], results: Measurements
) -> epath.Path:
  """Writes what is known of an evaluation that did not come to its end."""
  path = folder / 'metrics.partial.json'
  path.write_text(_json(facts, results))
  return path


def as_text(results: Measurements) -> str:
  """The numbers for a terminal, a line each."""
  rows = _rows(results)
  width = max((len(name) for name, *_ in rows), default=0)
  lines = [
    f'{name:{width}}  {value:>18}  {unit}'
    + (f'  (null: {null})' if null else '')
    for name, value, null, unit, _ in rows
  ]
  lines += [results.verdict] if results.verdict else []
  lines += [f'not measured: {note}' for note in results.notes]
  return '\n'.join(lines)


def _json(facts: dict[str, object], results: Measurements) -> str:
  """As JSON knows neither NaN nor infinity, these become null."""

  def plain(value):
    if isinstance(value, dict):
      return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
      return None
    return value

  metrics = {}
  for name, metric in results.metrics.items():
    metrics[name] = {'value': metric.value, 'unit': metric.unit}
    if metric.standard_error is not None:
      metrics[name]['standard_error'] = metric.standard_error
    if metric.null is not None:
      metrics[name]['null'] = dataclasses.asdict(metric.null)
    metrics[name]['about'] = metric.about
  content = {
    **facts,
    'verdict': results.verdict,
    'metrics': metrics,
    'dimensions': results.dimensions,
    'labels': results.labels,
    'not_measured': results.notes,
  }
  return json.dumps(plain(content), indent=2, ensure_ascii=False) + '\n'


def _draw(folder, facts, results, trained, originals, validation_path):
  """Draws the figures; returns their captions by file name."""
  captions = {}
  spread = np.array(results.dimensions.get('mean_variance', ()))
  kl = np.array(results.dimensions.get('kl', ()))
  if len(kl):
    active = spread > posterior.ACTIVE_VARIANCE
    plots.kl_per_dimension(kl, active, folder / 'kl_per_dimension.png')
    captions['kl_per_dimension.png'] = (
      'KL of each latent dimension, mean over the images. Faint: not active.'
    )
  if 'elbo' in results.metrics:
    plots.rate_distortion(
      results.metrics['rate'].value,
      results.metrics['distortion'].value,
      validation_path,
      f'step {facts["step"]:,}, {facts["split"]}',
      folder / 'rate_distortion.png',
    )
    captions['rate_distortion.png'] = (
      'Rate and distortion: this checkpoint, and the way that training took.'
    )
  grid = figures.side_by_side(originals, trained.reconstruct(originals))
  figures.save_png(
    figures.image_grid(grid, _SIDE), folder / 'reconstructions.png'
  )
  captions['reconstructions.png'] = (
    'Images of the split, each with its reconstruction on its right.'
  )
  samples = trained.sample(_SIDE**2, facts['seed'])
  figures.save_png(figures.image_grid(samples, _SIDE), folder / 'samples.png')
  captions['samples.png'] = 'Samples: z from the prior, decoded.'
  if len(spread):
    order = posterior.most_informative(kl if len(kl) else spread)
    paths = walks.traverse(
      np.zeros(len(spread)), order[:_DIMENSIONS], _REACH, _STEPS
    )
    images = trained.decode(paths.reshape(-1, len(spread)))
    figures.save_png(
      figures.image_grid(images, _STEPS), folder / 'traversals.png'
    )
    captions['traversals.png'] = (
      f'What the dimensions do: the {len(paths)} that carry the most, a row '
      f'each, from {-_REACH:g} to {_REACH:g}; the others are 0. From the top: '
      f'{", ".join(map(str, order[:_DIMENSIONS]))}.'
    )
  return captions


def _page(folder, facts, results, captions) -> str:
  page = html_page.Page(
    f'{epath.Path(facts["workdir"]).name}, step {facts["step"]:,}, on '
    f'{facts["num_images"]:,} {facts["split"]} images'
  )
  if results.verdict:
    page.banner(results.verdict)
  rows = _rows(results)
  page.cards(
    [
      (name, value, unit)
      for headline in _HEADLINES
      for name, value, _, unit, _ in rows
      if name == headline
    ]
  )
  page.heading('Figures')
  for name, caption in captions.items():
    page.figure(folder / name, caption)
  page.heading('Numbers')
  page.table(
    ('', 'value', 'null', 'unit', ''),
    # Lines do not break around ±.
    [
      [
        cell.replace(' ± ', '\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}')
        for cell in row
      ]
      for row in rows
    ],
  )
  page.text(
    '± is the standard error over the choice of images, unless the row says of '
    'what. The null is the value if there is nothing to find, with its '
    'standard deviation over random repetitions.'
  )
  for note in results.notes:
    page.text(f'Not measured: {note}')
  if results.labels:
    page.heading('Labels')
    columns = list(next(iter(results.labels.values())))
    page.table(
      ('label', *(column.replace('_null', ', null') for column in columns)),
      [
        (name, *(html_page.number(numbers[column]) for column in columns))
        for name, numbers in results.labels.items()
      ],
    )
  if results.dimensions:
    page.heading('Latent dimensions')
    page.table(
      ('dimension', *results.dimensions),
      [
        (str(index), *map(html_page.number, row))
        for index, row in enumerate(
          zip(*results.dimensions.values(), strict=True)
        )
      ],
    )
  page.heading('Measured')
  page.table(('', ''), [(name, str(value)) for name, value in facts.items()])
  return page.html()


def _rows(results: Measurements) -> list[tuple[str, str, str, str, str]]:
  """Name, value, null, unit and meaning; two bounds on a number are a row."""
  rows = []
  for name, metric in results.metrics.items():
    base = name.removesuffix('_lower_bound')
    upper = results.metrics.get(f'{base}_upper_bound')
    value = _number(metric.value, metric.standard_error)
    if base != name and upper:
      name = base
      value += f' to {_number(upper.value, upper.standard_error)}'
    elif name.endswith('_upper_bound'):
      continue
    null = ''
    if metric.null:
      null = _number(metric.null.value, metric.null.deviation)
    rows.append((name, value, null, metric.unit, metric.about))
  return rows


def _number(value: float, error: float | None) -> str:
  """Such as 45.31 ± 0.12."""
  # NaN of a single image too.
  if error is None or not error > 0 or not math.isfinite(value):
    return html_page.number(value)
  # Two digits of the error, but no more than six of the value.
  of_error = 1 - math.floor(math.log10(error))
  of_value = 5 - math.floor(math.log10(max(abs(value), 1e-9)))
  digits = max(0, min(of_error, of_value))
  rounded = f'{error:.{digits}f}'
  shown = f'{value:,.{digits}f}'
  return f'{shown} ± {rounded}' if float(rounded) else shown
