"""Walks through the latent space: interpolations, traversals, the manifold.

Each returns latents to be decoded, in the order of the pictures.
"""

import jax
from jax.scipy.stats import norm
import numpy as np

PATHS = ('linear', 'spherical')

# The manifold's outermost lines are these quantiles of the prior.
_MANIFOLD_QUANTILES = (0.02, 0.98)


def interpolate(
  start: np.ndarray, end: np.ndarray, steps: int, path: str
) -> np.ndarray:
  """From one latent to another, both included.

  Linear: (1 - t) a + t b. Spherical: along the great circle, White 2016, with
  the length going linearly from ‖a‖ to ‖b‖; in many dimensions the linear
  path leaves the shell in which the prior's mass lies, and this one does not.

  Args:
    start: a, [latent_dim].
    end: b, [latent_dim].
    steps: at least 2.
    path: one of `PATHS`.

  Returns:
    [steps, latent_dim].
  """
  t = np.linspace(0, 1, steps)[:, None]
  if path == 'linear':
    return (1 - t) * start + t * end
  lengths = np.linalg.norm(start), np.linalg.norm(end)
  if not min(lengths) > 0:  # The origin lies in no direction.
    return (1 - t) * start + t * end
  directions = start / lengths[0], end / lengths[1]
  angle = np.arccos(np.clip(directions[0] @ directions[1], -1, 1))
  if np.sin(angle) < 1e-6:  # On one line there is no plane to turn in.
    return (1 - t) * start + t * end
  turned = np.sin((1 - t) * angle) * directions[0]
  turned = (turned + np.sin(t * angle) * directions[1]) / np.sin(angle)
  return ((1 - t) * lengths[0] + t * lengths[1]) * turned


def traverse(
  center: np.ndarray, dimensions: np.ndarray, reach: float, steps: int
) -> np.ndarray:
  """From a latent, each dimension alone from -reach to reach.

  Args:
    center: what the other dimensions keep, [latent_dim].
    dimensions: which to go through.
    reach: in standard deviations of the prior.
    steps: for each dimension.

  Returns:
    [len(dimensions), steps, latent_dim].
  """
  walks = np.tile(center, (len(dimensions), steps, 1))
  for walk, dimension in zip(walks, dimensions, strict=True):
    walk[:, dimension] = np.linspace(-reach, reach, steps)
  return walks


def manifold(side: int) -> np.ndarray:
  """A grid over the mass of a two-dimensional prior.

  Equally spaced in probability, through the inverse of the Gaussian's
  distribution function; Kingma & Welling 2014, figure 4. The first dimension
  grows to the right, the second upwards.

  Returns:
    [side², 2], by rows from the top left.
  """
  line = np.linspace(*_MANIFOLD_QUANTILES, side)
  line = np.asarray(jax.device_get(norm.ppf(line)))
  x, y = np.meshgrid(line, line[::-1])
  return np.stack([x.ravel(), y.ravel()], axis=-1)
