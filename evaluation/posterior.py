"""The posterior q(z|x): collapse, active units, the parts of the rate, holes.

Collapse, a posterior that is the prior whatever the image, is a VAE's main
failure; it shows in a dimension's KL and in how little its mean moves.
"""

import numpy as np

from evaluation.aggregate_posterior import (
  draw,
  fit_mixture,
  gaussian_total_correlation,
  shares_in_holes,
  split_rate,
)
from evaluation.measure import MAX_FITTED, Null
from vae import splits

# A dimension is active if its mean's variance over the images exceeds this;
# Burda et al. 2016, section 5.2.
ACTIVE_VARIANCE = 0.01

# Images that a mixture and nearest neighbours need.
_MIN_FITTED = 5

# Random halves of the latents, and permutations of their dimensions.
_HALVINGS = 10
_SHUFFLES = 20


def evaluate(context, results) -> None:
  """Adds collapse, active units, the parts of the rate, and holes of q(z)."""
  values, seed = context.images, context.settings.seed
  add_dimensions(results, values, context.draws_z)
  if context.draws_z and {'logvar', 'kl'} <= values.keys():
    _add_rate_split(results, values, seed)
    _add_gaussian_total_correlation(results, draw(values, seed), seed)
  elif context.draws_z:
    results.notes.append(
      'parts of the rate, total correlation: q(z|x) is no diagonal Gaussian or '
      'p(z) is not N(0, I).'
    )
  if min(len(values['mean']), len(context.fitted['mean'])) < _MIN_FITTED:
    results.notes.append(f'holes: they need at least {_MIN_FITTED} images.')
  else:
    _add_holes(context, results)


def add_dimensions(results, values: dict[str, np.ndarray], draws_z: bool):
  """Adds which dimensions are active, and whether the posterior collapsed."""
  variance = mean_variance(values['mean'])
  active = variance > ACTIVE_VARIANCE
  about = f'dimensions with Var_x(E_q[z]) > {ACTIVE_VARIANCE}'
  results.number('active_units', active.sum(), f'of {len(active)}', about)
  results.dimensions['mean_variance'] = variance.tolist()
  if draws_z and 'kl' in values:
    kl = values['kl'].astype(np.float64).mean(axis=0)
    results.verdict = verdict(kl, active)
    results.dimensions['kl'] = kl.tolist()
    results.number(
      'dimensions_of_90_percent',
      dimensions_that_carry(kl, 0.9),
      f'of {len(kl)}',
      'the fewest dimensions that carry 90 % of the rate together',
    )


def _add_rate_split(results, values, seed):
  parts, count = split_rate(values, seed), len(values['mean'])
  log_count = f'log {count:,} = {np.log(count):.2f}'
  results.dimensions['aggregate_kl'] = parts.dimension_kl.tolist()
  results.interval(
    'mutual_information',
    *parts.mutual_information,
    'nats',
    f'I(x; z); the lower bound is at most {log_count}, the upper one the rate',
  )
  results.interval(
    'total_correlation',
    *parts.total_correlation,
    'nats',
    'KL(q(z) ‖ Π q(z_j)): rate - I(x; z) - Σ KL(q(z_j) ‖ N(0, 1)), at least 0',
  )
  (information, _), _ = parts.mutual_information
  (correlation, _), _ = parts.total_correlation
  if not correlation and np.log(count) - information < 0.1:
    results.notes.append(
      f'total correlation: not identifiable with {count:,} images, as they '
      f'bound I(x; z) from below by {log_count} nats at most.'
    )
  about = (
    'Σ KL(q(z_j) ‖ N(0, 1)) of the mixture of these images, an upper bound'
  )
  value, error = parts.dimension_kl.sum(), parts.dimension_kl_error
  results.number('dimension_wise_kl', value, 'nats', about, error)


def _add_gaussian_total_correlation(results, latents, seed):
  num_images, latent_dim = latents.shape
  if num_images <= latent_dim:
    results.notes.append(
      f'Gaussian total correlation: {latent_dim} dimensions need more images '
      f'than {num_images}.'
    )
    return
  generator = np.random.default_rng([seed, 3])
  null = [
    gaussian_total_correlation(generator.permuted(latents, axis=0))[0]
    for _ in range(_SHUFFLES)
  ]
  value, error = gaussian_total_correlation(latents)
  results.number(
    'gaussian_total_correlation',
    value,
    'nats',
    '-½ log det of the correlations of z, less its bias: the total correlation '
    'if q(z) is Gaussian; null: each dimension permuted over the images',
    error,
    Null.of(null),
  )


def _add_holes(context, results):
  seed, values = context.settings.seed, context.images
  at_most = splits.spread(len(values['mean']), MAX_FITTED)
  values = {k: values[k][at_most] for k in ('mean', 'logvar') if k in values}
  fitted = context.fitted
  if not context.draws_z:
    values, fitted = {'mean': values['mean']}, {'mean': fitted['mean']}
  latents = np.stack([draw(values, [seed, 1, i]) for i in range(_HALVINGS)])
  print('fitting the mixture …', flush=True)
  # With noise of its own, or it would be drawn to the latents that it is
  # compared with.
  mixture = fit_mixture(draw(fitted, [seed, 2]), seed)
  count = latents[..., 0].size
  prior = context.trained.sample_latents(count, seed).reshape(latents.shape)
  # It draws one component after the other.
  generator = np.random.default_rng([seed, 4])
  drawn = generator.permutation(mixture.sample(count)[0].astype(np.float32))
  null, *shares = shares_in_holes(
    latents, prior, drawn.reshape(latents.shape), seed=seed
  )
  gaussians = f'{mixture.n_components} Gaussians fitted to q(z)'
  for name, share, source in (
    ('prior_in_holes', shares[0], 'the prior'),
    ('mixture_in_holes', shares[1], gaussians),
  ):
    about = (
      f'of draws from {source}: farther from q(z) than 95 % of its own; ± is '
      f'the deviation over {_HALVINGS} halvings and draws of z; null: '
      'held-out draws from q(z)'
    )
    error, null_of = share.std(ddof=1), Null.of(null)
    results.number(name, share.mean(), 'share', about, error, null_of)


def mean_variance(mean: np.ndarray) -> np.ndarray:
  """A_j = Var_x(E_q[z_j]), [latent_dim]; Burda et al. 2016, section 5.2."""
  return mean.astype(np.float64).var(axis=0)


def most_informative(carried: np.ndarray) -> np.ndarray:
  """Dimensions in the order of their KL, or variance, largest first."""
  return np.argsort(-carried, kind='stable')


def dimensions_that_carry(kl: np.ndarray, share: float) -> int:
  """The fewest dimensions with this share of the rate; 0 if the rate is 0."""
  total = np.cumsum(np.sort(kl)[::-1])
  return int(np.sum(total < share * total[-1])) + bool(total[-1] > 0)


def verdict(kl: np.ndarray, active: np.ndarray) -> str:
  """A sentence on whether the posterior has collapsed.

  From the KL, nats, and whether it is active, of each dimension, [latent_dim].
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
  runs = np.split(dead, np.flatnonzero(np.diff(dead) > 1) + 1)
  which = ', '.join(
    str(run[0]) if len(run) == 1 else f'{run[0]}–{run[-1]}' for run in runs
  )
  return (
    f'Partly collapsed: {dimensions - len(dead)} of {dimensions} dimensions '
    f'are active and carry {kl[active].sum():.2f} of {total}, {most}; not '
    f'active: {which} ({kl[dead].sum():.2f} nats together).'
  )
