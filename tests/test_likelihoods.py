"""Likelihoods against SciPy, quadrature, and sums over all grey levels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from vae import likelihoods

GENERATOR = np.random.default_rng(0)
SHAPE = (2, 3, 3)
IMAGES = GENERATOR.uniform(size=(5, *SHAPE)).astype(np.float32)
LEVELS = np.arange(256, dtype=np.float32) / 255


def make(name, channels, scale=1.0, shape=(1, 1)):
  """A likelihood of random outputs, and σ = 0.3."""
  count = likelihoods.num_outputs(name, channels)
  outputs = scale * GENERATOR.normal(size=(*shape, count)).astype(np.float32)
  return likelihoods.from_outputs(name, jnp.array(outputs), channels, 0.3)


def each(likelihood, values):
  """log_prob of images of one pixel, of values [n, channels]."""
  return np.asarray(likelihood.log_prob(values[:, None, None]), np.float64)


def test_gaussian_likelihood_matches_scipy():
  x, means = (
    IMAGES,
    GENERATOR.uniform(size=(2, *IMAGES.shape)).astype(np.float32),
  )
  expected = stats.norm.logpdf(x, means, 0.1).sum(axis=(-3, -2, -1))
  actual = likelihoods.Gaussian(means, 0.1).log_prob(x)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_bernoulli_likelihood_matches_scipy():
  logits = GENERATOR.normal(size=(3, 4, 5, 1)) * 3
  x = GENERATOR.uniform(size=(3, 4, 5, 1)).round()
  likelihood = likelihoods.Bernoulli(logits)
  probabilities = 1 / (1 + np.exp(-logits))
  expected = stats.bernoulli.logpmf(x, probabilities).sum(axis=(1, 2, 3))
  np.testing.assert_allclose(likelihood.log_prob(x), expected, rtol=1e-5)
  np.testing.assert_allclose(likelihood.mean, probabilities, rtol=1e-5)
  # Extreme logits stay finite, and so do their gradients.
  logits = jnp.array([-1e4, 1e4]).reshape(1, 1, 2, 1)
  value, gradient = jax.value_and_grad(
    lambda t: likelihoods.Bernoulli(t).log_prob(logits > 0).sum()
  )(logits)
  assert value == 0 and np.all(gradient == 0)


def test_laplace_and_sigma_of_each_pixel_are_scipys():
  mean = GENERATOR.uniform(size=IMAGES.shape).astype(np.float32)
  actual = likelihoods.Laplace(mean, 0.2).log_prob(IMAGES)
  expected = stats.laplace.logpdf(IMAGES, mean, 0.2 / np.sqrt(2))
  np.testing.assert_allclose(actual, expected.sum(axis=(1, 2, 3)), rtol=1e-5)
  assert stats.laplace.std(scale=0.2 / np.sqrt(2)) == pytest.approx(0.2)
  sigma = GENERATOR.uniform(0.1, 1, IMAGES.shape).astype(np.float32)
  actual = likelihoods.Gaussian(mean, sigma).log_prob(IMAGES)
  expected = stats.norm.logpdf(IMAGES, mean, sigma).sum(axis=(1, 2, 3))
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


# On both sides of where a series is used.
@pytest.mark.parametrize(
  'logit', [-100.0, -40.0, -2.5, -0.031, -0.029, 0.0, 9.0]
)
def test_continuous_bernoulli_is_a_density_on_grey_values(logit):
  def density(x):
    likelihood = likelihoods.ContinuousBernoulli(jnp.full((1, 1, 1), logit))
    return np.exp(np.asarray(likelihood.log_prob(x), np.float64))

  x, weights = np.polynomial.legendre.leggauss(200)
  x, weights = (x + 1) / 2, weights / 2
  values = density(x[:, None, None, None].astype(np.float32))
  assert weights @ values == pytest.approx(1, abs=2e-5)
  mean = likelihoods.ContinuousBernoulli(jnp.full((1, 1, 1), logit)).mean
  assert weights @ (x * values) == pytest.approx(float(mean[0, 0, 0]), abs=2e-5)

  def loss(logit):
    likelihood = likelihoods.ContinuousBernoulli(jnp.full((1, 1, 1), logit))
    return likelihood.log_prob(jnp.full((1, 1, 1), 0.3))

  # d log p / d logit = x - E[x].
  gradient = 0.3 - float(mean[0, 0, 0])
  assert jax.grad(loss)(logit) == pytest.approx(gradient, abs=1e-4)


@pytest.mark.parametrize('scale', [0.1, 1.0, 5.0])
def test_discretised_logistic_is_a_probability_of_grey_levels(scale):
  likelihood = make('logistic', 1, scale)
  probabilities = np.exp(each(likelihood, LEVELS[:, None]))
  assert probabilities.sum() == pytest.approx(1, abs=2e-5)
  # A bin has the difference of the distribution function at its ends.
  mean, log_scale = (
    float(a[0, 0, 0]) for a in (likelihood.mean, likelihood.log_scale)
  )
  ends = (np.arange(1, 256) - 0.5) / 255
  cdf = stats.logistic.cdf(ends, mean, np.exp(log_scale))
  expected = np.diff(np.concatenate([[0], cdf, [1]]))
  np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_mixture_of_logistics_is_a_probability_of_grey_levels():
  grey = make('logistic_mixture', 1)
  assert np.exp(each(grey, LEVELS[:, None])).sum() == pytest.approx(1, abs=2e-5)
  colour = make('logistic_mixture', 3)
  # Without its last channels it is a mixture of the others.
  two = likelihoods.LogisticMixture(
    colour.logits,
    colour.means[..., :2],
    colour.log_scales[..., :2],
    colour.slopes[..., :1],
  )
  one = likelihoods.LogisticMixture(
    colour.logits,
    colour.means[..., :1],
    colour.log_scales[..., :1],
    colour.slopes[..., :0],
  )
  for red, green in itertools.product((0, 40, 255), (0, 200)):
    start = np.tile(LEVELS[[red, green]], (256, 1))
    pixels = np.concatenate([start, LEVELS[:, None]], axis=1)
    marginal = np.exp(each(colour, pixels)).sum()
    expected = np.exp(each(two, start[:1])).item()
    assert marginal == pytest.approx(expected, rel=1e-3)
    pixels = np.stack([np.full(256, LEVELS[red]), LEVELS], axis=1)
    marginal = np.exp(each(two, pixels)).sum()
    expected = np.exp(each(one, pixels[:1, :1])).item()
    assert marginal == pytest.approx(expected, rel=1e-3)


def test_mean_of_a_mixture_of_logistics_is_that_of_its_draws():
  # Narrow, or the tails would be cut at black and white.
  likelihood = make('logistic_mixture', 3, 0.1)
  narrow = likelihood.replace(log_scales=likelihood.log_scales - 1)
  logits = np.asarray(narrow.logits, np.float64)[0, 0]
  weights = np.exp(logits) / np.exp(logits).sum()
  count = 200_000
  chosen = GENERATOR.choice(len(weights), count, p=weights)
  means, slopes = (
    np.asarray(a, np.float64)[0, 0] for a in (narrow.means, narrow.slopes)
  )
  scales = np.exp(np.asarray(narrow.log_scales, np.float64)[0, 0])
  noise = stats.logistic.rvs(size=(count, 3), random_state=1)
  red, green, blue = (means[chosen] + noise * scales[chosen]).T
  green += slopes[chosen, 0] * (red - 0.5)
  blue += slopes[chosen, 1] * (red - 0.5) + slopes[chosen, 2] * (green - 0.5)
  drawn = np.stack([red, green, blue], axis=1)
  error = drawn.std(axis=0) / np.sqrt(count)
  assert np.all(np.abs(drawn.mean(axis=0) - narrow.mean[0, 0]) < 5 * error)


@pytest.mark.parametrize('name', likelihoods.NAMES)
def test_likelihoods_have_finite_gradients_at_extreme_outputs(name):
  count = likelihoods.num_outputs(name, 3)

  def loss(outputs):
    likelihood = likelihoods.from_outputs(name, outputs, 3, 0.3)
    return likelihood.log_prob(jnp.asarray(IMAGES[:1])).sum()

  for size in (-60.0, 60.0):
    gradient = jax.grad(loss)(jnp.full((1, *SHAPE[:2], count), size))
    assert np.all(np.isfinite(gradient))


def test_density_of_a_sigma_of_each_pixel_integrates_to_one():
  likelihood = make('gaussian_per_pixel', 1)

  def density(x):
    return float(np.exp(likelihood.log_prob(np.full((1, 1, 1), x, 'f'))))

  mean, sigma = (float(a[0, 0, 0]) for a in (likelihood.mean, likelihood.sigma))
  ends = mean - 9 * sigma, mean + 9 * sigma
  assert integrate.quad(density, *ends)[0] == pytest.approx(1, abs=1e-4)
