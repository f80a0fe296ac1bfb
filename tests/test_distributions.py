"""Distributions against SciPy, integrals, and their definitions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from vae import distributions, numerics

MEAN = np.array([[0.3, -1.2, 0.0], [2.0, 0.1, -0.4]], np.float32)
LOGVAR = np.array([[0.5, -2.0, 0.0], [-0.1, 1.0, -6.0]], np.float32)
POSTERIOR = distributions.Normal(MEAN, LOGVAR)
PRIOR = distributions.StandardNormal((3,))
LEVELS = (5, 4, 2)
CODES = distributions.UniformCodes((2, 3), LEVELS)


def keys(num_keys, seed=0):
  return jax.random.split(jax.random.key(seed), num_keys)


def random_images(*shape, seed=0):
  return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def test_normal_densities_match_scipy():
  z = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
  expected = stats.norm.logpdf(z, MEAN, np.exp(LOGVAR / 2)).sum(axis=-1)
  np.testing.assert_allclose(POSTERIOR.log_prob(z), expected, rtol=1e-5)
  expected = stats.norm.logpdf(z).sum(axis=-1)
  np.testing.assert_allclose(PRIOR.log_prob(z), expected, rtol=1e-5)
  u = np.linspace(0.01, 0.99, 9)
  np.testing.assert_allclose(PRIOR.quantile(u), stats.norm.ppf(u), atol=1e-5)
  spatial = distributions.StandardNormal((2, 3))
  np.testing.assert_allclose(
    spatial.log_prob(z), expected.sum(axis=-1), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('distribution', 'mean', 'deviation'),
  [(POSTERIOR, MEAN, np.exp(LOGVAR / 2)), (PRIOR, 0, 1)],
)
def test_normal_samples_have_the_moments(distribution, mean, deviation):
  z = np.asarray(distribution.sample(keys(2), 100_000))
  assert z.shape == (100_000, 2, 3)
  scaled = (z - mean) / deviation
  np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=0.015)
  np.testing.assert_allclose(scaled.std(axis=0), 1, atol=0.015)
  # Dimensions and examples are independent.
  correlations = np.corrcoef(scaled.reshape(-1, 6).T)
  np.testing.assert_allclose(correlations, np.eye(6), atol=0.02)


def test_samples_do_not_depend_on_how_a_batch_is_split():
  all_keys = numerics.example_keys(jax.random.key(3), jnp.arange(6))
  wide = distributions.Normal(np.tile(MEAN, (3, 1)), np.tile(LOGVAR, (3, 1)))
  for distribution in (wide, PRIOR, CODES):
    together = distribution.sample(all_keys, 2)
    for part in (slice(0, 3), slice(3, 6)):
      own = jax.tree.map(lambda a, part=part: a[part], distribution)
      np.testing.assert_array_equal(
        together[:, part], own.sample(all_keys[part], 2)
      )


def test_kl_is_the_integral():
  expected = np.zeros(MEAN.shape)
  for index in np.ndindex(MEAN.shape):
    q = stats.norm(MEAN[index], np.exp(LOGVAR[index] / 2))
    expected[index], _ = integrate.quad(
      lambda z, q=q: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)),
      *(q.mean() - 12 * q.std(), q.mean() + 12 * q.std()),
    )
  actual = distributions.kl_per_dimension(POSTERIOR, PRIOR)
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  np.testing.assert_allclose(
    distributions.kl(POSTERIOR, PRIOR), expected.sum(axis=-1), atol=1e-5
  )


def test_kl_keeps_its_digits_close_to_the_prior():
  posterior = distributions.Normal(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-4))
  prior = distributions.StandardNormal((1,))
  # ½ (e^t - 1 - t) = t²/4 + t³/12 + …
  assert distributions.kl(posterior, prior) == pytest.approx(1e-8 / 4, rel=0.01)
  assert distributions.kl(posterior, CODES) is None


@pytest.mark.parametrize('levels', [(8, 5, 5, 5), LEVELS])
def test_codes_are_the_grid_of_all_levels(levels):
  """Mentzer et al. 2023, section 3: Π levels codes, equally spaced."""
  inner = np.arctanh(np.linspace(-0.99, 0.99, 15))
  axis = np.array([-9, *inner, 9], np.float32)
  z = np.array(list(itertools.product(axis, repeat=len(levels))))
  codes = np.unique(np.asarray(distributions.quantise(z, levels)), axis=0)
  # L // 2 steps of 1 / (L // 2) below 0, and all others above.
  grid = [(np.arange(n) - n // 2) / (n // 2) for n in levels]
  np.testing.assert_allclose(codes, list(itertools.product(*grid)), atol=1e-6)
  assert len(codes) == math.prod(levels)


def test_gradient_of_the_rounding_is_straight_through():
  z = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)

  def bounded(z):
    """Odd L: (L - 1)/2 tanh z; even: shifted by ½, 0 kept at 0."""
    half = jnp.array([(n - 1) * 1.001 / 2 for n in LEVELS])
    offset = jnp.array([0.0, 0.5, 0.5])
    shift = jnp.arctanh(offset / half)
    return (half * jnp.tanh(z + shift) - offset) / jnp.array([2.0, 2.0, 1.0])

  def total(function):
    return jax.grad(lambda z: (function(z) * jnp.array([1.0, 2, 3])).sum())(z)

  np.testing.assert_allclose(
    total(lambda z: distributions.quantise(z, LEVELS)),
    total(bounded),
    rtol=1e-4,
    atol=1e-5,
  )


def test_prior_of_codes_is_uniform():
  z = np.asarray(CODES.sample(keys(4), 5000)).reshape(-1, 3)
  codes, counts = np.unique(z, axis=0, return_counts=True)
  assert len(codes) == math.prod(LEVELS)
  assert stats.chisquare(counts).pvalue > 1e-3
  # Quantiles go through the levels in order, each for as long.
  u = (np.arange(20) + 0.5) / 20
  found = CODES.quantile(np.stack([u] * 3, axis=-1))
  for column, n in zip(found.T, LEVELS, strict=True):
    np.testing.assert_allclose(
      np.unique(column), (np.arange(n) - n // 2) / (n // 2)
    )
    assert np.all(np.diff(column) >= 0)
    assert len(set(np.unique(column, return_counts=True)[1])) == 1


def test_rate_of_codes_is_the_log_of_their_number():
  code = CODES.sample(keys(4), 1)[0]
  posterior = distributions.Codes(code)
  expected = np.full(4, 2 * np.log(math.prod(LEVELS)))
  np.testing.assert_allclose(
    distributions.kl(posterior, CODES), expected, rtol=1e-6
  )
  np.testing.assert_allclose(-CODES.log_prob(code), expected, rtol=1e-6)
  z = posterior.sample(keys(4), 2)
  np.testing.assert_array_equal(z, np.stack([code, code]))
  np.testing.assert_array_equal(posterior.log_prob(z), np.zeros((2, 4)))


def test_gaussian_likelihood_matches_scipy():
  x, means = random_images(3, 4, 5, 2), random_images(2, 3, 4, 5, 2, seed=1)
  expected = stats.norm.logpdf(x, means, 0.1).sum(axis=(-3, -2, -1))
  actual = distributions.Gaussian(means, 0.1).log_prob(x)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_bernoulli_likelihood_matches_scipy():
  logits = np.random.default_rng(0).normal(size=(3, 4, 5, 1)) * 3
  x = random_images(3, 4, 5, 1).round()
  likelihood = distributions.Bernoulli(logits)
  probabilities = 1 / (1 + np.exp(-logits))
  expected = stats.bernoulli.logpmf(x, probabilities).sum(axis=(1, 2, 3))
  np.testing.assert_allclose(likelihood.log_prob(x), expected, rtol=1e-5)
  np.testing.assert_allclose(likelihood.mean, probabilities, rtol=1e-5)
  # Extreme logits stay finite, and so do their gradients.
  logits = jnp.array([-1e4, 1e4]).reshape(1, 1, 2, 1)
  value, gradient = jax.value_and_grad(
    lambda t: distributions.Bernoulli(t).log_prob(logits > 0).sum()
  )(logits)
  assert value == 0 and np.all(gradient == 0)
