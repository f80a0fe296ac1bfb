from etils import epath
import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from evaluation import plots

ACCENT = tuple(bytes.fromhex(plots._ACCENT[1:]))
FAINT = tuple(bytes.fromhex(plots._FAINT[1:]))


def columns_of(path, color):
  """In which columns, and in how many rows of each, a PNG has a colour."""
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
  tops = [np.median(heights[run]) for run in runs]
  np.testing.assert_allclose(
    np.array(tops) / tops[0], [1, 0.5, 1 / 6], atol=0.02
  )
  assert np.median(faint_heights[faint]) < tops[2]


@pytest.mark.parametrize('history', [np.zeros((0, 2)), np.ones((3, 2))])
def test_rate_and_distortion_is_drawn_with_and_without_a_history(
  tmp_path, history
):
  path = epath.Path(tmp_path / 'new' / 'rd.png')
  plots.rate_distortion(45.0, -1200.0, history, 'step 3', path)
  assert len(columns_of(path, ACCENT)[0]) > 5


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved, laid out."""
  figures = []
  savefig = Figure.savefig

  def save(figure, *args, **kwargs):
    savefig(figure, *args, **kwargs)
    figures.append(figure)

  monkeypatch.setattr(Figure, 'savefig', save)
  return figures


def scatter(names, counts, folder):
  labels = np.repeat(np.arange(len(names)), counts)
  means = np.random.default_rng(0).normal(size=(len(labels), 2))
  return plots.latent_scatter(
    means, labels, names, epath.Path(folder) / 'a.png'
  )


def legend_of(figure):
  """The texts of a legend, which must be in the picture, and their places."""
  (legend,) = figure.legends
  width, height = figure.canvas.get_width_height()
  box = legend.get_window_extent()
  assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
  return legend.get_texts()


@pytest.mark.filterwarnings('error')
def test_names_of_classes_are_written_as_they_are(tmp_path, drawn):
  names = ['rich$$', '$x_$', '_bg', r'a\$b$', 'Ünï', '__', '$\\frac$']
  assert scatter(names, 3, tmp_path) == {}
  texts = legend_of(drawn[0])
  assert [text.get_text() for text in texts] == names
  # What matplotlib makes of a text, and whether it takes it for a formula.
  for text, name in zip(texts, names, strict=True):
    assert text._preprocess_math(text.get_text()) == (name, False)


@pytest.mark.filterwarnings('error')
def test_name_that_no_font_has_is_a_number_and_is_returned(
  tmp_path, drawn, monkeypatch
):
  own = [f for f in font_manager.fontManager.ttflist if 'DejaVu' in f.name]
  monkeypatch.setattr(font_manager.fontManager, 'ttflist', own)
  plots._fonts.cache_clear()
  assert scatter(['cat', '日本', 'dog'], 3, tmp_path) == {1: '日本'}
  texts = [text.get_text() for text in legend_of(drawn[0])]
  assert texts == ['cat', 'class 1', 'dog']
  plots._fonts.cache_clear()


@pytest.mark.filterwarnings('error')
def test_another_installed_font_has_what_the_first_lacks(tmp_path, drawn):
  """Here one that matplotlib brings for formulas."""
  name = 'a\N{MATHEMATICAL SCRIPT SMALL B}'
  assert scatter([name, 'c'], 3, tmp_path) == {}
  text, plain = legend_of(drawn[0])
  assert text.get_text() == name and len(text.get_fontfamily()) == 2
  assert plain.get_fontfamily() != text.get_fontfamily()


@pytest.mark.filterwarnings('error')
def test_of_many_classes_the_largest_are_named_and_the_rest_counted(
  tmp_path, drawn
):
  names = [f'a class with a long name {i}' for i in range(300)]
  counts = np.ones(300, int)
  largest = np.arange(5, 300, 15)
  counts[largest] = 4
  scatter(names, counts, tmp_path)
  texts = [text.get_text() for text in legend_of(drawn[0])]
  assert texts == [names[i] for i in largest] + ['and 280 more']
  (axes,) = drawn[0].axes
  colors = {matplotlib.colors.to_hex(line.get_color()) for line in axes.lines}
  assert len(colors) == 21
  assert sum(len(line.get_xdata()) for line in axes.lines) == counts.sum()


def test_long_names_are_shortened_in_the_middle(tmp_path, drawn):
  scatter(['x' * 200 + 'y', 'two\nlines'], 3, tmp_path)
  long, lines = (text.get_text() for text in legend_of(drawn[0]))
  assert long == 'x' * 20 + '…' + 'x' * 19 + 'y'
  assert lines == r'two\nlines'


def test_scatter_colours_by_label(tmp_path):
  path = epath.Path(tmp_path / 'means.png')
  means = np.random.default_rng(0).normal(size=(60, 2))
  plots.latent_scatter(means, np.arange(60) % 3, ['a', 'b', 'c'], path)
  with Image.open(path) as image:
    colors = len(image.convert('RGB').quantize(8).getcolors())
  assert colors >= 4
