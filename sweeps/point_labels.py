"""Labels at the points of a chart, where there is room for them."""

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
import numpy as np

from evaluation import plots

# Points of typography.
_DISTANCE = 4.5
_FONT_SIZE = 8.5
_MARKER = 8
# The same label is not repeated within this distance.
_REPEAT = 26

# Where a label may be, seen from its point, the best first; or the other way
# round.
_DIRECTIONS = (
  (1, 1),
  (-1, -1),
  (1, -1),
  (-1, 1),
  (0, 1),
  (0, -1),
  (1, 0),
  (-1, 0),
)


def place(
  axes: Axes,
  labels: list[tuple[float, float, str]],
  points: np.ndarray,
  lines: list[np.ndarray],
  color: str,
  side: int,
) -> None:
  """Labels points; leaves out what would cover another label, point or line.

  Args:
    axes: with everything on it but the labels, its legend too.
    labels: x, y and text of each, the most important first.
    points: all that are there, [n, 2].
    lines: that are there, [n, 2] each.
    color: of the labels.
    side: 1 where above and right of the points is best, -1 below and left.
  """
  figure = axes.figure
  plots.draw_as_written(figure)
  renderer = FigureCanvasAgg(figure).get_renderer()
  figure.draw_without_rendering()  # Lays out.
  per_point = figure.dpi / 72
  frame = axes.get_window_extent()

  def pixels(xy):
    return axes.transData.transform(np.reshape(xy, (-1, 2)))

  radii = [_MARKER / 2] * len(points)
  dots = [pixels(points)]
  for line in lines:
    dots.append(_fill(pixels(line)))
    radii += [0.5] * len(dots[-1])
  dots, reach = np.concatenate(dots), np.array(radii)[:, None] * per_point
  legend = axes.get_legend().get_window_extent()
  taken = np.concatenate([dots - reach, dots + reach], axis=1)
  taken = np.concatenate([taken, [legend.extents]])
  placed = []
  for x, y, text in labels:
    (center,) = pixels((x, y))
    if any(
      other == text and np.linalg.norm(center - where) < _REPEAT * per_point
      for other, where in placed
    ):
      continue
    label = axes.annotate(
      text,
      (x, y),
      xytext=(0, 0),
      textcoords='offset points',
      fontsize=_FONT_SIZE,
      color=color,
      parse_math=False,
    )
    # Else labels would move the chart from where they were fitted to.
    label.set_in_layout(False)
    box = label.get_window_extent(renderer)
    for direction in side * np.array(_DIRECTIONS):
      low = center + _DISTANCE * direction * per_point
      low -= (1 - direction) / 2 * box.size
      high = low + box.size
      inside = (low >= frame.min).all() and (high <= frame.max).all()
      if inside and not _overlap(taken, low, high):
        label.set_position(_DISTANCE * direction)
        label.set_ha(('center', 'left', 'right')[direction[0]])
        label.set_va(('center', 'bottom', 'top')[direction[1]])
        taken = np.concatenate([taken, [[*low, *high]]])
        placed.append((text, center))
        break
    else:
      label.remove()


def _overlap(boxes, low, high) -> bool:
  return bool(((boxes[:, :2] < high) & (boxes[:, 2:] > low)).all(axis=1).any())


def _fill(path: np.ndarray) -> np.ndarray:
  """Points along a line, [30 (n - 1) + 1, 2]."""
  steps = np.arange(30)[:, None, None] / 30
  between = path[:-1] + steps * (path[1:] - path[:-1])
  return np.concatenate([between.reshape(-1, 2), path[-1:]])
