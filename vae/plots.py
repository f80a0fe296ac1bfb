"""Charts of what was measured, as PNG."""

import io

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from vae import posterior

_INK = '#1f2430'
_ACCENT = '#2f6fbb'
_FAINT = '#b9c2cf'


def kl_per_dimension(
  kl: np.ndarray, active: np.ndarray, path: epath.Path
) -> None:
  """Bars of the KL of each dimension, the most informative first.

  Args:
    kl: [latent_dim], nats.
    active: bool [latent_dim]; the others are drawn faint.
    path: of the PNG.
  """
  order = posterior.most_informative(kl)
  figure, axes = new_axes(width=8, height=3.2)
  kl_bars(axes, kl[order], active[order], width=0.85)
  axes.set_xlabel('latent dimension, by its KL')
  axes.set_ylabel('KL, nats')
  axes.margins(x=0.01)
  if len(kl) <= 40:
    axes.set_xticks(np.arange(len(kl)), order, fontsize=7)
  axes.set_title(
    f'{kl.sum():.1f} nats in {active.sum()} of {len(kl)} dimensions',
    loc='left',
  )
  save(figure, path)


def rate_distortion(
  rate: float,
  distortion: float,
  history: np.ndarray,
  label: str,
  path: epath.Path,
) -> None:
  """The measured point, and the way of the validation through training.

  Args:
    rate: nats per image.
    distortion: nats per image.
    history: (rate, distortion) of each validation, in order, [n, 2].
    label: what the point is.
    path: of the PNG.
  """
  figure, axes = new_axes(width=5.6, height=4.4)
  if len(history):
    axes.plot(
      *history.T, '.-', color=_FAINT, label='validation, epoch by epoch'
    )
  axes.plot(rate, distortion, 'o', color=_ACCENT, markersize=9, label=label)
  # Where the sum is the same, so is the ELBO.
  axes.axline(
    (rate, distortion),
    slope=-1,
    color=_INK,
    linewidth=0.8,
    linestyle=':',
    label=f'ELBO of {-rate - distortion:,.1f} nats',
  )
  axes.set_xlabel('rate, nats per image')
  axes.set_ylabel('distortion, nats per image')
  axes.margins(0.12)
  axes.legend(frameon=False, fontsize=8)
  save(figure, path)


def latent_scatter(
  means: np.ndarray, labels: np.ndarray, names: list[str], path: epath.Path
) -> None:
  """Posterior means in the plane, coloured by label.

  Args:
    means: [num_images, 2].
    labels: class indices, int [num_images].
    names: of the classes.
    path: of the PNG.
  """
  figure, axes = new_axes(width=6, height=5.4)
  for index, name in enumerate(names):
    axes.plot(
      *means[labels == index].T, '.', markersize=3, alpha=0.7, label=name
    )
  axes.set_xlabel('$z_0$')
  axes.set_ylabel('$z_1$')
  axes.set_aspect('equal', 'datalim')
  if len(names) > 1:
    axes.legend(frameon=False, fontsize=8, markerscale=4, bbox_to_anchor=(1, 1))
  save(figure, path)


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
  """An empty chart, width and height in inches."""
  # Without pyplot there is no state to leave behind in a notebook.
  figure = Figure(figsize=(width, height), layout='constrained')
  axes = figure.add_subplot()
  style(axes)
  return figure, axes


def style(axes: Axes) -> None:
  """What all charts have in common."""
  axes.spines[['top', 'right']].set_visible(False)
  axes.tick_params(colors=_INK)


def kl_bars(
  axes: Axes, kl: np.ndarray, active: np.ndarray, width: float
) -> None:
  """Draws a bar for each dimension, in the order given.

  Args:
    axes: to draw on.
    kl: [latent_dim], nats.
    active: bool [latent_dim]; the others are drawn faint.
    width: of a bar; 1 leaves no gaps.
  """
  colors = np.where(active, _ACCENT, _FAINT)
  axes.bar(np.arange(len(kl)), kl, color=colors, width=width)


def save(figure: Figure, path: epath.Path) -> None:
  """Writes a chart as PNG; makes the folder."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=150)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(buffer.getvalue())
