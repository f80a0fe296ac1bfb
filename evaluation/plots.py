"""Charts of measurements, as PNG."""

import functools
import io

from etils import epath
import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
import numpy as np

from evaluation import posterior
from vae.errors import shown

_INK, _ACCENT, _FAINT = '#1f2430', '#2f6fbb', '#b9c2cf'

# More colours cannot be distinguished, nor longer names read.
_MOST_CLASSES = 20
_MOST_LETTERS = 40

# Instead of the two greys of matplotlib's twenty colours.
_NOT_GREY = ('#1f2430', '#005f73')


def kl_per_dimension(
  kl: np.ndarray, active: np.ndarray, path: epath.Path
) -> None:
  """Bars of the KL [latent_dim], largest first; inactive ones are faint."""
  order = posterior.most_informative(kl)
  figure, axes = new_axes(width=8, height=3.2)
  kl_bars(axes, kl[order], active[order], width=0.85)
  axes.set_xlabel('latent dimension, by its KL')
  axes.set_ylabel('KL, nats')
  axes.margins(x=0.01)
  if len(kl) <= 40:
    axes.set_xticks(np.arange(len(kl)), order, fontsize=7)
  title = f'{kl.sum():.1f} nats in {active.sum()} of {len(kl)} dimensions'
  axes.set_title(title, loc='left')
  save(figure, path)


def rate_distortion(
  rate: float,
  distortion: float,
  history: np.ndarray,
  label: str,
  path: epath.Path,
) -> None:
  """The measured point, and the way of the validation through training.

  All in nats per image; `history` is (rate, distortion) of each validation, in
  order, [n, 2].
  """
  figure, axes = new_axes(width=5.6, height=4.4)
  if len(history):
    way = 'validation, epoch by epoch'
    axes.plot(*history.T, '.-', color=_FAINT, label=way)
  axes.plot(rate, distortion, 'o', color=_ACCENT, markersize=9, label=label)
  elbo = f'ELBO of {-rate - distortion:,.1f} nats'
  line = dict(color=_INK, linewidth=0.8, linestyle=':')
  axes.axline((rate, distortion), slope=-1, label=elbo, **line)
  axes.set_xlabel('rate, nats per image')
  axes.set_ylabel('distortion, nats per image')
  axes.margins(0.12)
  axes.legend(frameon=False, fontsize=8)
  save(figure, path)


def latent_scatter(
  means: np.ndarray, labels: np.ndarray, names: list[str], path: epath.Path
) -> None:
  """Posterior means in the plane, coloured by label.

  Of more than twenty classes, the twenty with the most images have a colour and
  an entry in the legend, and the others are grey and counted.

  Args:
    means: [num_images, 2].
    labels: indices into `names`, int [num_images].
    names: of the classes.
    path: of the PNG.
  """
  longest = min(max(map(len, names)), _MOST_LETTERS)
  figure, axes = new_axes(width=6 + 0.05 * longest, height=5.4)
  counts = np.bincount(labels, minlength=len(names))
  largest = np.sort(np.argsort(-counts, kind='stable')[:_MOST_CLASSES])
  others = ~np.isin(labels, largest)
  dots = {'linestyle': 'none', 'marker': '.', 'markersize': 3, 'alpha': 0.7}
  grey = axes.plot(*means[others].T, color=_FAINT, **dots)
  name = 'tab10' if len(largest) <= 10 else 'tab20'
  palette = matplotlib.color_sequences[name]
  palette[14:16] = _NOT_GREY[: len(palette[14:16])]
  handles, texts = [], []
  for color, index in zip(palette, largest, strict=False):
    handles += axes.plot(*means[labels == index].T, color=color, **dots)
    texts.append(readable(names[index]))
  if len(largest) < len(names):
    handles += grey
    texts.append(f'and {len(names) - len(largest)} more')
  axes.set_xlabel('z₀')
  axes.set_ylabel('z₁')
  axes.set_aspect('equal', 'datalim')
  if len(names) > 1:
    style_of = dict(frameon=False, fontsize=8, markerscale=4)
    figure.legend(handles, texts, loc='outside right upper', **style_of)
  save(figure, path)


def readable(text: str) -> str:
  """A user's text for a chart: one short line, escaped if not in the font."""
  text = shown(text, _MOST_LETTERS)
  missing = {ord(c) for c in text} - _characters()
  return ascii(text)[1:-1] if missing else text


@functools.cache
def _characters() -> frozenset[int]:
  """The characters of the font that matplotlib brings."""
  path = font_manager.findfont('DejaVu Sans')
  return frozenset(font_manager.get_font(path).get_charmap())


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
  """An empty chart, width and height in inches."""
  # Without pyplot there is no state to leave behind in a notebook.
  figure = Figure(figsize=(width, height), layout='constrained')
  axes = figure.add_subplot()
  style(axes)
  return figure, axes


def style(axes: Axes) -> None:
  """Sets the style of all charts."""
  axes.spines[['top', 'right']].set_visible(False)
  axes.tick_params(colors=_INK)


def kl_bars(
  axes: Axes, kl: np.ndarray, active: np.ndarray, width: float
) -> None:
  """Draws a bar for each dimension; `width` 1 leaves no gaps."""
  colors = np.where(active, _ACCENT, _FAINT)
  axes.bar(np.arange(len(kl)), kl, color=colors, width=width)


def draw_as_written(figure: Figure) -> None:
  """Keeps matplotlib from taking text between dollar signs for a formula."""
  for text in figure.findobj(Text):
    text.set_parse_math(False)


def save(figure: Figure, path: epath.Path) -> None:
  """Writes a chart as PNG; makes the folder."""
  draw_as_written(figure)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=150)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(buffer.getvalue())
