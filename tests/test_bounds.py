"""Bounds against closed forms, above all those of a linear model."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from evaluation import bounds, measure, reconstruction
from evaluation.bounds import WeightSums
from vae import numerics, splits
from vae.loading import TrainedVAE
from vae.models import conv

SIGMA = 0.1
COUNT = 60


def make_linear(encoder=None, weights=None, variance=None, dtype='float32'):
  """A linear VAE in a measurement, and log p(x) of any x, exactly.

  p(x) = N(b, WᵀW + σ²I), as in probabilistic PCA. By default the posterior is
  near the true one but not it, so that the ELBO is well below log p(x).
  """
  generator = np.random.default_rng(0)
  default = 0.1 * generator.normal(size=(4, 48))
  offset = generator.uniform(0.4, 0.6, 48)
  latents = generator.normal(size=(COUNT, 4))
  if weights is None:
    weights = default
  precision = weights @ weights.T / SIGMA**2 + np.eye(4)
  shift = 0.0
  if encoder is None:
    encoder = np.linalg.solve(precision, weights).T / SIGMA**2
    variance, shift = 1.5 / np.diag(precision), 0.8 / np.diag(precision) ** 0.5
  zeros = np.zeros((48, 4))
  params = {
    'encoder': {
      'mean': {'kernel': encoder, 'bias': shift - offset @ encoder},
      'logvar': {'kernel': zeros, 'bias': np.log(variance)},
    },
    'decoder': {'Dense_0': {'kernel': weights, 'bias': offset}},
  }
  params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
  x = offset + latents @ weights
  x += SIGMA * generator.normal(size=x.shape)
  pixels = np.clip(np.round(255 * x), 0, 255).astype(np.uint8)
  model = conv.Model(
    (4, 4, 3), latent_dim=4, hidden_channels=(), sigma=SIGMA, dtype=dtype
  )
  config = types.SimpleNamespace(objective={})
  trained = TrainedVAE(config, model, {'params': params}, step=0)
  split = splits.ArraySplit(pixels.reshape(COUNT, 4, 4, 3))

  def log_evidence(x, sigma=SIGMA):
    covariance = weights.T @ weights + sigma**2 * np.eye(48)
    return stats.multivariate_normal(offset, covariance).logpdf(x)

  return measure.Context(trained, split, measure.Settings()), log_evidence


@pytest.fixture(scope='module')
def linear():
  return make_linear()


def bound_of(context, num_samples, batch_size=16, sigma=SIGMA, seed=0):
  step = bounds.make_bound_step(context.trained.model)
  key = numerics.bound_key(seed)
  return context.over_split(
    lambda x, start: step(context.variables, key, x, start, num_samples, sigma),
    batch_size=batch_size,
  )


def pixels_of(context):
  return context.split.images.reshape(COUNT, -1)


def test_bound_of_5000_samples_is_the_evidence_of_ppca(linear):
  context, log_evidence = linear
  exact = log_evidence(pixels_of(context) / 255)
  bound = bound_of(context, 5000)['bound'][:, 0]
  assert bound.mean() == pytest.approx(exact.mean(), abs=0.02)
  np.testing.assert_allclose(bound, exact, atol=0.1)
  # One sample's is an ELBO, and well below.
  assert bound_of(context, 1)['bound'][:, 0].mean() < exact.mean() - 0.5


def test_dequantised_bound_has_its_own_sigma(linear):
  context, log_evidence = linear
  exact = log_evidence((pixels_of(context) + 0.5) / 256, sigma=0.15)
  bound = bound_of(context, 2000, sigma=0.15)['bound'][:, 1]
  # The noise of the dequantisation is small against σ, but not nothing.
  assert bound.mean() == pytest.approx(exact.mean(), abs=0.2)


def test_bound_does_not_fall_with_more_samples(linear):
  means, errors = [], []
  for count in (1, 3, 10, 100, 1000):
    values = bound_of(linear[0], count, seed=count)['bound'][:, 0]
    means.append(values.mean())
    errors.append(values.std() / COUNT**0.5 / count**0.5)
  for i in range(len(means) - 1):
    assert means[i + 1] >= means[i] - 3 * (errors[i] + errors[i + 1])
  assert means[-1] > means[0] + 0.5


@pytest.mark.parametrize('num_samples', [1, 7, 40])
def test_halves_are_bounds_of_half_the_draws(linear, num_samples):
  values = bound_of(linear[0], num_samples)
  counts = np.array([(num_samples + 1) // 2, num_samples // 2])
  # log Σ w of both is that of all.
  half_sums = values['half_bounds'][..., counts > 0] + np.log(
    counts[counts > 0]
  )
  total = np.logaddexp.reduce(half_sums, axis=-1) - np.log(num_samples)
  np.testing.assert_allclose(total, values['bound'], rtol=1e-5)
  # The first half has the draws of a bound with as many.
  first = bound_of(linear[0], counts[0])['bound']
  np.testing.assert_allclose(values['half_bounds'][..., 0], first, rtol=1e-5)


def test_weights_are_equal_under_the_true_posterior():
  # With orthogonal weights the true posterior is diagonal, and the encoder's.
  q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(48, 4)))
  precision = 0.25 / SIGMA**2 + 1
  encoder = 0.5 * q / SIGMA**2 / precision
  context, _ = make_linear(encoder, 0.5 * q.T, np.full(4, 1 / precision))
  sizes = bound_of(context, 50)['sample_size'][:, 0]
  np.testing.assert_allclose(sizes, 50, rtol=1e-3)


def test_batches_and_chunks_do_not_matter(linear):
  bound = bound_of(linear[0], 30)['bound']
  # Other batch sizes are other chunks: 128 are decoded at a time.
  for batch_size in (1, 7, 200):
    other = bound_of(linear[0], 30, batch_size)['bound']
    np.testing.assert_allclose(other, bound, rtol=1e-4)


def test_bound_that_rests_on_one_draw_is_called_loose():
  def about(size):
    weighted = {
      'bound': np.full(11, 1000.0),
      'half_bounds': np.stack([np.full(11, 952), np.full(11, 954)], axis=1),
      'sample_size': np.full(11, size),
    }
    results = measure.Measurements(11)
    bounds.add_bound(results, 'x_bound', weighted, 1000, 'nats', 'log p(x)')
    error = results.metrics['x_bound_monte_carlo_error'].value
    # Each image's halves differ by 2 nats: √2 nats for each of eleven images.
    assert error == pytest.approx(np.sqrt(2 / 11))
    assert results.metrics['x_effective_samples'].value == pytest.approx(size)
    return results.metrics['x_bound'].about

  assert '+47 from K/2 to K' in about(700.0) and 'loose' not in about(700.0)
  assert 'a loose bound' in about(1.06) and '1.06 count' in about(1.06)


@pytest.mark.parametrize('cuts', [[], [7, 20], range(1, 50)])
def test_weights_sum_as_scipy_does_however_they_are_cut(cuts):
  log_weights = np.random.default_rng(0).normal(-9000, 5, (50, 2, 3))
  log_weights = log_weights.astype(np.float32)
  exact = special.logsumexp(log_weights.astype(np.float64), axis=0)
  shares = np.exp(log_weights - exact)
  sums = WeightSums.of(jnp.full((1, 2, 3), -jnp.inf))
  for chunk in np.split(log_weights, cuts):
    # With one that does not count.
    nothing = jnp.full((1, 2, 3), -jnp.inf)
    sums = sums.add(jnp.concatenate([chunk, nothing]))
  np.testing.assert_allclose(sums.bound(50), exact - np.log(50), atol=3e-3)
  np.testing.assert_allclose(
    sums.effective_sample_size(), 1 / (shares**2).sum(axis=0), rtol=5e-3
  )


@pytest.mark.parametrize('log_weight', [-1e4, -2e5, 5e4])
def test_many_weights_of_large_images_add_up(log_weight):
  # One at a time, as float32 cannot add to the logarithm of such a sum.
  add = jax.jit(WeightSums.add)
  sums = WeightSums.of(jnp.full((1, 1), log_weight))
  for _ in range(2999):
    sums = add(sums, jnp.full((1, 1), log_weight))
  assert sums.bound(3000)[0] == pytest.approx(log_weight, abs=1e-3)
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


def test_optimal_sigma_maximises_the_likelihood():
  squares, dimensions = np.array([3.0, 5.0, 1.0]), 48
  best = bounds.optimal_sigma(squares.mean() / dimensions)

  def distortion(sigma):
    return bounds.gaussian_distortion(squares, dimensions, sigma).mean()

  assert distortion(best) < min(distortion(best * f) for f in (0.99, 1.01))
  # Rybkin et al. 2021: -(D/2) (1 + log(2π MSE)).
  expected = dimensions / 2 * (1 + np.log(2 * np.pi * 3 / dimensions))
  assert distortion(best) == pytest.approx(expected)


def test_bits_of_a_density_that_is_flat_in_each_bin_are_its_entropy():
  # A density of probability 256·p on each bin codes a value in -log2 p bits.
  probabilities = np.random.default_rng(0).dirichlet(np.ones(256))
  entropy = -np.sum(probabilities * np.log2(probabilities))
  expected_log = np.sum(probabilities * np.log(256 * probabilities))
  assert bounds.bits_per_dimension(expected_log, 1) == pytest.approx(entropy)


def test_dequantised_images_are_spread_over_their_bins():
  images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
  keys = numerics.example_keys(numerics.measure_key(0), jnp.arange(256))
  y = np.asarray(reconstruction.dequantise(images, keys)) * 256
  np.testing.assert_array_equal(np.floor(y), images)
  assert (y - images).mean() == pytest.approx(0.5, abs=0.1)


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
