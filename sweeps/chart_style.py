"""What the charts of a sweep have in common.

Colours of an order differ in lightness too, and curves in their markers, so
that they are told apart by the colour-blind and on grey paper.
"""

import matplotlib
from matplotlib import colors
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
import numpy as np

from sweeps import curves

MARKERS = 'osD^vPX*'
INK = '#1f2430'
MUTED = '#667085'
FAINT = '#b9c2cf'
RULE = '#e3e7ee'

# Without its palest yellow, which does not show on white.
ORDERED = colors.ListedColormap(
  matplotlib.colormaps['viridis'](np.linspace(0, 0.85, 256))
)
# Light enough for letters, and without white, which is what is missing.
SHADES = colors.ListedColormap(
  matplotlib.colormaps['Blues'](np.linspace(0.05, 0.56, 256))
)


def palette(count: int) -> np.ndarray:
  """Colours of so many curves, RGBA [count, 4]."""
  return ORDERED(np.linspace(0, 1, count))


def spans_decades(values: list[float]) -> bool:
  """Whether values are better told apart by their logarithms."""
  return min(values) > 0 and max(values) / min(values) >= 8


def norm(values: list[float]) -> colors.Normalize:
  """From values to places in a colour map."""
  kind = colors.LogNorm if spans_decades(values) else colors.Normalize
  return kind(min(values), max(values))


def color_bar(
  figure: Figure, axes: Axes, of: colors.Normalize, label: str
) -> None:
  """Says what the colours of `ORDERED` stand for."""
  bar = figure.colorbar(ScalarMappable(of, ORDERED), ax=axes, aspect=40)
  bar.set_label(label)
  bar.outline.set_visible(False)
  if isinstance(of, colors.LogNorm):
    bar.ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
  bar.ax.minorticks_off()
  bar.ax.yaxis.set_major_formatter('{x:g}')


def legend(figure: Figure, handles: list[Artist], title: str) -> None:
  """Below the chart, where it covers nothing, in as many columns as fit."""
  labels = [handle.get_label() for handle in handles]
  longest = max(map(len, labels), default=0)
  figure.legend(
    handles=handles,
    title=title,
    loc='outside lower center',
    ncols=max(1, min(4, 64 // (longest + 6))),
    frameon=False,
    fontsize=9,
    title_fontsize=9,
  )


def log_if_wide(axes: Axes, values: list[float]) -> None:
  """Makes the x-axis fit values such as those of β, ticks at a few of them."""
  low, high = min(values), max(values)
  positive = [value for value in values if value > 0]
  if spans_decades(values):
    axes.set_xscale('log')
  elif low == 0 and positive and spans_decades(positive):
    axes.set_xscale('symlog', linthresh=min(positive), linscale=0.5)
  if len(values) <= curves.MOST_VALUES and low < high:
    axes.set_xticks(values, [f'{value:g}' for value in values])
  else:
    if axes.get_xscale() == 'log':
      axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter('{x:g}')
  axes.minorticks_off()
