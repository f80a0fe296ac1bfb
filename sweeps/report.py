"""The results of a sweep in its workdir: a page, a table, an HParams view."""

import runs  # noqa: F401 (Sets the environment of TensorFlow.)

# isort: split
import math
import pathlib
import tempfile

from clu import metric_writers
from etils import epath
import pandas as pd

from evaluation import html_page, plots
from sweeps import charts, measuring, points
from sweeps.points import Results
from vae import paths

PAGE, TABLE, CHART = 'report.html', 'results.csv', 'rate_distortion.png'

_STATES = ('complete', 'failed', 'pruned', 'running', 'waiting')
_BEST_BY = 'elbo_optimal_sigma'
_PIXELS_PER_INCH = 104

_CHARTS = {
  'Rate and distortion': (
    charts.rate_distortion,
    'Means over the seeds, with standard deviations. On the dotted line the '
    'ELBO is that of the best point. Distortions of different likelihoods do '
    'not compare.',
  ),
  'KL of the dimensions': (
    charts.kl_panels,
    'Mean over the images and the seeds, sorted; faint: not active.',
  ),
}


def write(
  folder: epath.Path, results: Results, facts: dict[str, object]
) -> None:
  """Writes all results; each file is replaced at once or not at all.

  Args:
    folder: workdir of the sweep.
    results: of its points.
    facts: about all points, such as the split, for the page.
  """
  write_table(folder, results)
  _write_hparams(folder / 'tensorboard', results)
  page = html_page.Page(f'{folder.name}: {len(results.frame)} points')
  page.banner(summary(results))
  with tempfile.TemporaryDirectory() as aside:
    path = epath.Path(aside) / CHART
    for heading, (draw, caption) in _CHARTS.items():
      figure = draw(results)
      if figure is None:
        continue
      plots.save(figure, path)
      page.heading(heading)
      width = round(figure.get_size_inches()[0] * _PIXELS_PER_INCH)
      page.figure(path, caption, width, min_width=min(width, 560))
      if draw is charts.rate_distortion:
        paths.replace(folder / CHART, path.read_bytes())
  _add_gallery(page, results, folder / points.FOLDER)
  _add_points(page, results)
  page.heading('Measured')
  page.table(('', ''), [(name, str(value)) for name, value in facts.items()])
  paths.replace(folder / PAGE, page.html().encode())


def write_table(folder: epath.Path, results: Results) -> None:
  """Writes a row a point: settings, state and metrics, as CSV."""
  frame = results.frame.drop(columns=['kl', 'active', 'trial'])
  for key in results.keys:
    frame[key] = [points.text(value, digits=12) for value in frame[key]]
  frame = frame.replace([math.inf, -math.inf], math.nan)
  paths.replace(folder / TABLE, frame.to_csv(index=False).encode())


def _write_hparams(folder: epath.Path, results: Results) -> None:
  """Writes complete points for TensorBoard's HParams view, a run each.

  A point that was continued or measured again is another run, as a TensorBoard
  that is running reads each run once.
  """
  for _, row in results.having('rate').iterrows():
    run = folder / row.point / str(row.trial)
    if run.exists():
      continue
    is_plain = lambda value: isinstance(value, (bool, int, float, str))
    values = {
      key: row[key] if is_plain(row[key]) else points.text(row[key])
      for key in results.keys
    }
    with tempfile.TemporaryDirectory() as aside:
      writer = metric_writers.SummaryWriter(aside)
      writer.write_hparams(values)
      writer.write_scalars(0, {name: row[name] for name in results.units})
      writer.close()
      run.parent.rmtree(missing_ok=True)
      run.mkdir(parents=True)
      for path in pathlib.Path(aside).iterdir():
        paths.replace(run / path.name, path.read_bytes())


def summary(results: Results) -> str:
  """How far the sweep is, and its best point by the ELBO at the optimal σ."""
  counts = results.frame.state.value_counts()
  states = ', '.join(f'{counts[s]} {s}' for s in _STATES if s in counts)
  text = f'Of {len(results.frame)} points: {states or "none"}.'
  if counts.get('complete') == len(results.frame):
    text = f'All {len(results.frame)} points are complete.'
  table = results.over_seeds(_BEST_BY)
  if table.empty:
    return text
  best = table.loc[table[_BEST_BY].idxmax()]
  return (
    f'{text} Best by its ELBO at the optimal σ: {_describe(results, best)}, '
    f'with {html_page.number(best[_BEST_BY])} {results.units[_BEST_BY]}'
    + (f', the mean of {best.seeds:.0f} seeds.' if best.seeds > 1 else '.')
  )


def _describe(results: Results, row: pd.Series) -> str:
  """The settings of a point that vary, such as `β 0.5, latent_dim 16`."""
  names = points.short_names(results.keys)
  keys = [key for key in results.varied if key in row.index]
  text = ', '.join(f'{names[key]} {points.text(row[key])}' for key in keys)
  return text or 'the only point'


def _add_gallery(
  page: html_page.Page, results: Results, folder: epath.Path
) -> None:
  shown = [
    (row, folder / row.point)
    for _, row in results.frame.iterrows()
    if (folder / row.point / measuring.SAMPLES).exists()
  ]
  if not shown:
    return
  page.heading('Pictures')
  page.figure(shown[0][1] / measuring.ORIGINALS, 'Originals.')
  page.text(
    'Of each point: reconstructions of the same images through the posterior '
    'mean, and samples decoded from the same z.'
  )
  for row, point in shown:
    name, numbers = _describe(results, row), ''
    if row.state == 'complete':
      rate, distortion = map(html_page.number, (row.rate, row.distortion))
      numbers = f', rate {rate}, distortion {distortion} nats'
    caption = f'{name}: reconstructions{numbers}'
    page.figure(point / measuring.RECONSTRUCTIONS, caption)
    page.figure(point / measuring.SAMPLES, f'{name}: samples')


def _add_points(page: html_page.Page, results: Results) -> None:
  keys, units = results.keys, results.units
  names = points.short_names(keys)
  page.heading('Points')
  page.table(
    (
      *(names[key] for key in keys),
      'state',
      *(f'{name}, {unit}' if unit else name for name, unit in units.items()),
      'folder',
    ),
    [
      (
        *(points.text(row[key]) for key in keys),
        row.state,
        *(html_page.number(row[name]) for name in units),
        row.point,
      )
      for _, row in results.frame.iterrows()
    ],
  )
  failed = results.frame[results.frame.error != '']
  if len(failed):
    page.heading('Failed')
    page.table(('point', 'error'), failed[['point', 'error']].to_numpy())
