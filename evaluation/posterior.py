"""The posterior q(z|x), and its mean over the images: the aggregate q(z).

Collapse, a posterior that is the prior whatever the image, is a VAE's main
failure; it shows in a dimension's KL and in how little its mean moves. Samples
from the prior miss the difference between q(z) and p(z): the holes in the
latent space. Codes are [num_images, latent_dim], all axes of z in one.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple
import warnings

import jax
from jax import lax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
import numpy as np
from scipy.special import digamma
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from evaluation.measure import MAX_FITTED, mean_and_error, Null
from vae import discrete, splits

# A dimension is active if its mean's variance over the images exceeds this;
# Burda et al. 2016, section 5.2.
ACTIVE_VARIANCE = 0.01

# Random halves of the latents, and permutations of their dimensions.
_HALVINGS, _SHUFFLES = 10, 20

# Draws of z for the expectations under q(z): as many as so many densities of
# one dimension allow, within these limits. They are computed in blocks.
_NUM_DENSITIES, _BLOCK_SIZE = 2**30, 2**22
_MIN_DRAWS, _MAX_DRAWS = 2000, 20_000

# Numbers of Gaussians that a mixture may have.
_COMPONENTS = (1, 2, 5, 10, 20)


def evaluate(context, results) -> None:
  """Adds collapse, active units, the parts of the rate, and holes of q(z)."""
  values, seed = context.images, context.settings.seed
  add_dimensions(results, values, context.draws_z)
  if context.draws_z and {'logvar', 'kl'} <= values.keys():
    _add_rate_split(results, values, seed)
    _add_gaussian_total_correlation(results, values, seed)
  elif context.draws_z:
    results.notes.append(
      'parts of the rate, total correlation: q(z|x) is not a diagonal Gaussian '
      'or p(z) is not N(0, I).'
    )
  _add_holes(context, results)


def add_dimensions(results, values: dict[str, np.ndarray], draws_z: bool):
  """Adds which dimensions are active, and whether the posterior collapsed."""
  variance = mean_variance(values['mean'])
  active = variance > ACTIVE_VARIANCE
  about = f'dimensions with Var_x(E_q[z]) > {ACTIVE_VARIANCE}'
  results.number('active_units', active.sum(), f'of {len(active)}', about)
  results.dimensions['mean_variance'] = variance.tolist()
  if draws_z and 'kl' in values:
    kl = values['kl'].mean(axis=0, dtype=np.float64)
    results.verdict = verdict(kl, active)
    results.dimensions['kl'] = kl.tolist()
    name, count = 'dimensions_of_90_percent', dimensions_that_carry(kl, 0.9)
    about = 'the fewest dimensions that carry 90 % of the rate together'
    results.number(name, count, f'of {len(kl)}', about)


def _add_rate_split(results, values, seed):
  parts, count = split_rate(values, seed), len(values['mean'])
  results.dimensions['aggregate_kl'] = parts.dimension_kl.tolist()
  about = (
    f'I(x; z); the lower bound is at most log {count:,} = {np.log(count):.2f}, '
    'the upper one the rate'
  )
  results.interval('mutual_information', *parts.mutual_information, about)
  about = 'KL(q(z) ‖ Π q(z_j)) ≥ 0: rate - I(x; z) - Σ KL(q(z_j) ‖ N(0, 1))'
  results.interval('total_correlation', *parts.total_correlation, about)
  about = 'Σ KL(q(z_j) ‖ N(0, 1)) of these images, an upper bound'
  kl, error = parts.dimension_kl.sum(), parts.dimension_kl_error
  results.number('dimension_wise_kl', kl, 'nats', about, error)


def _add_gaussian_total_correlation(results, values, seed):
  latents = draw(values, seed)
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
  about = (
    '-½ log det of the correlations of z, less its bias: the total correlation '
    'if q(z) is Gaussian; null: each dimension permuted over the images'
  )
  name = 'gaussian_total_correlation'
  results.number(name, value, 'nats', about, error, Null.of(null))


def _add_holes(context, results):
  seed, values = context.settings.seed, context.images
  if context.draws_z and not {'logvar', 'certain'} & values.keys():
    results.notes.append('holes: q(z|x) is not a diagonal Gaussian.')
    return
  prior = context.trained.prior
  if isinstance(prior, discrete.CodePrior) and prior.network is not None:
    results.notes.append('holes: too many draws for an autoregressive prior.')
    return
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
  results.mixture = drawn
  null, *shares = shares_in_holes(
    latents, prior, drawn.reshape(latents.shape), seed=seed
  )
  gaussians = f'{mixture.n_components} Gaussians fitted to q(z)'
  sources = {'prior': 'the prior', 'mixture': gaussians}
  for (name, source), share in zip(sources.items(), shares, strict=True):
    about = (
      f'of draws from {source}: farther from q(z) than 95 % of its own; ± is '
      f'the deviation over {_HALVINGS} halvings and draws of z; null: '
      'held-out draws from q(z)'
    )
    mean, error, name = share.mean(), share.std(ddof=1), f'{name}_in_holes'
    results.number(name, mean, 'share', about, error, Null.of(null))


def mean_variance(mean: np.ndarray) -> np.ndarray:
  """Var_x(E_q[z_j]), [latent_dim]."""
  return mean.astype(np.float64).var(axis=0)


def most_informative(carried: np.ndarray) -> np.ndarray:
  """Dimensions in the order of their KL, or variance, largest first."""
  return np.argsort(-carried, kind='stable')


def dimensions_that_carry(kl: np.ndarray, share: float) -> int:
  """The fewest dimensions with this share of the rate; 0 if the rate is 0."""
  total = np.cumsum(np.sort(kl)[::-1])
  return int(np.sum(total < share * total[-1])) + bool(total[-1] > 0)


def verdict(kl: np.ndarray, active: np.ndarray) -> str:
  """A sentence on whether the posterior has collapsed, of [latent_dim] each."""
  total = f'{kl.sum():.2f} nats'
  most = f'{dimensions_that_carry(kl, 0.9)} of them carry 90 %'
  if active.all():
    return (
      f'Not collapsed: all {len(kl)} dimensions are active, {total}; {most}.'
    )
  if not active.any():
    return (
      f'Collapsed: none of the {len(kl)} dimensions is active, {total} in '
      'all. The decoder ignores z: lower β or σ, or raise the KL slowly.'
    )
  return (
    f'Partly collapsed: {active.sum()} of {len(kl)} dimensions are active and '
    f'carry {kl[active].sum():.2f} of {total}, {most}.'
  )


def draw(codes: dict[str, np.ndarray], seed: int | Sequence[int]) -> np.ndarray:
  """One draw of each image's posterior, or its mean if there is no `logvar`.

  Draws that are compared must not share their noise, and so the seed.
  """
  if 'logvar' not in codes:
    return codes['mean']
  epsilon = np.random.default_rng(seed).standard_normal(codes['mean'].shape)
  z = codes['mean'] + np.exp(0.5 * codes['logvar']) * epsilon
  return z.astype(np.float32)


class RateSplit(NamedTuple):
  """The rate's parts, nats; bounds are lower and upper, each with its error."""

  mutual_information: tuple[tuple[float, float], ...]
  total_correlation: tuple[tuple[float, float], ...]
  dimension_kl: np.ndarray  # Of the images at hand, [latent_dim].
  dimension_kl_error: float  # Of its sum.


def split_rate(
  codes: dict[str, np.ndarray], seed: int | Sequence[int]
) -> RateSplit:
  """E_x KL(q(z|x) ‖ p(z)) = I(x; z) + TC(z) + Σ_j KL(q(z_j) ‖ p(z_j)).

  Hoffman & Johnson 2016; Chen et al. 2018, equation 2. In expectation over
  images, the mixture of the posteriors of N of them is too dense at their own
  draws, and the mixture without each draw's own image is not dense enough
  (Poole et al. 2019, sections 2.1 and 2.4); so for each q(z_j). With one or the
  other in the place of q(z) and of q(z_j) come bounds on I(x; z), the lower one
  at most log N and the upper one at most the rate, and on the total correlation
  rate - I(x; z) - Σ_j KL(q(z_j) ‖ p(z_j)). `codes` have a `kl` to N(0, I).
  """
  mean, logvar = codes['mean'], codes['logvar']
  count, latent_dim = mean.shape
  affordable = _NUM_DENSITIES // (count * latent_dim)
  num_draws = int(np.clip(affordable, _MIN_DRAWS, _MAX_DRAWS))
  owners = np.arange(num_draws) * count // num_draws
  z = draw({'mean': mean[owners], 'logvar': logvar[owners]}, seed)
  size = max(1, _BLOCK_SIZE // (count * latent_dim))
  densities = jax.device_get(_log_densities(mean, logvar, z, owners, size))
  own, joint, others, marginals, other_marginals, priors = (
    a.astype(np.float64) for a in densities
  )

  def estimate(values):
    """Mean and standard error; an image's draws are not independent."""
    draws = np.bincount(owners, minlength=count)
    sums = np.bincount(owners, values, minlength=count)
    return mean_and_error(sums[draws > 0] / draws[draws > 0])

  rate = mean_and_error(codes['kl'].astype(np.float64).sum(axis=1))
  correlation = estimate(others - marginals.sum(axis=1))
  most_correlation = estimate(joint - other_marginals.sum(axis=1))
  dimension_kl = marginals - priors
  return RateSplit(
    (estimate(own - joint), min(estimate(own - others), rate)),
    (correlation if correlation[0] > 0 else (0.0, 0.0), most_correlation),
    dimension_kl.mean(axis=0),
    estimate(dimension_kl.sum(axis=1))[1],
  )


@functools.partial(jax.jit, static_argnums=4)
def _log_densities(mean, logvar, z, owners, block_size):
  # For each draw the logarithms of q(z|x) of its own image, q(z), and q(z)
  # without that image; by dimension q(z_j), the same without it, and p(z_j).
  count, log_2pi = len(mean), jnp.log(2 * jnp.pi)
  precision = jnp.exp(-logvar)

  def of_draw(args):
    z, owner = args
    each = -0.5 * (jnp.square(z - mean) * precision + logvar + log_2pi)
    joint = each.sum(axis=1)
    is_own = jnp.arange(count) == owner

    def mixtures(values):  # With and without the draw's own image.
      own = is_own.reshape(-1, *[1] * (values.ndim - 1))
      others = logsumexp(jnp.where(own, -jnp.inf, values), axis=0)
      all_of_them = logsumexp(values, axis=0) - jnp.log(count)
      return all_of_them, others - jnp.log(count - 1)

    prior = -0.5 * (jnp.square(z) + log_2pi)
    return joint[owner], *mixtures(joint), *mixtures(each), prior

  return lax.map(of_draw, (z, owners), batch_size=block_size)


def gaussian_total_correlation(latents: np.ndarray) -> tuple[float, float]:
  """-½ log det R of the correlation matrix R, nats, and its standard error.

  The total correlation if q(z) is Gaussian. Of N such draws, one for each image
  and more than dimensions, it is too large by ½ Σ_j [ψ((N - 1)/2) - ψ((N -
  j)/2)], which is subtracted (Anderson 2003, section 7.5: the determinant of a
  Wishart matrix is a product of χ² variables). The error is the delta method's.
  """
  count, latent_dim = latents.shape
  z = np.asarray(latents, np.float64)
  z = (z - z.mean(axis=0)) / z.std(axis=0)
  correlations = z.T @ z / count
  half_counts = (count - np.arange(1, latent_dim + 1)) / 2
  bias = 0.5 * np.sum(digamma((count - 1) / 2) - digamma(half_counts))
  influence = z**2 - z * np.linalg.solve(correlations, z.T).T
  _, error = mean_and_error(0.5 * influence.sum(axis=1))
  value = -0.5 * np.linalg.slogdet(correlations)[1] - bias
  return float(value), error


def shares_in_holes(
  latents: np.ndarray, *candidates: np.ndarray, seed: int | Sequence[int]
) -> np.ndarray:
  """The shares of candidates that lie in holes of the aggregate posterior.

  In each round a random half of the latents, draws from q(z) of at least 4
  images, stands for q(z). Of the other half one part sets the distance of draws
  from q(z) itself: a candidate lies in a hole if its nearest neighbour is
  farther away than that of 95 % of them. The other part is the null; then the
  two change places. The expected null is 0.05, or more of fewer than 80 images.
  The deviation over rounds is about that of their mean over other images (the
  half-sample jackknife). Compare the precision of Kynkäänniemi et al. 2019.

  All are [num_rounds, n, latent_dim]; returns the null's shares and then each
  candidate's, [num_rounds] each.
  """
  generator = np.random.default_rng(seed)
  rounds = []
  for z, *others in zip(latents, *candidates, strict=True):
    z = generator.permutation(z)
    neighbours = NearestNeighbors(n_neighbors=1).fit(z[::2])
    first, second, *distances = (
      neighbours.kneighbors(a)[0][:, 0] for a in (z[1::4], z[3::4], *others)
    )
    shares = []
    for inside, null in ((first, second), (second, first)):
      # Weibull's: 5 % of further draws are expected beyond it.
      threshold = np.quantile(inside, 0.95, method='weibull')
      shares.append([np.mean(d > threshold) for d in (null, *distances)])
    rounds.append(np.mean(shares, axis=0))
  return np.stack(rounds, axis=1)


def fit_mixture(latents: np.ndarray, seed: int) -> GaussianMixture:
  """A mixture of Gaussians fitted to draws from q(z).

  Ghosh et al. 2020, section 4, sample from it in the place of p(z). It has the
  number of Gaussians under which a tenth of the draws, at least 3 [n,
  latent_dim], is most likely, after a fit to the others.
  """
  latents = np.random.default_rng(seed).permutation(latents.astype(np.float64))

  def fit(latents, num_components):
    # A little on the diagonal, for dimensions that few images fill.
    mixture = GaussianMixture(num_components, reg_covar=1e-4, random_state=seed)
    with warnings.catch_warnings():
      # If the steps run out the fit is as good as it gets.
      warnings.simplefilter('ignore', ConvergenceWarning)
      return mixture.fit(latents)

  tenth = np.arange(len(latents)) % 10 == 0
  fitted, held_out = latents[~tenth], latents[tenth]
  possible = [n for n in _COMPONENTS if n <= len(fitted)]
  return fit(
    latents, max(possible, key=lambda n: fit(fitted, n).score(held_out))
  )
