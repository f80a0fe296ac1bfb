"""Charts of a sweep over β and the latent dimension.

A function takes all points, and returns None where its data is missing.
"""

from matplotlib import patches
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from evaluation import plots
from sweeps import chart_style
from sweeps import curves
from sweeps import variation
from sweeps.results import Result
from sweeps.variation import BETA
from sweeps.variation import LATENT_DIM


def heat_map(results: list[Result], metric: str) -> Figure | None:
  """A metric over β and latent_dim, means over all other settings."""
  varied = variation.varied(results)
  measured = variation.finite(results, metric)
  if not measured or not {BETA, LATENT_DIM} <= set(varied):
    return None
  if not curves.is_grid(results, [LATENT_DIM], [BETA]):
    return None
  betas = variation.distinct(results, BETA)
  dims = variation.distinct(results, LATENT_DIM)
  cells = variation.grouped(measured, [LATENT_DIM, BETA])
  values = np.array(
    [
      [variation.mean(cells.get((dim, beta), []), metric) for beta in betas]
      for dim in dims
    ]
  )
  figure, axes = plots.new_axes(
    width=max(4.9, 0.7 + 0.55 * len(betas)), height=1.2 + 0.42 * len(dims)
  )
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0)
  axes.imshow(
    np.ma.masked_invalid(values),
    cmap=chart_style.SHADES,
    aspect='auto',
    origin='lower',
  )
  number = _number_format(values[np.isfinite(values)])
  for (row, column), value in np.ndenumerate(values):
    if np.isfinite(value):
      axes.text(
        column,
        row,
        number.format(value).replace('-', '−'),
        ha='center',
        va='center',
        fontsize=8.5,
        color=chart_style.INK,
      )
    else:
      _hatch(axes, column, row)
  # Gaps between the cells.
  for edge in range(1, len(betas)):
    axes.axvline(edge - 0.5, color='white', linewidth=2)
  for edge in range(1, len(dims)):
    axes.axhline(edge - 0.5, color='white', linewidth=2)
  axes.set_xticks(range(len(betas)), map(variation.text, betas))
  axes.set_yticks(range(len(dims)), map(variation.text, dims))
  axes.set_xlabel('β')
  axes.set_ylabel(variation.names(varied)[LATENT_DIM])
  unit = variation.unit(measured, metric)
  axes.set_title(
    f'{metric}, {unit}' if unit else metric, loc='left', fontsize=10
  )
  return figure


def _number_format(values: np.ndarray) -> str:
  """The same digits after the point in every cell, three or more in all."""
  size = np.abs(values).max()
  if size >= 100 or (values == np.round(values)).all():
    return '{:,.0f}'
  return '{:.1f}' if size >= 10 else '{:.2f}'


def _hatch(axes: Axes, x: float, y: float) -> None:
  cell = patches.Rectangle(
    (x - 0.5, y - 0.5),
    1,
    1,
    facecolor='none',
    edgecolor=chart_style.FAINT,
    hatch='////',
    linewidth=0,
  )
  axes.add_patch(cell)


def active_units(results: list[Result]) -> Figure | None:
  """Active units by β and latent_dim, means over all other settings."""
  varied = variation.varied(results)
  measured = variation.finite(results, 'active_units')
  if not measured or BETA not in varied:
    return None
  figure, axes = plots.new_axes(width=4.9, height=4.2)
  dims = variation.distinct(results, LATENT_DIM)
  name = variation.names(varied).get(LATENT_DIM)
  few = len(dims) <= curves.MOST_CURVES
  norm = None if few else chart_style.norm(dims)
  palette = (
    chart_style.palette(len(dims)) if few else chart_style.ORDERED(norm(dims))
  )
  handles = []
  for index, dim in enumerate(dims):
    cells = variation.grouped(
      (r for r in measured if variation.setting(r, LATENT_DIM) == dim), [BETA]
    )
    curve = axes.errorbar(
      [beta for (beta,) in cells],
      [variation.mean(cell, 'active_units') for cell in cells.values()],
      [variation.deviation(cell, 'active_units') for cell in cells.values()],
      color=palette[index],
      marker=chart_style.MARKERS[index] if few else 'o',
      markersize=6,
      linestyle='-' if curves.arrange(results).is_grid else 'none',
      linewidth=1.4,
      elinewidth=1,
      label=variation.text(dim),
    )
    handles.append(curve)
  chart_style.log_if_wide(axes, variation.distinct(measured, BETA))
  axes.set_xlabel('β')
  axes.set_ylabel('active units')
  axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set_ylim(bottom=0)
  axes.grid(axis='y', color=chart_style.RULE)
  axes.set_axisbelow(True)
  if name and few:
    chart_style.legend(figure, handles, name)
  elif name:
    chart_style.color_bar(figure, axes, norm, name)
  return figure
