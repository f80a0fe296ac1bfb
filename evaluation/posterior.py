"""The state of the posterior: what each latent dimension carries.

Collapse, a posterior that is the prior whatever the image, is a VAE's main
failure. It shows in a dimension's KL and in how little its mean moves.
"""

import numpy as np

# Burda et al. 2016, section 5.2: a dimension is active where its mean's
# variance over the images exceeds this.
ACTIVE_VARIANCE = 0.01


def kl(mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
  """KL(q(z_j|x) ‖ N(0, 1)) of each image and dimension, in double precision.

  Args:
    mean: [num_images, latent_dim].
    logvar: [num_images, latent_dim], log σ².

  Returns:
    float64 [num_images, latent_dim], nats.
  """
  mean, logvar = mean.astype(np.float64), logvar.astype(np.float64)
  return 0.5 * (np.square(mean) + np.expm1(logvar) - logvar)


def mean_variance(mean: np.ndarray) -> np.ndarray:
  """A_j = Var_x(E_q[z_j]), [latent_dim]; Burda et al. 2016, section 5.2."""
  return mean.astype(np.float64).var(axis=0)


def active_dimensions(mean: np.ndarray) -> np.ndarray:
  """The dimensions whose mean moves with the image, bool [latent_dim]."""
  return mean_variance(mean) > ACTIVE_VARIANCE


def most_informative(carried: np.ndarray) -> np.ndarray:
  """Dimensions by what they carry (KL, or variance), most first."""
  return np.argsort(-carried, kind='stable')


def dimensions_that_carry(kl: np.ndarray, share: float) -> int:
  """The least number of dimensions that have this share of the rate.

  Args:
    kl: [latent_dim], nats.
    share: of their sum, above 0.

  Returns:
    0 if the rate is 0.
  """
  total = np.cumsum(np.sort(kl)[::-1])
  return int(np.sum(total < share * total[-1])) + bool(total[-1] > 0)


def verdict(kl: np.ndarray, active: np.ndarray) -> str:
  """Whether the posterior has collapsed, in words.

  Args:
    kl: [latent_dim], nats.
    active: bool [latent_dim].
  """
  total = f'{kl.sum():.2f} nats'
  most = f'{dimensions_that_carry(kl, 0.9)} of them carry 90 %'
  dimensions, dead = len(kl), np.flatnonzero(~active)
  if not len(dead):
    return (
      f'Not collapsed: all {dimensions} dimensions are active, {total}; {most}.'
    )
  if len(dead) == dimensions:
    return (
      f'Collapsed: none of the {dimensions} dimensions is active, {total} in '
      'all. The decoder ignores z: lower β or σ, or raise the KL slowly.'
    )
  which = f'{_ranges(dead)} ({kl[dead].sum():.2f} nats together)'
  return (
    f'Partly collapsed: {dimensions - len(dead)} of {dimensions} dimensions '
    f'are active and carry {kl[active].sum():.2f} of {total}, {most}; not '
    f'active: {which}.'
  )


def _ranges(numbers: np.ndarray) -> str:
  """Such as 0, 3–5, 9."""
  runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
  return ', '.join(
    str(run[0]) if len(run) == 1 else f'{run[0]}–{run[-1]}' for run in runs
  )
