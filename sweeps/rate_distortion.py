"""The chart of rate and distortion of a sweep's points."""

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np

from evaluation import plots
from sweeps import chart_style
from sweeps import curves
from sweeps import point_labels
from sweeps import variation
from sweeps.curves import Curves
from sweeps.curves import Point
from sweeps.results import Result
from sweeps.variation import BETA
from sweeps.variation import LATENT_DIM

# More values than these are not told apart by the shapes of markers.
_MOST_SHAPES = 6


def draw(results: list[Result]) -> Figure | None:
  """Draws the points, means over the seeds; None where there is none.

  Those of a grid are joined in the order of β, a line for each combination of
  the other settings; a random search is a cloud, with its Pareto front.

  Args:
    results: all points of a sweep.
  """
  arranged = curves.arrange(results)
  points = arranged.points(variation.finite(results, 'rate', 'distortion'))
  if not points:
    return None
  figure, axes = plots.new_axes(width=5.6, height=5.4)
  axes.set_xlabel('rate, nats per image')
  axes.set_ylabel('distortion, nats per image')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter('{x:,g}')
  axes.margins(0.09)
  if arranged.is_grid:
    lines = _draw_curves(axes, points, arranged)
    guides, labelled = [], points
    entries, title = lines if arranged.across else [], arranged.title()
    keys = [arranged.along] if arranged.along else []
  else:
    labelled = pareto_front(points)
    lines, guides = [], [_draw_front(axes, labelled)]
    entries, title = _draw_cloud(figure, axes, points, arranged)
    keys = [arranged.along] if arranged.along else arranged.across
  if entries:
    chart_style.legend(figure, entries, title)
  axes.legend(
    handles=[*guides, _draw_best_elbo(axes, points)],
    title=f'At the points: {", ".join(arranged.names[key] for key in keys)}'
    if keys
    else None,
    loc='best',
    alignment='left',
    frameon=False,
    fontsize=8.5,
    title_fontsize=8.5,
  )
  if keys:
    point_labels.place(
      axes,
      [
        (*_xy(point), point.text(keys, digits=6 if arranged.is_grid else 3))
        for point in labelled
      ],
      np.array([_xy(point) for point in points]),
      [line.get_xydata() for line in lines] + _deviations(points),
      chart_style.MUTED,
      # Below and left of a front there is nothing.
      side=1 if arranged.is_grid else -1,
    )
  return figure


def pareto_front(points: list[Point]) -> list[Point]:
  """Those than which no other has less rate and less distortion, by rate."""
  front = []
  for point in sorted(points, key=_xy):
    if not front or _xy(point)[1] < _xy(front[-1])[1]:
      front.append(point)
  return front


def _xy(point: Point) -> tuple[float, float]:
  return point.mean('rate'), point.mean('distortion')


def _draw_curves(
  axes: Axes, points: list[Point], arranged: Curves
) -> list[Line2D]:
  palette = chart_style.palette(len(arranged.lines))
  lines = []
  for index, line in enumerate(arranged.lines):
    members = [point for point in points if arranged.line(point) == line]
    if not members:
      continue
    _draw_deviations(axes, members, color=palette[index])
    lines += axes.plot(
      *zip(*map(_xy, members), strict=True),
      color=palette[index],
      marker=chart_style.MARKERS[index],
      markersize=6,
      linestyle='-' if arranged.along == BETA else 'none',
      linewidth=1.4,
      label=arranged.name(line),
    )
  return lines


def _draw_cloud(
  figure: Figure, axes: Axes, points: list[Point], arranged: Curves
) -> tuple[list[Line2D], str]:
  """Colours points by β, or else by a number, and shapes them by latent_dim.

  Returns:
    The shapes, and what they stand for, as a legend needs them.
  """
  values = {
    key: list(dict.fromkeys(point.values[key] for point in points))
    for key in arranged.keys
  }
  numbers = [
    key for key in values if all(map(variation.is_number, values[key]))
  ]
  colored = BETA if BETA in numbers else next(iter(numbers), None)
  if colored:
    norm = chart_style.norm(values[colored])
    chart_style.color_bar(figure, axes, norm, arranged.names[colored])
  shaped = LATENT_DIM if colored != LATENT_DIM else None
  if not 1 < len(values.get(shaped, ())) <= _MOST_SHAPES:
    shaped = None
  _draw_deviations(axes, points, color=chart_style.FAINT)
  entries = []
  for marker, shape in zip(
    chart_style.MARKERS,
    sorted(values[shaped]) if shaped else [None],
    strict=False,
  ):
    members = [point for point in points if point.values.get(shaped) == shape]
    axes.scatter(
      *np.array([_xy(point) for point in members]).T,
      c=chart_style.ORDERED(norm([point.values[colored] for point in members]))
      if colored
      else chart_style.MUTED,
      marker=marker,
      s=38,
      zorder=3,
    )
    # In the legend, without any of the colours.
    entries += axes.plot(
      [], [], marker, color=chart_style.MUTED, label=variation.text(shape)
    )
  return (entries, arranged.names[shaped]) if shaped else ([], '')


def _draw_deviations(axes: Axes, points: list[Point], color) -> None:
  """Standard deviations over the seeds, where there are several."""
  points = [point for point in points if len(point.results) > 1]
  if points:
    axes.errorbar(
      *np.array([_xy(point) for point in points]).T,
      xerr=[point.deviation('rate') for point in points],
      yerr=[point.deviation('distortion') for point in points],
      fmt='none',
      ecolor=color,
      elinewidth=1,
    )


def _deviations(points: list[Point]) -> list[np.ndarray]:
  """The same as lines, [2, 2] each."""
  lines = []
  for point in points:
    center = np.array(_xy(point))
    for metric, direction in (('rate', (1, 0)), ('distortion', (0, 1))):
      reach = point.deviation(metric) * np.array(direction)
      lines.append(np.array([center - reach, center + reach]))
  return lines


def _draw_front(axes: Axes, front: list[Point]) -> Line2D:
  """Steps: from each point on to the right, none is below it."""
  corners = np.repeat([_xy(point) for point in front], 2, axis=0)
  corners = np.stack([corners[1:, 0], corners[:-1, 1]], axis=1)
  (line,) = axes.plot(
    *corners.T, color=chart_style.FAINT, linewidth=1.4, label='Pareto front'
  )
  return line


def _draw_best_elbo(axes: Axes, points: list[Point]) -> Line2D:
  """Where the ELBO, -distortion - rate, is that of the best point."""
  rate, distortion = min(map(_xy, points), key=sum)
  return axes.axline(
    (rate, distortion),
    slope=-1,
    color=chart_style.INK,
    linewidth=0.8,
    linestyle=':',
    zorder=1,
    label=f'best ELBO, {-rate - distortion:,.1f} nats',
  )
