"""Charts of a sweep; each function returns None if its data is missing."""

import textwrap

import adjustText
import matplotlib
from matplotlib import patheffects, ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
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

# Curves, values on a curve, and panels that stay distinguishable.
_MOST_CURVES, _MOST_VALUES, _MOST_PANELS = 8, 12, 60


def _axes_of(results: Results) -> tuple[list[str], list[str], bool]:
  """Divides the settings that vary, but for the seed.

  Returns:
    The setting along a curve (one or none), those that differ between curves,
    and whether the points are a grid of curves rather than a cloud.
  """
  varied = [key for key in results.varied if key != SEED]
  along = varied if len(varied) == 1 else [k for k in varied if k == BETA]
  across = [key for key in varied if key not in along]
  count = lambda keys: len(points.grouped(results.frame, keys))
  shape = count(across), count(along)
  is_grid = shape[0] <= _MOST_CURVES and shape[1] <= _MOST_VALUES
  # Most combinations are there.
  is_grid &= 2 * count(across + along) >= shape[0] * shape[1]
  return along, across, is_grid


def _describe(results: Results, keys: list[str], values: tuple) -> str:
  """Settings in words, such as `β 0.5, latent_dim 16`."""
  names = points.short_names(results.keys)
  return ', '.join(
    f'{names[key]}\N{NO-BREAK SPACE}{plots.readable(points.text(value, 3))}'
    for key, value in zip(keys, values, strict=True)
  )


def rate_distortion(results: Results) -> Figure | None:
  """Rate and distortion, means and standard deviations over the seeds.

  A grid has a curve along β for each combination of the other settings; a
  search is a cloud. The grey steps are the Pareto front; on the dotted line the
  ELBO is that of the best point.
  """
  along, across, is_grid = _axes_of(results)
  table = results.over_seeds('rate', 'distortion')
  if table.empty:
    return None
  figure, axes = plots.new_axes(width=6.6, height=5.0)
  axes.set_xlabel('rate, nats per image')
  axes.set_ylabel('distortion, nats per image')
  axes.margins(0.09)
  names = points.short_names(results.keys)
  if is_grid:
    curves = _draw_curves(axes, table, results, along, across)
    if across:
      figure.legend(
        handles=curves,
        title=names[across[0]] if len(across) == 1 else None,
        loc='outside right upper',
        frameon=False,
        fontsize=9,
      )
  else:
    _draw_cloud(figure, axes, table, along + across, names)
  front = pareto_front(table)
  corners = front.rate, front.distortion
  (steps,) = axes.step(*corners, where='post', color=_FAINT, lw=5, alpha=0.4)
  steps.set(zorder=0, label='Pareto front')
  sums = table.rate + table.distortion
  best = table.loc[sums.idxmin()]
  line = axes.axline((best.rate, best.distortion), slope=-1)
  line.set(color=_MUTED, lw=0.8, ls=':', zorder=0)
  line.set_label(f'best ELBO, {-sums.min():,.1f} nats')
  labels = along or across
  title = (
    f'labels: {", ".join(names[key] for key in labels)}' if labels else None
  )
  axes.legend(
    handles=[steps, line],
    title=title,
    frameon=False,
    fontsize=8.5,
    title_fontsize=8.5,
    alignment='left',
    loc='upper right',
  )
  if labels:
    _label(axes, table, table if is_grid else front, labels)
  return figure


def pareto_front(table: pd.DataFrame) -> pd.DataFrame:
  """Rows than which no other has less rate and less distortion, by rate."""
  table = table.sort_values(['rate', 'distortion'])
  best = table.distortion.cummin().shift(fill_value=np.inf)
  return table[table.distortion < best]


def _errors(table: pd.DataFrame) -> dict[str, object]:
  """Error bars over several seeds, for `Axes.errorbar`."""
  if table.seeds.max() < 2:
    return {}
  x, y = table.rate_std.fillna(0), table.distortion_std.fillna(0)
  return {'xerr': x, 'yerr': y, 'elinewidth': 1}


def _draw_curves(axes: Axes, table, results, along, across) -> list[Artist]:
  curves, handles = list(points.grouped(table, across)), []
  colors = _ORDERED(np.linspace(0, 1, len(curves)))
  for (values, curve), color, marker in zip(
    curves, colors, _MARKERS, strict=False
  ):
    label = None
    if len(across) == 1:
      label = plots.readable(points.text(values[0]))
    elif across:
      label = _describe(results, across, values)
    handles.append(
      axes.errorbar(
        curve.rate,
        curve.distortion,
        **_errors(curve),
        color=color,
        marker=marker,
        linestyle='-' if along == [BETA] else 'none',
        linewidth=1.4,
        label=label,
      )
    )
  return handles


def _draw_cloud(figure: Figure, axes: Axes, table, keys, names) -> None:
  """Draws points coloured by the first numeric setting, β if it varies."""
  place = table.rate, table.distortion
  axes.errorbar(*place, **_errors(table), fmt='none', ecolor=_FAINT)
  numeric = [k for k in keys if table[k].map(points.is_number).all()]
  if not numeric:
    axes.scatter(*place, color=_MUTED)
    return
  values = table[numeric[0]].astype(float)
  is_log = values.min() > 0 and values.max() >= 8 * values.min()
  norm = 'log' if is_log else 'linear'
  dots = axes.scatter(*place, c=values, norm=norm, cmap=_ORDERED, s=38)
  bar = figure.colorbar(dots, ax=axes, aspect=40, label=names[numeric[0]])
  bar.outline.set_visible(False)
  if is_log:
    bar.ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
  bar.ax.minorticks_off()
  bar.ax.yaxis.set_major_formatter('{x:g}')


def _label(axes: Axes, table, labelled, keys: list[str]) -> None:
  """Labels points with their settings, where there is room."""
  FigureCanvasAgg(axes.figure)
  plots.draw_as_written(axes.figure)
  axes.figure.draw_without_rendering()  # Places are found in the final layout.
  halo = [patheffects.withStroke(linewidth=2.5, foreground='white')]
  style = {'fontsize': 8, 'color': _MUTED, 'path_effects': halo}
  texts = []
  for _, row in labelled.iterrows():
    label = ', '.join(plots.readable(points.text(row[k], 3)) for k in keys)
    place = row.rate, row.distortion
    texts.append(axes.text(*place, label, parse_math=False, **style))
    texts[-1].set_in_layout(False)
  adjustText.adjust_text(
    texts,
    table.rate.to_numpy(),
    table.distortion.to_numpy(),
    ax=axes,
    objects=[axes.get_legend()],
    expand=(1.4, 1.7),
    max_move=None,
    arrowprops={'arrowstyle': '-', 'color': _FAINT, 'lw': 0.6},
    min_arrow_len=8,
  )


def kl_panels(results: Results) -> Figure | None:
  """KL of each latent dimension, sorted, in a panel for each point.

  A grid has a row for each curve and a column for each β. Means over the seeds
  are of the first dimension of each, of the second, and so on.
  """
  along, across, is_grid = _axes_of(results)
  measured = results.frame[results.frame.kl.map(np.ndim) == 1]
  groups = list(points.grouped(measured, across + along))
  if not groups:
    return None
  if is_grid and along == [BETA]:
    rows = [v for v, _ in points.grouped(results.frame, across)][::-1]
    columns = sorted(v for v, _ in points.grouped(results.frame, along))
    shape = len(rows), len(columns)
    places = [
      (rows.index(v[:-1] or 0), columns.index(v[-1:])) for v, _ in groups
    ]
  else:
    groups = [groups[i] for i in splits.spread(len(groups), _MOST_PANELS)]
    shape = -(-len(groups) // 6), min(6, len(groups))
    places = [divmod(i, 6) for i in range(len(groups))]
  width = min(8.7 / shape[1], 2.4) * shape[1]
  figure = Figure((0.9 + width, 0.8 + 1.4 * shape[0]), layout='constrained')
  panels = figure.subplots(*shape, sharey=True, squeeze=False)
  for axes in panels.flat:
    axes.set_axis_off()
  for place, (values, group) in zip(places, groups, strict=True):
    _draw_kl(panels[place], group)
    values = values if across + along else ()
    label = _describe(results, across + along, values)
    panels[place].set_title(textwrap.fill(label, 26), fontsize=7)
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
