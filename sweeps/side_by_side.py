"""Sweeps side by side: their curves, and paired differences of equal points.

What is compared was measured by the sweeps; nothing is trained or measured.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import io
import json
from typing import Any

from etils import epath
from matplotlib.figure import Figure
import numpy as np
import pandas as pd

from evaluation import comparison, html_page, plots, titles
from runs import schema, workdirs
from sweeps import charts, POINTS, points, report, TABLE
from sweeps.points import Results, SEED
from vae import paths
from vae.errors import UserError

# What is compared, and its unit.
_METRICS = {
  'elbo_optimal_sigma': 'nats per image',
  'elbo': 'nats per image',
  'rate': 'nats per image',
  'distortion': 'nats per image',
  'mse_of_mean': 'mean over pixels',
  'active_units': 'dimensions',
}

# Settings that change the images that are measured.
_OF_IMAGES = 'image_size', 'channels', 'crop_size', 'binarize'

_COLORS = '#2f6fbb', '#c4572f', '#3b8f5a', '#8a56b0', '#7a6a2f'


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The complete points of a sweep.

  Attributes:
    name: in tables and charts.
    folder: its workdir.
    results: its table.
    split: the split that the points were measured on.
    config: of one point, flat; for the settings that do not vary.
    data: numbers and digests of the images of that point, by name.
  """

  name: str
  folder: epath.Path
  results: Results
  split: str
  config: dict[str, Any]
  data: dict[str, Any]

  @classmethod
  def read(cls, name: str, folder: epath.Path) -> 'Sweep':
    """From its workdir; raises UserError if no point is complete."""
    frame = pd.read_csv(io.StringIO((folder / TABLE).read_text()))
    frame = frame[frame.state == 'complete']
    if frame.empty:
      raise UserError(f'{folder} has no complete point yet.')
    keys = [key for key in frame if key == SEED or '.' in key]
    units = {name: unit for name, unit in _METRICS.items() if name in frame}
    rows = frame.to_dict('records')
    point = folder / POINTS / rows[0]['point']
    return cls(
      name,
      folder,
      Results.of(rows, keys, units),
      rows[0].get('split', ''),
      schema.flatten(workdirs.load_config(point)),
      json.loads((point / workdirs.DATA).read_text()),
    )


def check(sweeps: Sequence[Sweep]) -> None:
  """Raises UserError if the sweeps were measured on other images."""
  first = sweeps[0]
  for sweep in sweeps[1:]:
    if sweep.split != first.split:
      raise UserError(
        f'{sweep.folder} was measured on {sweep.split} images, and '
        f'{first.folder} on {first.split} images.'
      )
    if sweep.data != first.data:
      raise UserError(f'{sweep.folder} has other images than {first.folder}.')
    for key in (f'data.{name}' for name in _OF_IMAGES):
      if sweep.config[key] != first.config[key]:
        raise UserError(
          f'{sweep.folder} has config.{key}={sweep.config[key]}, and '
          f'{first.folder} {first.config[key]}: other images.'
        )


def differences(sweeps: Sequence[Sweep]) -> tuple[int, list[tuple[str, ...]]]:
  """The number of pairs, and rows as of `comparison.differences`.

  Points are pairs if they agree in all settings that vary in any sweep; the
  error is over the pairs.
  """
  tables = _paired(sweeps)
  count = len(tables[0])
  if not count:
    return 0, []
  rows = []
  for name, unit in _METRICS.items():
    if all(name in table for table in tables):
      first = tables[0][name].to_numpy()
      cells = [html_page.number(first.mean())]
      for table in tables[1:]:
        cells.append(comparison.difference(table[name].to_numpy() - first))
      rows.append((name, *cells, unit, titles.better(name)))
  return count, rows


def _paired(sweeps: Sequence[Sweep]) -> list[pd.DataFrame]:
  """Metrics of each sweep at the settings that all of them have."""
  keys = list(dict.fromkeys(k for s in sweeps for k in s.results.keys))
  tables = []
  for sweep in sweeps:
    frame, metrics = sweep.results.frame.copy(), list(sweep.results.units)
    for key in keys:
      if key not in frame:
        frame[key] = [sweep.config.get(key)] * len(frame)
      frame[key] = [points.text(value, digits=12) for value in frame[key]]
    tables.append(frame.set_index(keys)[metrics].dropna())
  shared = functools.reduce(pd.Index.intersection, (t.index for t in tables))
  return [table.loc[shared] for table in tables]


def rate_distortion(sweeps: Sequence[Sweep]) -> Figure:
  """Each sweep's points and Pareto front, means over the seeds."""
  figure, axes = plots.new_axes(width=7.6, height=4.8)
  axes.set(xlabel='rate, nats per image', ylabel='distortion, nats per image')
  for index, sweep in enumerate(sweeps):
    table = sweep.results.over_seeds('rate', 'distortion')
    if table.empty:
      continue
    style = {'color': _COLORS[index % len(_COLORS)]}
    axes.errorbar(
      table.rate,
      table.distortion,
      xerr=table.rate_std,
      yerr=table.distortion_std,
      marker='osD^v'[index % 5],
      ls='',
      elinewidth=1,
      label=plots.readable(sweep.name),
      **style,
    )
    front = charts.pareto_front(table)
    axes.step(front.rate, front.distortion, where='post', alpha=0.5, **style)
  axes.legend(frameon=False)
  return figure


def write(path: epath.Path, sweeps: Sequence[Sweep]) -> None:
  """Writes the page, one file."""
  names = [sweep.name for sweep in sweeps]
  page = html_page.Page(' and '.join(names))
  page.heading('Numbers')
  count, rows = differences(sweeps)
  if rows:
    page.text(
      f'Means over the {count} points with the same varied settings, measured '
      f'on {sweeps[0].split} images, and '
      f'differences from {names[0]}, point by point; ± is the standard error '
      'over these pairs. ELBOs and distortions of different likelihoods are '
      'not comparable.'
    )
    header = ('', names[0], *(f'{name} − {names[0]}' for name in names[1:]))
    page.table((*header, 'unit', 'better'), rows, stacks=True)
  else:
    page.text('No point has the same settings in all of them.')
  page.heading('Settings')
  settings = _settings(sweeps)
  page.table(('', *names), settings, stacks=True)
  page.text('Settings that differ.' if settings else 'All are the same.')
  page.heading('Best points')
  # Autoencoders without sampling have no bound.
  by = next(m for m in _METRICS if all(m in s.results.units for s in sweeps))
  best = [(sweep, *_best(sweep, by)) for sweep in sweeps]
  page.table(
    ('', 'settings', by, 'folder'),
    [
      (sweep.name, described, html_page.number(row[by]), point)
      for sweep, row, described, point in best
    ],
    stacks=True,
  )
  page.heading('Rate and distortion')
  page.figure(
    plots.png(rate_distortion(sweeps)),
    'Means over the seeds, with standard deviations, and the Pareto front of '
    'each sweep.',
    width=790,
  )
  for index, (picture, caption) in enumerate(_pictures(best)):
    if not index:
      page.heading('Pictures of the best points')
    page.figure(picture.read_bytes(), caption)
  paths.replace(path, page.html().encode())


def _settings(sweeps: Sequence[Sweep]) -> list[tuple[str, ...]]:
  """The settings in which the sweeps differ, with all values of each."""
  columns = []
  for sweep in sweeps:
    texts = {key: points.text(value) for key, value in sweep.config.items()}
    for key in sweep.results.varied:
      values = dict.fromkeys(map(points.text, sweep.results.frame[key]))
      texts[key] = ', '.join(values)
    columns.append(texts)
  return comparison.differing(columns)


def _best(sweep: Sweep, by: str) -> tuple[pd.Series, str, str]:
  """The row of the best point, its settings, and its folder's name."""
  frame = sweep.results.frame
  row = frame.loc[frame[by].fillna(-np.inf).idxmax()]
  return row, charts.describe(sweep.results, row), row.point


def _pictures(best) -> Iterator[tuple[epath.Path, str]]:
  folders = [sweep.folder / POINTS / point for sweep, _, _, point in best]
  if (folders[0] / report.ORIGINALS).exists():
    yield folders[0] / report.ORIGINALS, 'Originals.'
  for (sweep, _, described, _), folder in zip(best, folders, strict=True):
    for name, what in (
      (report.RECONSTRUCTIONS, 'reconstructions'),
      (report.SAMPLES, 'samples'),
    ):
      if (folder / name).exists():
        yield folder / name, f'{sweep.name}, {described}: {what}'
