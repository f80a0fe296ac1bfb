"""Charts of measurements, as PNG."""

from collections.abc import Mapping, Sequence
import io

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
# Instead of the two greys of matplotlib's twenty colours.
_NOT_GREY = ('#1f2430', '#005f73')
_MOST_LETTERS = 40


def kl_per_dimension(kl: np.ndarray, active: np.ndarray) -> Figure:
  """Bars of the KL [latent_dim], largest first; inactive ones are faint."""
  order = posterior.most_informative(kl)
  figure, axes = new_axes(width=8, height=3.2)
  kl_bars(axes, kl[order], active[order], width=0.85)
  axes.set(xlabel='latent dimension, by its KL', ylabel='KL, nats')
  axes.margins(x=0.01)
  if len(kl) <= 40:
    axes.set_xticks(np.arange(len(kl)), order, fontsize=7)
  title = f'{kl.sum():.1f} nats in {active.sum()} of {len(kl)} dimensions'
  axes.set_title(title, loc='left')
  return figure


def training_curves(rows: Sequence[Mapping[str, float]]) -> Figure | None:
  """The losses of a run's `metrics.jsonl`, and its learning rate.

  None without rows.
  """
  curves = {
    name: [(row['epoch'], row[name]) for row in rows if name in row]
    for name in ('train/loss', 'val/loss', 'learning_rate')
  }
  if not curves['train/loss']:
    return None
  figure, axes = new_axes(width=8, height=3.2)
  for name, color in (('train/loss', _FAINT), ('val/loss', _ACCENT)):
    if curves[name]:
      marker = '.' if name == 'val/loss' else ''
      axes.plot(
        *np.array(curves[name]).T, color=color, marker=marker, label=name
      )
  losses = [loss for _, loss in curves['train/loss']]
  # The first steps would leave no room for the rest.
  low, high = min(losses), np.quantile(losses, 0.98)
  axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
  axes.set(xlabel='epoch', ylabel='nats per image')
  beside = axes.twinx()
  style(beside)
  beside.plot(*np.array(curves['learning_rate']).T, color=_INK, lw=0.8, ls=':')
  beside.set_ylabel('learning rate (dotted)')
  axes.legend(frameon=False, fontsize=8, loc='upper center')
  return figure


def latent_scatter(
  means: np.ndarray, labels: np.ndarray, names: list[str]
) -> Figure:
  """Posterior means [num_images, 2] in the plane, coloured by label.

  Labels are indices into `names`. Of more than twenty classes, the twenty with
  the most images have a colour and an entry in the legend; the others are grey.
  """
  longest = min(max(map(len, names)), _MOST_LETTERS)
  figure, axes = new_axes(width=6 + 0.05 * longest, height=5.4)
  counts = np.bincount(labels, minlength=len(names))
  largest = np.sort(np.argsort(-counts, kind='stable')[:_MOST_CLASSES])
  others = ~np.isin(labels, largest)
  dots = {'linestyle': 'none', 'marker': '.', 'markersize': 3, 'alpha': 0.7}
  grey = axes.plot(*means[others].T, color=_FAINT, **dots)
  palette = 'tab10' if len(largest) <= 10 else 'tab20'
  colors = matplotlib.color_sequences[palette]
  if palette == 'tab20':
    colors[14:16] = _NOT_GREY
  handles, texts = [], []
  for color, index in zip(colors, largest, strict=False):
    handles += axes.plot(*means[labels == index].T, color=color, **dots)
    texts.append(readable(names[index]))
  if len(largest) < len(names):
    handles += grey
    texts.append(f'and {len(names) - len(largest)} more')
  axes.set(xlabel='z₀', ylabel='z₁')
  axes.set_aspect('equal', 'datalim')
  if len(names) > 1:
    options = dict(frameon=False, fontsize=8, markerscale=4)
    figure.legend(handles, texts, loc='outside right upper', **options)
  return figure


def readable(text: str) -> str:
  """A user's text for a chart: one short line, escaped if not in the font."""
  text = shown(text, _MOST_LETTERS)
  font = font_manager.get_font(font_manager.findfont('DejaVu Sans'))
  missing = {ord(c) for c in text} - font.get_charmap().keys()
  return ascii(text)[1:-1] if missing else text


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


def png(figure: Figure) -> bytes:
  """A chart as PNG."""
  for text in figure.findobj(Text):
    text.set_parse_math(False)  # Text between dollar signs is not a formula.
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=150)
  return buffer.getvalue()
