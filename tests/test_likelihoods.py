import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vae import likelihoods


def images(*shape, seed=0):
  return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize('sigma', [0.1, 1.0, 2.5])
def test_gaussian_is_scipys(sigma):
  x, means = images(3, 4, 5, 2), images(3, 4, 5, 2, seed=1)
  expected = stats.norm.logpdf(x, means, sigma).sum(axis=(1, 2, 3))
  actual = likelihoods.gaussian_log_prob(x, means, sigma)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_bernoulli_is_scipys():
  logits = np.random.default_rng(0).normal(size=(3, 4, 5, 1)) * 3
  x = images(3, 4, 5, 1).round()
  probabilities = 1 / (1 + np.exp(-logits))
  expected = stats.bernoulli.logpmf(x, probabilities).sum(axis=(1, 2, 3))
  actual = likelihoods.bernoulli_log_prob(x, logits)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_bernoulli_stays_finite_at_extreme_logits():
  logits = jnp.array([-1e4, 1e4]).reshape(1, 1, 2, 1)
  x = jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1)
  value, gradient = jax.value_and_grad(
    lambda t: likelihoods.bernoulli_log_prob(x, t).sum()
  )(logits)
  assert value == 0 and np.all(gradient == 0)


def test_best_bernoulli_logit_of_a_grey_value_is_its_own():
  x = jnp.full((1, 1, 1, 1), 0.3)
  logit = jnp.log(0.3 / 0.7).reshape(1, 1, 1, 1)
  gradient = jax.grad(lambda t: likelihoods.bernoulli_log_prob(x, t).sum())
  np.testing.assert_allclose(gradient(logit), 0, atol=1e-6)
  assert likelihoods.mean('bernoulli', logit) == pytest.approx(0.3)


def test_many_samples_broadcast_against_one_batch():
  x, means = images(3, 4, 4, 1), images(2, 3, 4, 4, 1, seed=1)
  both = likelihoods.log_prob('gaussian', x, means, 0.5)
  assert both.shape == (2, 3)
  for i in range(2):
    one = likelihoods.log_prob('gaussian', x, means[i], 0.5)
    np.testing.assert_allclose(both[i], one, rtol=1e-6)


def test_sums_are_float32_for_bfloat16_outputs():
  x = images(2, 64, 64, 3)
  outputs = jnp.zeros((2, 64, 64, 3), jnp.bfloat16)
  value = likelihoods.log_prob('gaussian', x, outputs, 1.0)
  expected = stats.norm.logpdf(x).sum(axis=(1, 2, 3))
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=1e-5)
