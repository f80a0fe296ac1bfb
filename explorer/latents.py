"""Images of a data set in the latent space: plane, bands, holes, directions.

Latents are [n, latent_dim], all axes of z in one.
"""

import dataclasses

import numpy as np
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from vae import splits

# The share of the aggregate posterior q(z) within a slider's band.
_BAND = 0.95

# Cells along a side of the map of holes, and the deviation of its kernel.
_CELLS, _KERNEL = 48, 0.8

# A cell is a hole if q(z) has less than this share of the prior's density
# there, and the prior counts there: its densest cells with this mass.
_HOLE, _PRIOR_MASS = 0.2, 0.95

# Images that a direction is fitted to, at most.
_MAX_FITTED = 4000


@dataclasses.dataclass(frozen=True)
class Plane:
  """A plane through the latent space, in which images are shown.

  Attributes:
    center: a point of it, [latent_dim].
    axes: orthonormal, [2, latent_dim].
    variance: the share of the variance of the images' means that it shows.
  """

  center: np.ndarray
  axes: np.ndarray
  variance: float

  @classmethod
  def of(cls, means: np.ndarray) -> 'Plane':
    """The latent space itself if it has two dimensions, else by PCA."""
    if means.shape[1] == 2:
      return cls(np.zeros(2, np.float32), np.eye(2, dtype=np.float32), 1.0)
    center = means.mean(axis=0)
    _, singular, axes = np.linalg.svd(means - center, full_matrices=False)
    power = np.square(singular)
    share = power[:2].sum() / max(power.sum(), 1e-30)
    axes = axes[:2]
    if len(axes) < 2:  # Of a single dimension.
      axes = np.concatenate([axes, np.zeros_like(axes)])
    return cls(center, axes, float(share))

  def project(self, latents: np.ndarray) -> np.ndarray:
    """Coordinates in the plane, [n, 2]."""
    return (latents - self.center) @ self.axes.T

  def lift(self, xy: np.ndarray) -> np.ndarray:
    """The latents of coordinates [n, 2], in the plane."""
    return self.center + xy @ self.axes


def bands(draws: np.ndarray) -> np.ndarray:
  """Mean and ends of the central 95 % of each dimension, [latent_dim, 3]."""
  tail = (1 - _BAND) / 2
  low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
  return np.stack([draws.mean(axis=0), low, high], axis=1)


@dataclasses.dataclass(frozen=True)
class HoleMap:
  """Densities over a grid of the plane, rows upwards.

  Attributes:
    low, high: corners of the grid, [2] each.
    prior: smoothed, relative to its densest cell, [cells, cells].
    holes: cells with mass of the prior and almost none of q(z), bool.
    share: of the prior's draws that fall into holes.
  """

  low: np.ndarray
  high: np.ndarray
  prior: np.ndarray
  holes: np.ndarray
  share: float

  @classmethod
  def of(cls, prior: np.ndarray, posterior: np.ndarray) -> 'HoleMap':
    """From draws of the prior and of q(z) in the plane, [n, 2] each."""
    both = np.concatenate([prior, posterior])
    low, high = both.min(axis=0), both.max(axis=0)
    margin = 0.05 * (high - low) + 1e-6
    low, high = low - margin, high + margin
    extent = np.stack([low, high], axis=1)
    shares = [
      np.histogram2d(*draws.T, _CELLS, extent)[0].T / len(draws)
      for draws in (prior, posterior)
    ]
    p, q = (ndimage.gaussian_filter(share, _KERNEL) for share in shares)
    by_density = np.sort(p.ravel())[::-1]
    enough = np.searchsorted(np.cumsum(by_density), _PRIOR_MASS * p.sum())
    holes = (p >= by_density[min(enough, p.size - 1)]) & (q < _HOLE * p)
    in_holes = float(shares[0][holes].sum())
    return cls(low, high, np.round(p / p.max(), 4), holes, in_holes)


def direction(means: np.ndarray, values: np.ndarray) -> np.ndarray | None:
  """The step from one class of a label to the other, [latent_dim].

  Along the normal of a logistic regression on the means, as long as the way
  between the means of the two classes in it. None unless there are two classes.
  """
  # Images that are sorted by class have all of them in the rows that count.
  rows = splits.spread(len(means), _MAX_FITTED)
  means, values = means[rows], values[rows]
  found, counts = np.unique(values, return_counts=True)
  if len(found) != 2 or counts.min() < 2:
    return None
  low, high = found
  scale = means.std(axis=0) + 1e-8
  with threadpool_limits(1):  # Threads of BLAS only wait for each other here.
    probe = LogisticRegression(max_iter=1000).fit(means / scale, values == high)
  normal = probe.coef_[0] / scale
  normal /= np.linalg.norm(normal) + 1e-12
  way = means[values == high].mean(axis=0) - means[values == low].mean(axis=0)
  return (normal * (way @ normal)).astype(np.float32)
