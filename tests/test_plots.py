from etils import epath
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from evaluation import plots

ACCENT = tuple(bytes.fromhex(plots._ACCENT[1:]))
FAINT = tuple(bytes.fromhex(plots._FAINT[1:]))


def columns_of(path, color):
  """The columns that have a colour, and in how many rows each has it."""
  with Image.open(path) as image:
    pixels = np.asarray(image.convert('RGB'))
  hits = np.all(pixels == color, axis=-1)
  return np.flatnonzero(hits.any(axis=0)), hits.sum(axis=0)


def test_bars_fall_from_the_left_and_the_inactive_are_faint(tmp_path):
  path = epath.Path(tmp_path / 'kl.png')
  kl, active = np.array([0.5, 3.0, 0.1, 1.5]), np.array([1, 1, 0, 1], bool)
  plots.kl_per_dimension(kl, active, path)
  strong, heights = columns_of(path, ACCENT)
  faint, faint_heights = columns_of(path, FAINT)
  runs = np.split(strong, np.flatnonzero(np.diff(strong) > 1) + 1)
  assert len(runs) == 3 and strong.max() < faint.min()
  tops = np.array([np.median(heights[run]) for run in runs])
  np.testing.assert_allclose(tops / tops[0], [1, 0.5, 1 / 6], atol=0.02)
  assert np.median(faint_heights[faint]) < tops[2]


def scatter(names, counts, folder, monkeypatch):
  """Draws classes of so many images; returns the figure, laid out."""
  drawn, savefig = [], Figure.savefig
  monkeypatch.setattr(
    Figure,
    'savefig',
    lambda figure, *args, **kwargs: (
      drawn.append(figure) or savefig(figure, *args, **kwargs)
    ),
  )
  labels = np.repeat(np.arange(len(names)), counts)
  means = np.random.default_rng(0).normal(size=(len(labels), 2))
  plots.latent_scatter(means, labels, names, epath.Path(folder) / 'a.png')
  return drawn[0]


def legend_of(figure):
  """The texts of the legend, which must be in the picture."""
  (legend,) = figure.legends
  width, height = figure.canvas.get_width_height()
  box = legend.get_window_extent()
  assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
  return legend.get_texts()


@pytest.mark.filterwarnings('error')
def test_names_are_written_as_they_are_but_escaped_or_shortened(
  tmp_path, monkeypatch
):
  shown = {
    **{n: n for n in ('rich$$', '$x_$', '_bg', r'a\$b$', 'Ünï', '$\\frac$')},
    '日本': r'\u65e5\u672c',
    'x' * 200 + 'y': 'x' * 20 + '…' + 'x' * 19 + 'y',
    'two\nlines': r'two\nlines',
  }
  texts = legend_of(scatter(list(shown), 3, tmp_path, monkeypatch))
  assert [text.get_text() for text in texts] == list(shown.values())
  # What matplotlib makes of a text, and whether it takes it for a formula.
  for text, name in zip(texts, shown.values(), strict=True):
    assert text._preprocess_math(text.get_text()) == (name, False)


@pytest.mark.filterwarnings('error')
def test_of_many_classes_the_largest_are_named_and_the_rest_counted(
  tmp_path, monkeypatch
):
  names = [f'a class with a long name {i}' for i in range(300)]
  counts = np.ones(300, int)
  largest = np.arange(5, 300, 15)
  counts[largest] = 4
  figure = scatter(names, counts, tmp_path, monkeypatch)
  texts = [text.get_text() for text in legend_of(figure)]
  assert texts == [names[i] for i in largest] + ['and 280 more']
  (axes,) = figure.axes
  colors = {matplotlib.colors.to_hex(line.get_color()) for line in axes.lines}
  assert len(colors) == 21
  assert sum(len(line.get_xdata()) for line in axes.lines) == counts.sum()
