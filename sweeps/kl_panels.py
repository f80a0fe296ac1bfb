"""The KL of each dimension in each point of a sweep, as small multiples."""

import textwrap

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from evaluation import plots
from sweeps import chart_style
from sweeps import curves
from sweeps import variation
from sweeps.curves import Curves
from sweeps.curves import Point
from sweeps.results import Result
from sweeps.variation import BETA
from vae import splits

# More panels than these are not looked at one by one.
_MOST_PANELS = 60
# In a row, where they do not make a table.
_COLUMNS = 6

# Inches.
_ALL_COLUMNS = 8.7
_WIDEST = 2.4
_HEIGHT = 1.1
_LINE = 0.13


def draw(results: list[Result]) -> Figure | None:
  """Bars of the KL of each dimension, a panel for each point.

  Of a grid, a row for each curve and a column for each β; else one after the
  other.

  Args:
    results: all points of a sweep.

  Returns:
    None where no point has a KL.
  """
  arranged = curves.arrange(results)
  points = arranged.points(result for result in results if result.kl)
  if not points:
    return None
  if arranged.is_grid and arranged.along == BETA:
    return _draw_table(points, arranged, variation.distinct(results, BETA))
  points = [points[i] for i in splits.spread(len(points), _MOST_PANELS)]
  return _draw_rows(points, arranged)


def _draw_table(
  points: list[Point], arranged: Curves, betas: list[object]
) -> Figure:
  lines = arranged.lines[::-1]  # Upwards, as on an axis.
  figure, panels = _panels(len(lines), len(betas), _HEIGHT, sharex='row')
  empty = set(np.ndindex(panels.shape))
  for point in points:
    place = lines.index(arranged.line(point)), betas.index(point.values[BETA])
    _draw_bars(panels[place], point)
    empty.remove(place)
  for place in empty:
    _clear(panels[place])
  for axes, beta in zip(panels[0], betas, strict=True):
    axes.set_title(f'β {variation.text(beta)}', fontsize=9)
  for axes, line in zip(panels[:, 0], lines, strict=True):
    values = dict(zip(arranged.across, line, strict=True))
    axes.set_ylabel(_in_words(values, arranged.names, 18), fontsize=8)
  return figure


def _draw_rows(points: list[Point], arranged: Curves) -> Figure:
  titles = [_in_words(point.values, arranged.names, 24) for point in points]
  columns = min(_COLUMNS, len(points))
  rows = -(-len(points) // columns)
  title_height = _LINE * max(1 + title.count('\n') for title in titles)
  figure, panels = _panels(rows, columns, _HEIGHT + title_height, sharex='all')
  for axes, point, title in zip(panels.flat, points, titles, strict=False):
    _draw_bars(axes, point)
    axes.set_title(title, fontsize=7.5)
  for axes in panels.flat[len(points) :]:
    _clear(axes)
  # Those above what is empty are the last ones of their columns.
  for axes in panels.flat[len(points) - columns : len(points)]:
    axes.tick_params(labelbottom=True)
  return figure


def _panels(
  rows: int, columns: int, height: float, sharex: str
) -> tuple[Figure, np.ndarray]:
  width = min(_ALL_COLUMNS / columns, _WIDEST)
  figure = Figure(
    figsize=(0.9 + width * columns, 0.8 + height * rows), layout='constrained'
  )
  panels = figure.subplots(
    rows, columns, sharex=sharex, sharey='all', squeeze=False
  )
  for axes in panels.flat:
    plots.style(axes)
    axes.tick_params(labelsize=7, length=2)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
  figure.supxlabel('latent dimension, by its KL', fontsize=10)
  figure.supylabel('KL, nats', fontsize=10)
  return figure, panels


def _in_words(
  values: dict[str, object], called: dict[str, str], width: int
) -> str:
  """Settings in lines of so many letters, each with its name."""
  values = {key: curves.label(value, digits=3) for key, value in values.items()}
  words = variation.describe(values, called)
  together = words.replace(' ', '\N{NO-BREAK SPACE}')
  return textwrap.fill(together.replace(',\N{NO-BREAK SPACE}', ', '), width)


def _draw_bars(axes: Axes, point: Point) -> None:
  kl, active = point.kl()
  plots.kl_bars(axes, kl, active, width=1)
  axes.margins(x=0.02, y=0.25)  # Room for the text.
  axes.text(
    0.97,
    0.97,
    f'{active.sum()} of {len(kl)}\n{kl.sum():.1f} nats',
    ha='right',
    va='top',
    fontsize=7,
    color=chart_style.MUTED,
    transform=axes.transAxes,
  )


def _clear(axes: Axes) -> None:
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0, labelbottom=False)
