import numpy as np
import pytest

from vae import aggregate_posterior
from vae import posterior

LATENT_DIM = 3
# q(z|x) = N(A x, diag(s²)) and x ~ N(0, I): all densities are Gaussian.
MATRIX = np.array([[1.2, 0.8, 0.0], [0.6, 1.0, 0.5], [0.0, 0.4, 1.3]])
DEVIATIONS = np.array([0.5, 0.6, 0.7])


def encode(count, seed=0):
  x = np.random.default_rng(seed).normal(size=(count, LATENT_DIM))
  # Its moments are exactly those of the distribution.
  x -= x.mean(axis=0)
  x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / count)).T
  mean = (x @ MATRIX.T).astype(np.float32)
  logvar = np.broadcast_to(2 * np.log(DEVIATIONS), mean.shape)
  return mean, logvar.astype(np.float32)


def test_parts_of_the_rate_are_those_of_a_gaussian():
  mean, logvar = encode(8000)
  covariance = MATRIX @ MATRIX.T + np.diag(DEVIATIONS**2)
  log_determinant = np.linalg.slogdet(covariance)[1]
  variances = np.diag(covariance)
  information = 0.5 * (log_determinant - np.log(DEVIATIONS**2).sum())
  correlation = 0.5 * (np.log(variances).sum() - log_determinant)
  dimension_kl = 0.5 * (variances - 1 - np.log(variances))

  parts = aggregate_posterior.split_rate(mean, logvar, seed=0)
  assert parts.mutual_information == pytest.approx(information, rel=0.05)
  assert parts.total_correlation == pytest.approx(correlation, rel=0.05)
  # Together within 5 %, and each within 5 % of their sum.
  assert parts.dimension_kl.sum() == pytest.approx(dimension_kl.sum(), rel=0.05)
  np.testing.assert_allclose(
    parts.dimension_kl, dimension_kl, atol=0.05 * dimension_kl.sum()
  )
  assert parts.mutual_information <= parts.information_upper_bound
  assert parts.information_upper_bound == pytest.approx(information, rel=0.05)


def test_parts_add_up_to_the_rate():
  mean, logvar = encode(300)
  parts = aggregate_posterior.split_rate(mean, logvar, seed=1)
  total = (
    parts.mutual_information
    + parts.total_correlation
    + parts.dimension_kl.sum()
  )
  rate = posterior.kl(mean, logvar).sum(axis=1).mean()
  assert total == pytest.approx(rate, abs=4 * sum(parts.standard_errors[:3]))


def test_information_of_few_images_is_at_most_their_logarithm():
  # Posteriors so narrow that each draw tells its image.
  mean, logvar = encode(50)
  parts = aggregate_posterior.split_rate(mean, logvar - 20, seed=0)
  assert parts.mutual_information == pytest.approx(np.log(50), rel=1e-4)
  # Of the distribution it can be more, but not more than the rate.
  rate = posterior.kl(mean, logvar - 20).sum(axis=1).mean()
  assert np.log(50) < parts.information_upper_bound < rate * 1.05


def test_collapsed_posterior_has_no_parts():
  nothing = np.zeros((100, 4), np.float32)
  parts = aggregate_posterior.split_rate(nothing, nothing, seed=0)
  assert abs(parts.mutual_information) < 1e-5
  assert abs(parts.total_correlation) < 1e-5
  np.testing.assert_allclose(parts.dimension_kl, 0, atol=1e-5)


def test_blocks_do_not_matter(monkeypatch):
  mean, logvar = encode(100)
  whole = aggregate_posterior.split_rate(mean, logvar, seed=0)
  monkeypatch.setattr(aggregate_posterior, '_BLOCK_SIZE', 7 * 100 * LATENT_DIM)
  cut = aggregate_posterior.split_rate(mean, logvar, seed=0)
  assert cut.total_correlation == pytest.approx(
    whole.total_correlation, rel=1e-5
  )


def test_draws_have_the_posteriors_moments():
  mean, logvar = encode(20_000)
  z = aggregate_posterior.draw(mean, logvar, seed=0)
  noise = (z - mean) / np.exp(0.5 * logvar)
  np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.03)
  np.testing.assert_allclose(noise.std(axis=0), 1, atol=0.02)


def test_what_comes_from_the_aggregate_posterior_is_rarely_in_holes():
  generator = np.random.default_rng(0)
  latents, fresh = generator.normal(size=(2, 4000, 5))
  share = aggregate_posterior.share_in_holes(latents, fresh)
  assert share == pytest.approx(0.05, abs=0.015)


def test_a_prior_wider_than_the_aggregate_posterior_falls_into_holes():
  generator = np.random.default_rng(0)
  latents = 0.05 * generator.normal(size=(2000, 5))
  prior = generator.normal(size=(2000, 5))
  assert aggregate_posterior.share_in_holes(latents, prior) > 0.99


def test_mixture_fills_the_holes_between_clusters():
  generator = np.random.default_rng(0)
  centers = np.array([[2.0, 0.0], [-2.0, 1.0]])
  latents = centers[np.arange(2000) % 2] + 0.1 * generator.normal(
    size=(2000, 2)
  )
  latents = generator.permutation(latents)
  # One Gaussian would fill what is between them.
  assert aggregate_posterior.fit_mixture(latents, seed=0).n_components > 1
  mixture = aggregate_posterior.fit_mixture(latents, 0, num_components=2)
  found = mixture.means_[np.argsort(-mixture.means_[:, 0])]
  np.testing.assert_allclose(found, centers, atol=0.02)
  drawn = mixture.sample(2000)[0]
  prior = generator.normal(size=(2000, 2))
  assert aggregate_posterior.share_in_holes(latents, drawn) < 0.1
  assert aggregate_posterior.share_in_holes(latents, prior) > 0.9


def test_mixture_has_the_number_of_components_that_it_is_told():
  latents = np.random.default_rng(0).normal(size=(100, 2))
  assert aggregate_posterior.fit_mixture(latents, 0, 3).n_components == 3
  # Of one Gaussian, and few images in many dimensions, one is best.
  latents = np.random.default_rng(0).normal(size=(60, 10))
  assert aggregate_posterior.fit_mixture(latents, 0).n_components == 1
