"""The aggregate posterior q(z), the mean of q(z|x) over the images.

What samples from the prior miss is the difference between q(z) and p(z): the
holes in the latent space.
"""

from collections.abc import Sequence
import dataclasses
import functools
import warnings

import jax
from jax import lax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

# Draws of z for the expectations under q(z): so few at least, so many at most,
# and in between what takes so many densities of one dimension.
_MIN_DRAWS, _MAX_DRAWS = 2000, 20_000
_NUM_DENSITIES = 2**30

# Floats that a block of the densities of all draws under all posteriors takes.
_BLOCK_SIZE = 2**22

# Numbers of Gaussians that a mixture may have.
_COMPONENTS = (1, 2, 5, 10, 20)

# A draw lies in a hole where it is farther from q(z) than this share of what
# comes from q(z) itself.
_QUANTILE = 0.95


@dataclasses.dataclass(frozen=True)
class RateSplit:
  """The rate's parts, nats; see `split_rate`.

  Attributes:
    mutual_information: I(x; z) of the images at hand; at most log num_images.
    total_correlation: KL(q(z) ‖ Π_j q(z_j)).
    dimension_kl: KL(q(z_j) ‖ N(0, 1)), [latent_dim].
    information_upper_bound: on I(x; z) of the distribution that the images
      come from, for which `mutual_information` is a lower bound.
    standard_errors: Monte-Carlo errors of `mutual_information`,
      `total_correlation`, the sum of `dimension_kl`, and
      `information_upper_bound`.
  """

  mutual_information: float
  total_correlation: float
  dimension_kl: np.ndarray
  information_upper_bound: float
  standard_errors: tuple[float, float, float, float]


def draw(
  mean: np.ndarray, logvar: np.ndarray, seed: int | Sequence[int]
) -> np.ndarray:
  """One draw of each image's posterior, [num_images, latent_dim].

  Draws that are to be compared must not share their noise, and so the seed.
  """
  epsilon = np.random.default_rng(seed).standard_normal(mean.shape)
  return (mean + np.exp(0.5 * logvar) * epsilon).astype(np.float32)


def split_rate(
  mean: np.ndarray, logvar: np.ndarray, seed: int | Sequence[int]
) -> RateSplit:
  """E_x KL(q(z|x) ‖ p(z)) = I(x; z) + TC(z) + Σ_j KL(q(z_j) ‖ p(z_j)).

  Hoffman & Johnson 2016; Chen et al. 2018, equation 2. q(z) is the mixture of
  the posteriors of all the images, so that the three parts are exact for the
  distribution that is uniform over these images, up to the Monte-Carlo error
  of the draws. Of the distribution that the images come from they tell this:
  its I(x; z) lies between `mutual_information` and the lesser of two bounds,
  the rate and that of the mixture without each draw's own image (Poole et al.
  2019, sections 2.1 and 2.4).

  Args:
    mean: [num_images, latent_dim].
    logvar: [num_images, latent_dim], log σ².
    seed: of the draws.
  """
  count, latent_dim = mean.shape
  affordable = _NUM_DENSITIES // (count * latent_dim)
  num_draws = int(np.clip(affordable, _MIN_DRAWS, _MAX_DRAWS))
  owners = np.linspace(0, count - 1, num_draws).astype(int)
  z = draw(mean[owners], logvar[owners], seed)
  size = max(1, _BLOCK_SIZE // (count * latent_dim))
  densities = jax.device_get(_log_densities(mean, logvar, z, owners, size))
  own, joint, others, marginals, priors = (
    a.astype(np.float64) for a in densities
  )
  dimension_kl = marginals - priors
  parts = (
    own - joint,
    joint - marginals.sum(axis=1),
    dimension_kl.sum(axis=1),
    min(own - others, own - priors.sum(axis=1), key=np.mean),
  )
  information, correlation, _, upper = (float(p.mean()) for p in parts)
  return RateSplit(
    information,
    correlation,
    dimension_kl.mean(axis=0),
    upper,
    tuple(float(p.std() / np.sqrt(len(p))) for p in parts),
  )


@functools.partial(jax.jit, static_argnums=4)
def _log_densities(mean, logvar, z, owners, block_size):
  """The logarithms of five densities at each draw, nats.

  Returns:
    [num_draws] each: q(z|x) of the draw's own image, q(z), and q(z) without
    that image; [num_draws, latent_dim] each: q(z_j), p(z_j).
  """
  count = mean.shape[0]
  log_2pi = jnp.log(2 * jnp.pi)
  precision = jnp.exp(-logvar)

  def of_draw(args):
    z, owner = args
    each = -0.5 * (jnp.square(z - mean) * precision + logvar + log_2pi)
    joint = each.sum(axis=1)
    alone = jnp.where(jnp.arange(count) == owner, -jnp.inf, joint)
    return (
      joint[owner],
      logsumexp(joint) - jnp.log(count),
      logsumexp(alone) - jnp.log(count - 1),
      logsumexp(each, axis=0) - jnp.log(count),
      -0.5 * (jnp.square(z) + log_2pi),
    )

  return lax.map(of_draw, (z, owners), batch_size=block_size)


def share_in_holes(latents: np.ndarray, candidates: np.ndarray) -> float:
  """The share of candidates that lie in holes of the aggregate posterior.

  Half of the latents are what there is; the other half say how far from it
  what comes from the aggregate posterior itself can lie. A candidate lies in
  a hole where its nearest neighbour is farther away than that of 95 % of
  them. So 0.05 means: as q(z) itself. (In the manner of the precision of
  Kynkäänniemi et al. 2019, in the latent space.)

  Args:
    latents: draws from q(z), one for each image, [num_images, latent_dim], at
      least 2.
    candidates: [n, latent_dim], such as draws from the prior.
  """
  # Neighbours in a data set may be alike: which half is left to chance.
  latents = np.random.default_rng(0).permutation(latents)
  neighbours = NearestNeighbors(n_neighbors=1).fit(latents[::2])

  def distances(z):
    return neighbours.kneighbors(z)[0][:, 0]

  threshold = np.quantile(distances(latents[1::2]), _QUANTILE)
  return float(np.mean(distances(candidates) > threshold))


def fit_mixture(
  latents: np.ndarray, seed: int, num_components: int | None = None
) -> GaussianMixture:
  """A mixture of full Gaussians fitted to q(z), to sample from instead of p(z).

  The cure for the holes of Ghosh et al. 2020, section 4.

  Args:
    latents: draws from q(z), [num_images, latent_dim], at least 3.
    seed: of the fit's start.
    num_components: at most num_images; by default what is most likely to have
      made a tenth of the latents, after a fit to the others.
  """
  latents = np.random.default_rng(seed).permutation(latents.astype(np.float64))
  if num_components is None:
    tenth = np.arange(len(latents)) % 10 == 0
    possible = [n for n in _COMPONENTS if n <= np.sum(~tenth)]
    num_components = max(
      possible,
      key=lambda n: _fit(latents[~tenth], seed, n).score(latents[tenth]),
    )
  return _fit(latents, seed, num_components)


def _fit(latents, seed, num_components):
  # A little on the diagonal, for dimensions that few images fill.
  mixture = GaussianMixture(num_components, reg_covar=1e-4, random_state=seed)
  with warnings.catch_warnings():
    # Where the steps run out the fit is as good as it gets.
    warnings.simplefilter('ignore', ConvergenceWarning)
    return mixture.fit(latents)
