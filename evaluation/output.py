"""The files of an evaluation: metrics.json, figures, and a page of both."""

import dataclasses
import json

from etils import epath
import numpy as np

from evaluation import html_page, plots, posterior, titles
from evaluation.html_page import number
from evaluation.measure import Measurements
from runs import metric_writer, schema
from vae import conditioning, figures, paths
from vae.loading import TrainedVAE
from vae.splits import Examples

METRICS, PARTIAL, PAGE = 'metrics.json', 'metrics.partial.json', 'report.html'

# Of the pictures: images along a side, dimensions and steps of traversals, and
# their ends in standard deviations of the prior.
_SIDE, _DIMENSIONS, _STEPS, _REACH = 8, 10, 11, 3.0


def write(
  folder: epath.Path,
  facts: dict[str, object],
  results: Measurements,
  trained: TrainedVAE,
  originals: Examples,
) -> None:
  """Makes everything before it writes, so that a failure leaves the old files.

  `facts` are of the run, checkpoint and split. The page shows reconstructions
  of the originals, uint8 images, with labels if the model sees any.
  """
  pictures = _draw(facts['seed'], results, trained, originals)
  rows = metric_writer.read(epath.Path(facts['workdir']))
  if curves := plots.training_curves(rows):
    caption = 'Loss, nats per image, and learning rate over the epochs.'
    pictures['training.png'] = plots.png(curves), caption
  files = {name: png for name, (png, _) in pictures.items()}
  files[METRICS] = as_json(facts, results).encode()
  files[PAGE] = _page(facts, results, pictures, trained.config).encode()
  for name, content in files.items():
    paths.replace(folder / name, content)
  (folder / PARTIAL).unlink(missing_ok=True)


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


def as_json(facts: dict[str, object], results: Measurements) -> str:
  """The numbers as JSON, which has neither NaN nor infinity: they are null."""
  metrics = {
    name: {k: v for k, v in dataclasses.asdict(metric).items() if v is not None}
    for name, metric in results.metrics.items()
  }
  content = {
    **facts,
    'verdict': results.verdict,
    'metrics': metrics,
    'dimensions': results.dimensions,
    'labels': results.labels,
    'not_measured': results.notes,
  }
  content = json.loads(json.dumps(content), parse_constant=lambda name: None)
  return json.dumps(content, indent=2, ensure_ascii=False) + '\n'


def _draw(seed, results, trained, originals) -> dict[str, tuple[bytes, str]]:
  """The figures as PNG, with their captions, by file name."""
  found = {}

  def add(name, caption, images, columns):
    found[name] = figures.png(figures.image_grid(images, columns)), caption

  spread = np.array(results.dimensions.get('mean_variance', ()))
  kl = np.array(results.dimensions.get('kl', ()))
  if len(kl):
    chart = plots.kl_per_dimension(kl, spread > posterior.ACTIVE_VARIANCE)
    caption = (
      'KL of each latent dimension, mean over the images. Faint: not active.'
    )
    found['kl_per_dimension.png'] = plots.png(chart), caption
  images, labels = originals
  pairs = figures.side_by_side(
    images, trained.reconstruct(images, labels=labels)
  )
  caption = 'Images of the split, each with its reconstruction on its right.'
  add('reconstructions.png', caption, pairs, _SIDE)
  samples = trained.sample(_SIDE**2, seed)
  add('samples.png', 'Samples: z from the prior, decoded.', samples, _SIDE)
  if results.mixture is not None:
    z = results.mixture[: _SIDE**2].reshape(-1, *trained.latent_shape)
    images = trained.decode(z, conditioning.in_turn(trained.model, len(z)))
    caption = (
      'Samples: z from the Gaussians that are fitted to q(z), decoded, as by '
      'generate.py sample --prior=mixture.'
    )
    add('mixture_samples.png', caption, images, _SIDE)
  if len(spread):
    order = posterior.most_informative(kl if len(kl) else spread)[:_DIMENSIONS]
    values = figures.prior_values(trained.prior, _REACH, _STEPS)
    z = figures.traverse(np.ravel(trained.prior.mean), order, values)
    z = z.reshape(-1, *trained.latent_shape)
    is_conditional = conditioning.in_turn(trained.model, 1) is not None
    images = trained.decode(
      z, np.zeros(len(z), int) if is_conditional else None
    )
    caption = (
      f'The {len(order)} dimensions that carry the most, a row each, from '
      f"{-_REACH:g} to {_REACH:g} of the prior's standard deviations; the "
      f'others are at its mean. From the top: {", ".join(map(str, order))}.'
      f'{" Of class 0." if is_conditional else ""}'
    )
    add('traversals.png', caption, images, _STEPS)
  return found


def _page(facts, results, pictures, config) -> str:
  page = html_page.Page(
    f'{epath.Path(facts["workdir"]).name}, step {facts["step"]:,}, on '
    f'{facts["num_images"]:,} {facts["split"]} images'
  )
  if results.verdict:
    page.text(results.verdict, 'banner')
  page.heading('Figures')
  for png, caption in pictures.values():
    page.figure(png, caption)
  for group, rows in titles.grouped(_rows(results)):
    page.heading(group)
    page.table(
      ('', 'key', 'value', 'null', 'unit', 'better'),
      [(*row[:5], row[-1]) for row in rows],
      stacks=True,
    )
    page.notes([(title, about) for title, *_, about, _ in rows])
  page.text(
    '± is the standard error over the choice of images, unless the row names '
    'another. The null is the value if there is nothing to find, with its '
    'standard deviation over random repetitions.'
  )
  for note in results.notes:
    page.text(f'Not measured: {note}')
  if results.labels:
    page.heading('Labels')
    first, *_ = results.labels.values()
    page.table(
      ('label', *(name.replace('_null', ', null') for name in first)),
      [(k, *map(number, v.values())) for k, v in results.labels.items()],
    )
  if results.dimensions:
    page.heading('Latent dimensions')
    columns = zip(*results.dimensions.values(), strict=True)
    page.table(
      ('dimension', *results.dimensions),
      [(str(i), *map(number, row)) for i, row in enumerate(columns)],
    )
  page.heading('Measured')
  rows = [(name, str(value)) for name, value in facts.items()]
  page.table(('', ''), rows, stacks=True)
  page.heading('Settings')
  settings = schema.flatten(schema.resolved(config))
  rows = [(f'config.{key}', str(value)) for key, value in settings.items()]
  page.table(('', ''), rows, stacks=True)
  return page.html()


def _rows(results: Measurements) -> list[tuple[str, str, str, str, str]]:
  """Name, value, null, unit and meaning; two bounds on a number are a row."""
  rows = []
  for name, metric in results.metrics.items():
    base = name.removesuffix('_lower_bound')
    upper = results.metrics.get(f'{base}_upper_bound')
    value, null = number(metric.value, metric.standard_error), ''
    if base != name and upper:
      name = base
      value += f' to {number(upper.value, upper.standard_error)}'
    elif name.endswith('_upper_bound'):
      continue
    if metric.null:
      null = number(metric.null.value, metric.null.deviation)
    rows.append((name, value, null, metric.unit, metric.about))
  return rows
