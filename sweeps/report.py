"""The results of a sweep in its workdir: page, table, TensorBoard's HParams."""

import runs  # noqa: F401 (Sets the environment of TensorFlow.)

# isort: split
from collections.abc import Callable, Mapping
import math
import pathlib
import tempfile

from clu import metric_writers
from etils import epath
from tensorboard.plugins.hparams import api as hparams

from evaluation import html_page, plots
from runs import metric_writer
from sweeps import charts, POINTS, points, TABLE
from sweeps.points import Results
from vae import paths

PAGE = 'report.html'

# Pictures in a point's folder.
ORIGINALS = 'gallery/originals.png'
RECONSTRUCTIONS = 'gallery/reconstructions.png'
SAMPLES = 'gallery/samples.png'

_BEST_BY = 'elbo_optimal_sigma'

_CHARTS = (
  (
    'rate_distortion.png',
    charts.rate_distortion,
    'Rate and distortion',
    'Means over the seeds, with standard deviations. On the dotted line the '
    'ELBO is that of the best point. Distortions of different likelihoods do '
    'not compare.',
  ),
  (
    'kl.png',
    charts.kl_panels,
    'KL of the dimensions',
    'Mean over the images and the seeds, sorted; faint: not active.',
  ),
)


def write(folder: epath.Path, results: Results, split: str) -> None:
  """Writes table, charts and page into the sweep's workdir, each atomically."""
  write_table(folder, results, split)
  write_columns(folder, results)
  page = html_page.Page(f'{folder.name}: {len(results.frame)} points')
  page.text(summary(results, split), 'banner')
  for name, draw, heading, caption in _CHARTS:
    if figure := draw(results):
      png = plots.png(figure)
      paths.replace(folder / name, png)
      page.heading(heading)
      width = round(104 * figure.get_size_inches()[0])
      page.figure(png, caption, width, min_width=min(width, 560))
  _add_gallery(page, results, folder / POINTS)
  _add_points(page, results)
  paths.replace(folder / PAGE, page.html().encode())


def write_table(folder: epath.Path, results: Results, split: str) -> None:
  """Writes a row a point: settings, state, metrics and their split, as CSV."""
  frame = results.frame.drop(columns=['kl', 'active']).assign(split=split)
  for key in results.keys:
    frame[key] = [points.text(value, digits=12) for value in frame[key]]
  frame = frame.replace([math.inf, -math.inf], math.nan)
  paths.replace(folder / TABLE, frame.to_csv(index=False).encode())


def write_measurement(
  workdir: epath.Path, metrics: Mapping[str, float]
) -> None:
  """Writes a point's metrics to its run in TensorBoard, in place of any."""
  _write_events(workdir, 'measured', lambda w: w.write_scalars(0, metrics))


def write_columns(folder: epath.Path, results: Results) -> None:
  """Writes which settings and metrics TensorBoard's HParams view shows."""
  summary = hparams.hparams_config_pb(
    [hparams.HParam(key) for key in results.varied],
    [hparams.Metric(name) for name in results.units],
  )
  content = metric_writer.unpack(summary)
  _write_events(folder, 'columns', lambda w: w.write_summaries(0, *content))


def _write_events(
  folder: epath.Path,
  kind: str,
  write: Callable[[metric_writers.SummaryWriter], None],
) -> None:
  """Writes a file of events, replacing that of the same kind."""
  with tempfile.TemporaryDirectory() as aside:
    writer = metric_writers.SummaryWriter(aside)
    write(writer)
    writer.close()
    (path,) = pathlib.Path(aside).iterdir()
    earlier = list(folder.glob(f'events.out.tfevents.*.{kind}'))
    paths.replace(folder / f'{path.name}.{kind}', path.read_bytes())
    for file in earlier:
      file.unlink(missing_ok=True)  # Another worker's, too.


def summary(results: Results, split: str) -> str:
  """How far the sweep is, and its best point by the ELBO at the optimal σ."""
  counts = results.frame.state.value_counts()
  states = ', '.join(f'{count} {state}' for state, count in counts.items())
  text = f'Of {len(results.frame)} points, {states}.'
  table = results.over_seeds(_BEST_BY)
  if table.empty:
    return text
  best = table.loc[table[_BEST_BY].idxmax()]
  return (
    f'{text} Best on the {split} split by its ELBO at the optimal σ, '
    f'{html_page.number(best[_BEST_BY])} {results.units[_BEST_BY]} '
    f'(seeds: {best.seeds:.0f}): {charts.describe(results, best)}.'
  )


def _add_gallery(
  page: html_page.Page, results: Results, folder: epath.Path
) -> None:
  shown = [
    (row, folder / row.point)
    for _, row in results.frame.iterrows()
    if (folder / row.point / SAMPLES).exists()
  ]
  if not shown:
    return
  page.heading('Pictures')
  page.figure((shown[0][1] / ORIGINALS).read_bytes(), 'Originals.')
  page.text(
    'Of each point: reconstructions of the same images through the posterior '
    'mean, and samples decoded from the same z.'
  )
  for row, point in shown:
    name = charts.describe(results, row)
    for path, what in (
      (RECONSTRUCTIONS, 'reconstructions'),
      (SAMPLES, 'samples'),
    ):
      page.figure((point / path).read_bytes(), f'{name}: {what}')


def _add_points(page: html_page.Page, results: Results) -> None:
  keys, units = results.keys, results.units
  names = points.short_names(keys)
  header = ['state', *(names[key] for key in keys)]
  header += [f'{name}, {unit}'.rstrip(', ') for name, unit in units.items()]
  rows = [
    (
      row.state,
      *(points.text(row[key]) for key in keys),
      *(html_page.number(row[name]) for name in units),
      row.point,
      row.error,
    )
    for _, row in results.frame.iterrows()
  ]
  page.heading('Points')
  page.table((*header, 'folder', 'error'), rows)
