"""Charts of a sweep; each function returns None if its data is missing."""

from collections.abc import Mapping
import textwrap

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
import numpy as np
import pandas as pd

from evaluation import plots, posterior
from sweeps import points
from sweeps.points import BETA, Results, SEED
from vae import splits

_MUTED, _FAINT, _MARKERS = '#667085', '#b9c2cf', 'osD^vPX*'

# Without the palest colours, which do not show on white.
_ORDERED = ListedColormap(matplotlib.colormaps['viridis'](np.linspace(0, 0.85)))

# Panels that stay distinguishable.
_MOST_PANELS = 60


def describe(results: Results, values: Mapping[str, object]) -> str:
  """The settings that vary and are given, such as `β 0.5, latent_dim 16`."""
  names = points.short_names(results.keys)
  parts = [
    f'{names[key]} {plots.readable(points.text(values[key], 3))}'
    for key in results.varied
    if key in values
  ]
  return ', '.join(parts) or 'the only point'


def rate_distortion(results: Results) -> Figure | None:
  """Rate and distortion, means and standard deviations over the seeds.

  A grid has a curve along β for each combination of the other settings; many of
  them, as in a search, make a cloud. On the dotted line the ELBO is the best.
  """
  across = [key for key in results.varied if key not in (BETA, SEED)]
  are_curves = len(points.grouped(results.frame, across)) <= len(_MARKERS)
  table = results.over_seeds('rate', 'distortion')
  if table.empty:
    return None
  figure, axes = plots.new_axes(width=7.6, height=4.8)
  axes.set_xlabel('rate, nats per image')
  axes.set_ylabel('distortion, nats per image')
  axes.margins(0.09)
  front = pareto_front(table)
  if are_curves:
    _draw_curves(axes, table, results, across)
  else:
    _draw_cloud(figure, axes, table)
  for _, row in (table if are_curves else front).iterrows():
    if BETA in row:
      place = row.rate, row.distortion
      style = {'textcoords': 'offset points', 'fontsize': 7, 'color': _MUTED}
      axes.annotate(points.text(row[BETA], 3), place, (4, 4), **style)
  steps = {'color': _FAINT, 'lw': 5, 'alpha': 0.4, 'zorder': 0}
  corners = front.rate, front.distortion
  axes.step(*corners, where='post', label='Pareto front', **steps)
  sums = table.rate + table.distortion
  best = table.loc[sums.idxmin()]
  line = {'color': _MUTED, 'lw': 0.8, 'ls': ':', 'zorder': 0}
  line['label'] = f'best ELBO, {-sums.min():,.1f} nats'
  axes.axline((best.rate, best.distortion), slope=-1, **line)
  title = 'beside the points: β' if BETA in table else None
  style = {'frameon': False, 'fontsize': 8.5, 'title_fontsize': 8.5}
  figure.legend(title=title, loc='outside right upper', **style)
  return figure


def pareto_front(table: pd.DataFrame) -> pd.DataFrame:
  """Rows than which no other has less rate and less distortion, by rate."""
  table = table.sort_values(['rate', 'distortion'])
  best = table.distortion.cummin().shift(fill_value=np.inf)
  return table[table.distortion < best]


def _draw_curves(axes: Axes, table, results, across) -> None:
  curves = list(points.grouped(table, across))
  colors = _ORDERED(np.linspace(0, 1, len(curves)))
  for (_, curve), color, marker in zip(curves, colors, _MARKERS, strict=False):
    axes.errorbar(
      curve.rate,
      curve.distortion,
      xerr=curve.rate_std,
      yerr=curve.distortion_std,
      elinewidth=1,
      color=color,
      marker=marker,
      label=describe(results, curve.iloc[0][across]) if across else None,
    )


def _draw_cloud(figure: Figure, axes: Axes, table) -> None:
  """Draws points coloured by β, or another setting that is a number."""
  keys = [key for key in table if '.' in key]
  numeric = [k for k in keys if table[k].map(points.is_number).all()]
  key = BETA if BETA in numeric else next(iter(numeric), None)
  colors = table[key].astype(float) if key else None
  dots = axes.scatter(table.rate, table.distortion, c=colors)
  if key:
    dots.set_cmap(_ORDERED)
    figure.colorbar(dots, aspect=40, label=points.short_names(keys)[key])


def kl_panels(results: Results) -> Figure | None:
  """KL of each latent dimension, sorted, in a panel for each point.

  A grid has a column for each value of the last setting. Means over the seeds
  are of the first dimension of each, of the second, and so on.
  """
  keys = [key for key in results.varied if key != SEED]
  groups = list(points.grouped(results.frame, keys))
  if not any(map(np.ndim, results.frame.kl)):
    return None
  columns = results.frame[keys[-1]].nunique(False) if keys else 1
  if columns > 12 or len(groups) > _MOST_PANELS:
    columns = 6
  groups = [groups[i] for i in splits.spread(len(groups), _MOST_PANELS)]
  shape = -(-len(groups) // columns), columns
  width = min(8.7 / columns, 2.4) * columns
  figure = Figure((0.9 + width, 0.8 + 1.4 * shape[0]), layout='constrained')
  panels = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
  for axes in panels:
    axes.set_axis_off()
  for axes, (_, group) in zip(panels, groups, strict=False):
    measured = group[group.kl.map(np.ndim) == 1]
    if len(measured):
      _draw_kl(axes, measured)
      label = describe(results, group.iloc[0][keys])
      axes.set_title(textwrap.fill(label, 26), fontsize=7)
  figure.supxlabel('latent dimension, by its KL', fontsize=10)
  figure.supylabel('KL, nats', fontsize=10)
  return figure


def _draw_kl(axes: Axes, group: pd.DataFrame) -> None:
  """Draws the KL of a point's seeds, its sum, and the active dimensions."""
  kl, active = np.stack(list(group.kl)), np.stack(list(group.active))
  order = np.array([posterior.most_informative(row) for row in kl])
  kl = np.take_along_axis(kl, order, axis=1).mean(axis=0)
  active = np.take_along_axis(active, order, axis=1).mean(axis=0) >= 0.5
  axes.set_axis_on()
  plots.style(axes)
  axes.tick_params(labelsize=7, length=2)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
  plots.kl_bars(axes, kl, active, width=1)
  axes.margins(x=0.02, y=0.3)
  label = f'{active.sum()} of {len(kl)} active\n{kl.sum():.1f} nats'
  style = {'fontsize': 7, 'color': _MUTED, 'transform': axes.transAxes}
  axes.text(0.97, 0.97, label, ha='right', va='top', **style)
