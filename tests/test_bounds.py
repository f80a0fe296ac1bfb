import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from scipy import special
from scipy import stats

from evaluation import bounds
from evaluation.bounds import WeightSums


def sum_up(log_weights, cuts):
  """`WeightSums` of [K, …] weights, in chunks that are cut there."""
  sums = WeightSums.none(log_weights.shape[1:])
  for chunk in np.split(log_weights, cuts):
    # A chunk's padding does not count, whatever it holds.
    padded = np.concatenate([chunk, np.full_like(chunk[:1], 1e6)])
    counts = np.arange(len(padded)) < len(chunk)
    sums = sums.add(jnp.asarray(padded), jnp.asarray(counts))
  return sums


def test_weights_sum_as_scipy_does_however_they_are_cut():
  log_weights = np.random.default_rng(0).normal(-9000, 5, (50, 2, 3))
  log_weights = log_weights.astype(np.float32)
  exact = special.logsumexp(log_weights.astype(np.float64), axis=0)
  shares = np.exp(log_weights - exact)
  for cuts in ([], [7, 20], range(1, 50)):
    sums = sum_up(log_weights, cuts)
    assert sums.count == 50
    np.testing.assert_allclose(sums.bound(), exact - np.log(50), atol=3e-3)
    np.testing.assert_allclose(
      sums.effective_sample_size(), 1 / (shares**2).sum(axis=0), rtol=5e-3
    )


def test_equal_weights_are_worth_their_number():
  sums = sum_up(np.full((40, 1), -123.0, np.float32), [15])
  assert sums.bound()[0] == pytest.approx(-123, abs=1e-4)
  assert sums.effective_sample_size()[0] == pytest.approx(40, rel=1e-4)


@pytest.mark.parametrize('log_weight', [-1e4, -2e5, 5e4])
def test_many_weights_of_large_images_add_up(log_weight):
  # One at a time, as float32 cannot add to the logarithm of such a sum.
  sums = WeightSums.none((1,))
  add = jax.jit(WeightSums.add)
  for _ in range(3000):
    sums = add(sums, jnp.full((1, 1), log_weight), jnp.ones(1, bool))
  assert sums.bound()[0] == pytest.approx(log_weight, abs=1e-3)
  assert sums.effective_sample_size()[0] == pytest.approx(3000, rel=1e-4)


@pytest.mark.parametrize(
  ('spread', 'least', 'most'),
  # Even weights: L_K varies half as much as L_K/2. Of weights that differ by
  # hundreds of nats the greatest counts alone, and its logarithm varies with K
  # hardly at all; 1 / (effective sample size) - 1 / K would be at most 1.
  [(0.5, 1.8, 2.2), (60.0, 0.9, 1.4)],
)
def test_monte_carlo_variance_covers_that_of_repetitions(spread, least, most):
  log_weights = spread * np.random.default_rng(0).normal(size=(6000, 200))
  bound = special.logsumexp(log_weights, axis=1) - np.log(200)
  halves = special.logsumexp(log_weights.reshape(-1, 2, 100), axis=2)
  estimated = bounds.monte_carlo_variance(halves - np.log(100)).mean()
  assert least < estimated / bound.var() < most


def test_merged_weights_are_those_of_one_sum():
  log_weights = np.random.default_rng(0).normal(-9000, 5, (50, 2, 3))
  log_weights = log_weights.astype(np.float32)
  halves = [
    sum_up(log_weights[part], []) for part in (slice(30), slice(30, 50))
  ]
  merged = jax.tree.map(lambda *a: jnp.stack(a), *halves).merge()
  whole = sum_up(log_weights, [])
  assert merged.count == 50
  np.testing.assert_allclose(merged.bound(), whole.bound(), rtol=1e-6)
  np.testing.assert_allclose(
    merged.effective_sample_size(), whole.effective_sample_size(), rtol=1e-4
  )


def test_optimal_sigma_maximises_the_likelihood():
  squares, dimensions = np.array([3.0, 5.0, 1.0]), 48
  best = bounds.optimal_sigma(squares.mean() / dimensions)

  def distortion(sigma):
    return bounds.gaussian_distortion(squares, dimensions, sigma).mean()

  assert distortion(best) < min(distortion(best * f) for f in (0.99, 1.01))
  # Rybkin et al. 2021: -(D/2) (1 + log(2π MSE)).
  expected = dimensions / 2 * (1 + np.log(2 * np.pi * 3 / dimensions))
  assert distortion(best) == pytest.approx(expected)


def test_gaussian_distortion_is_scipys_density():
  generator = np.random.default_rng(0)
  x, means = generator.uniform(size=(2, 20))
  squares = np.sum((x - means) ** 2)
  assert bounds.gaussian_distortion(squares, 20, 0.3) == pytest.approx(
    -stats.norm.logpdf(x, means, 0.3).sum()
  )


def test_uniform_density_costs_eight_bits():
  assert bounds.bits_per_dimension(0.0, 12288) == 8


def test_bits_of_a_density_that_is_flat_in_each_bin_are_its_entropy():
  # A density of probability 256·p on each bin codes a value in -log2 p bits.
  probabilities = np.random.default_rng(0).dirichlet(np.ones(256))
  entropy = -np.sum(probabilities * np.log2(probabilities))
  expected_log = np.sum(probabilities * np.log(256 * probabilities))
  assert bounds.bits_per_dimension(expected_log, 1) == pytest.approx(entropy)


def test_dequantised_images_stay_in_their_bins():
  images = np.arange(256, dtype=np.uint8)
  for u in (0.0, 0.5, 0.999):
    y = np.asarray(bounds.dequantise(images, np.full(256, u, np.float32)))
    np.testing.assert_array_equal(np.floor(y * 256), images)
    assert y.min() >= 0 and y.max() < 1


def test_pixel_gaussian_is_fitted_and_integrated_over_the_noise():
  generator = np.random.default_rng(0)
  train = generator.integers(0, 256, (300, 2, 1, 1), np.uint8)
  images = generator.integers(0, 256, (4, 2, 1, 1), np.uint8)
  baseline = bounds.PixelGaussian()
  for part in (train[:100], train[100:]):
    baseline.add(part)
  # The moments of the training images' densities, flat in each bin.
  means = (train / 256 + 1 / 512).mean(axis=0).ravel()
  second = ((train / 256 + 1 / 512) ** 2 + 1 / (12 * 256**2)).mean(axis=0)
  deviations = np.sqrt(second.ravel() - means**2)
  for image, found in zip(images, baseline.log_prob(images), strict=True):
    expected = sum(
      256
      * integrate.quad(
        lambda y, m=m, s=s: stats.norm.logpdf(y, m, s), x / 256, (x + 1) / 256
      )[0]
      for x, m, s in zip(image.ravel(), means, deviations, strict=True)
    )
    assert found == pytest.approx(expected)
