import matplotlib
import numpy as np
import pytest

from evaluation import plots


def test_bars_fall_from_the_left_and_the_inactive_are_faint():
  kl, active = np.array([0.5, 3.0, 0.1, 1.5]), np.array([1, 1, 0, 1], bool)
  bars = plots.kl_per_dimension(kl, active).axes[0].patches
  assert [bar.get_height() for bar in bars] == [3.0, 1.5, 0.5, 0.1]
  strong, *others = (bar.get_facecolor() for bar in bars)
  assert others[:2] == [strong] * 2 and sum(others[2]) > sum(strong)


def scatter(names, counts):
  """Draws classes of so many images; returns the figure and its legend."""
  labels = np.repeat(np.arange(len(names)), counts)
  means = np.random.default_rng(0).normal(size=(len(labels), 2))
  figure = plots.latent_scatter(means, labels, names)
  plots.png(figure)  # Lays it out.
  (legend,) = figure.legends
  # The legend is in the picture.
  width, height = figure.canvas.get_width_height()
  box = legend.get_window_extent()
  assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
  return figure, legend.get_texts()


@pytest.mark.filterwarnings('error')
def test_names_are_written_as_they_are_but_escaped_or_shortened():
  shown = {
    **{n: n for n in ('rich$$', '$x_$', '_bg', r'a\$b$', 'Ünï', '$\\frac$')},
    '日本': r'\u65e5\u672c',
    'x' * 200 + 'y': 'x' * 20 + '…' + 'x' * 19 + 'y',
    'two\nlines': r'two\nlines',
  }
  _, texts = scatter(list(shown), 3)
  assert [text.get_text() for text in texts] == list(shown.values())
  # What matplotlib makes of a text, and whether it takes it for a formula.
  for text, name in zip(texts, shown.values(), strict=True):
    assert text._preprocess_math(text.get_text()) == (name, False)


def test_of_many_classes_the_largest_are_named_and_the_rest_counted():
  names = [f'a class with a long name {i}' for i in range(300)]
  counts = np.ones(300, int)
  largest = np.arange(5, 300, 15)
  counts[largest] = 4
  figure, texts = scatter(names, counts)
  texts = [text.get_text() for text in texts]
  assert texts == [names[i] for i in largest] + ['and 280 more']
  (axes,) = figure.axes
  colors = {matplotlib.colors.to_hex(line.get_color()) for line in axes.lines}
  assert len(colors) == 21
  assert sum(len(line.get_xdata()) for line in axes.lines) == counts.sum()
