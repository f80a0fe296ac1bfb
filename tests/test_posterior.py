import numpy as np
import pytest

from evaluation import posterior
from evaluation.measure import Measurements
from vae import distributions

LATENT_DIM = 3
# q(z|x) = N(A x, diag(s²)) and x ~ N(0, I): all densities are Gaussian.
MATRIX = np.array([[1.2, 0.8, 0.0], [0.6, 1.0, 0.5], [0.0, 0.4, 1.3]])
DEVIATIONS = np.array([0.5, 0.6, 0.7])


def encode(count, seed=0):
  """Codes of the Gaussian model."""
  x = np.random.default_rng(seed).normal(size=(count, LATENT_DIM))
  # Its moments are exactly those of the distribution.
  x -= x.mean(axis=0)
  x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / count)).T
  mean = (x @ MATRIX.T).astype(np.float32)
  logvar = np.broadcast_to(2 * np.log(DEVIATIONS), mean.shape)
  return codes_of(mean, logvar.astype(np.float32))


def codes_of(mean, logvar):
  kl = distributions.kl_per_dimension(
    distributions.Normal(mean, logvar), distributions.StandardNormal(())
  )
  return {'mean': mean, 'logvar': logvar, 'kl': np.asarray(kl)}


def encode_independently(count, latent_dim, rate, seed=0):
  """Codes of this rate, nats, with the aggregate posterior N(0, I)."""
  variance = np.exp(-2 * rate / latent_dim)
  mean = np.random.default_rng(seed).normal(size=(count, latent_dim))
  mean *= np.sqrt(1 - variance)
  logvar = np.full_like(mean, np.log(variance))
  return codes_of(mean.astype(np.float32), logvar.astype(np.float32))


def holds(interval, value):
  """True if a value lies between two bounds, up to their errors."""
  (lower, lower_error), (upper, upper_error) = interval
  return lower - 4 * lower_error <= value <= upper + 4 * upper_error


def test_a_dimension_is_active_if_its_mean_moves():
  generator = np.random.default_rng(0)
  variances = np.array([0, 0.005, 0.02, 1])
  mean = generator.normal(size=(20_000, 4)) * np.sqrt(variances)
  # A constant mean is not zero, and still carries nothing of the image.
  mean[:, 0] = 3
  results = Measurements()
  posterior.add_dimensions(results, {'mean': mean}, draws_z=False)
  assert results.metrics['active_units'].value == 2
  found = results.dimensions['mean_variance']
  np.testing.assert_allclose(found, variances, rtol=0.05, atol=1e-12)
  assert posterior.most_informative(variances).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
  ('kl', 'share', 'expected'),
  [
    # 126 dimensions of a nat in all beside two that carry nine.
    ([1 / 126] * 126 + [5, 4], 0.9, 2),
    ([1.0] * 10, 1.0, 10),
    ([0.0, 0.0], 0.9, 0),
  ],
)
def test_dimensions_that_carry_a_share_of_the_rate(kl, share, expected):
  assert posterior.dimensions_that_carry(np.array(kl), share) == expected


@pytest.mark.parametrize(
  ('kl', 'active', 'words'),
  [
    (
      [1.0, 0.1, 2.0],
      [1, 1, 1],
      'Not collapsed: all 3 dimensions are active, 3.10 nats; 2 of them carry '
      '90 %.',
    ),
    ([0.001, 0.0], [0, 0], 'Collapsed: none of the 2 dimensions'),
    (
      [2.0, 0.01, 0.02, 0.0, 1.0, 0.0],
      [1, 0, 0, 0, 1, 0],
      'Partly collapsed: 2 of 6 dimensions are active and carry 3.00 of 3.03 '
      'nats, 2 of them carry 90 %.',
    ),
  ],
)
def test_verdict_names_a_collapse(kl, active, words):
  text = posterior.verdict(np.array(kl), np.array(active, bool))
  assert text.startswith(words)


def test_parts_of_the_rate_are_those_of_a_gaussian():
  codes = encode(2000)
  covariance = MATRIX @ MATRIX.T + np.diag(DEVIATIONS**2)
  log_determinant = np.linalg.slogdet(covariance)[1]
  variances = np.diag(covariance)
  information = 0.5 * (log_determinant - np.log(DEVIATIONS**2).sum())
  correlation = 0.5 * (np.log(variances).sum() - log_determinant)
  dimension_kl = 0.5 * (variances - 1 - np.log(variances))

  parts = posterior.split_rate(codes, seed=0)
  # So many images leave little open.
  for interval, expected in (
    (parts.mutual_information, information),
    (parts.total_correlation, correlation),
  ):
    assert holds(interval, expected)
    assert interval[0][0] == pytest.approx(expected, rel=0.05)
    assert interval[1][0] == pytest.approx(expected, rel=0.05)
  # Together within 5 %, and each within 5 % of their sum.
  assert parts.dimension_kl.sum() == pytest.approx(dimension_kl.sum(), rel=0.05)
  np.testing.assert_allclose(
    parts.dimension_kl, dimension_kl, atol=0.05 * dimension_kl.sum()
  )


def test_total_correlation_of_independent_dimensions_is_left_open():
  # q(z) = N(0, I), at a rate that so few images cannot account for.
  count, latent_dim, rate = 200, 16, 30
  codes = encode_independently(count, latent_dim, rate)
  parts = posterior.split_rate(codes, seed=0)
  assert parts.mutual_information[0][0] == pytest.approx(np.log(count))
  assert holds(parts.mutual_information, rate)
  assert parts.total_correlation[0][0] == 0
  # All that the images' information leaves of the rate, and no less.
  assert parts.total_correlation[1][0] > rate - np.log(count) - 1
  value, error = posterior.gaussian_total_correlation(
    posterior.draw(codes, seed=1)
  )
  assert abs(value) < 2 * error < 0.15


@pytest.mark.slow
def test_errors_cover_other_images():
  # At a rate that the upper bounds on I(x; z) and TC(z) vary with; each row
  # from other images.
  values, errors = [], []
  for seed in range(24):
    codes = encode_independently(100, 8, rate=12, seed=seed)
    parts = posterior.split_rate(codes, seed=[seed, 1])
    z = posterior.draw(codes, [seed, 2])
    found = (
      parts.mutual_information[1],
      parts.total_correlation[1],
      (parts.dimension_kl.sum(), parts.dimension_kl_error),
      posterior.gaussian_total_correlation(z),
    )
    values.append([value for value, _ in found])
    errors.append([error for _, error in found])
  ratio = np.mean(errors, axis=0) / np.std(values, axis=0, ddof=1)
  assert np.all(ratio[:2] > 0.7) and np.all(ratio[:2] < 1.4)
  # Near independence the linear approximation is on the safe side.
  assert np.all(ratio[2:] > 0.7) and np.all(ratio[2:] < 3)


def test_gaussian_total_correlation_is_its_closed_form():
  # Few draws, of correlated dimensions: -½ log det R alone is far too large.
  latent_dim, count = 10, 40
  mixing = np.eye(latent_dim) + 0.3
  covariance = mixing @ mixing.T
  expected = 0.5 * (
    np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1]
  )
  generator = np.random.default_rng(0)
  draws = generator.normal(size=(400, count, latent_dim)) @ mixing.T
  found = np.array([posterior.gaussian_total_correlation(z) for z in draws])
  deviation = found[:, 0].std()
  assert found[:, 0].mean() == pytest.approx(expected, abs=deviation / 5)
  assert 0.7 < found[:, 1].mean() / deviation < 1.6


def in_holes(latents, candidates, seed=0):
  """Null and candidates, mean and deviation over rounds of the same draws."""
  rounds = (np.broadcast_to(a, (10, *a.shape)) for a in (latents, candidates))
  shares = posterior.shares_in_holes(*rounds, seed=seed)
  return shares.mean(axis=1), shares.std(axis=1, ddof=1)


def test_what_comes_from_the_aggregate_posterior_is_rarely_in_holes():
  nulls, shares, deviations = [], [], []
  for seed in range(20):
    generator = np.random.default_rng(seed)
    latents, prior = generator.normal(size=(2, 500, 6))
    (null, share), (_, deviation) = in_holes(latents, prior, seed)
    nulls.append(null)
    shares.append(share)
    deviations.append(deviation)
  # No bias, and an error that covers other images and other noise.
  chance = np.std(shares, ddof=1)
  assert np.mean(shares) == pytest.approx(0.05, abs=4 * chance / 20**0.5)
  assert np.mean(nulls) == pytest.approx(0.05, abs=0.005)
  assert 0.7 < np.mean(deviations) / chance < 2.5
  assert np.mean(deviations) < 0.02


def test_mixture_fills_the_holes_between_clusters():
  generator = np.random.default_rng(0)
  centers = np.array([[2.0, 0.0], [-2.0, 1.0]])
  latents = np.repeat(centers, 1000, axis=0)
  latents += 0.1 * generator.normal(size=(2000, 2))
  # One Gaussian would fill what is between them.
  mixture = posterior.fit_mixture(latents, seed=0)
  assert mixture.n_components > 1
  drawn = mixture.sample(2000)[0]
  prior = generator.normal(size=(2000, 2))
  assert in_holes(latents, drawn)[0][1] < 0.1
  assert in_holes(latents, prior)[0][1] > 0.9


def test_mixture_has_the_best_number_of_components():
  # Of one Gaussian, and few images in many dimensions, one is best.
  latents = np.random.default_rng(0).normal(size=(60, 10))
  assert posterior.fit_mixture(latents, 0).n_components == 1
