"""Bounds against closed forms, above all those of a linear model."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from scipy import integrate, special, stats

from evaluation import bounds, measure, reconstruction
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
  config = ml_collections.ConfigDict({'objective': {}, 'data': {}, 'model': {}})
  trained = TrainedVAE(config, model, {'params': params}, step=0)
  split = splits.ArraySplit(pixels.reshape(COUNT, 4, 4, 3))
  data = splits.DataSet(split, split, split)

  def log_evidence(x, sigma=SIGMA):
    covariance = weights.T @ weights + sigma**2 * np.eye(48)
    return stats.multivariate_normal(offset, covariance).logpdf(x)

  settings = measure.Settings()
  return measure.Context(trained, data, 'test', settings), log_evidence


@pytest.fixture(scope='module')
def linear():
  return make_linear()


def bound_of(context, num_samples, batch_size=16, sigma=SIGMA):
  step = bounds.make_bound_step(context.trained.model, num_samples)
  key = numerics.bound_key(0)
  return context.over_split(
    lambda x, start: step(context.variables, key, x, start, sigma),
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


def test_binary_images_have_no_dequantised_bound(linear):
  context, _ = linear
  step = bounds.make_bound_step(context.trained.model, 9, False, True)
  key = numerics.bound_key(0)
  found = context.over_split(
    lambda x, start: step(context.variables, key, x, start, SIGMA)
  )
  assert found['half_bounds'].shape == (COUNT, 1, 2)
  np.testing.assert_allclose(
    found['bound'][:, 0], bound_of(context, 9)['bound'][:, 0], rtol=1e-5
  )


def test_halves_are_bounds_of_half_the_draws(linear):
  values = bound_of(linear[0], 7)
  # log Σ w of both is that of all.
  half_sums = values['half_bounds'] + np.log([4, 3])
  total = np.logaddexp.reduce(half_sums, axis=-1) - np.log(7)
  np.testing.assert_allclose(total, values['bound'], rtol=1e-5)
  # The first half has the draws of a bound with as many.
  first = bound_of(linear[0], 4)['bound']
  np.testing.assert_allclose(values['half_bounds'][..., 0], first, rtol=1e-5)


@pytest.mark.parametrize(
  ('at_once', 'decoded'), [(1000, [9]), (5, [5]), (2, [2])]
)
def test_few_draws_are_decoded_in_vain(linear, monkeypatch, at_once, decoded):
  expected = bound_of(linear[0], 9)
  sizes, decode = [], conv.Model.decode

  def recording(model, z, *args):
    sizes.append(len(z))
    return decode(model, z, *args)

  monkeypatch.setattr(conv.Model, 'decode', recording)
  monkeypatch.setattr(bounds, '_DECODED_AT_ONCE', at_once * 16 * 48)
  bounds.make_bound_step.cache_clear()
  found = bound_of(linear[0], 9)
  # What is decoded in turn is traced once, by the number of draws at a time.
  assert sorted(set(sizes)) == decoded
  np.testing.assert_allclose(found['bound'], expected['bound'], rtol=1e-6)


def test_weights_are_equal_under_the_true_posterior():
  # With orthogonal weights the true posterior is diagonal, and the encoder's.
  q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(48, 4)))
  precision = 0.25 / SIGMA**2 + 1
  encoder = 0.5 * q / SIGMA**2 / precision
  context, _ = make_linear(encoder, 0.5 * q.T, np.full(4, 1 / precision))
  sizes = bound_of(context, 50)['sample_size'][:, 0]
  np.testing.assert_allclose(sizes, 50, rtol=1e-3)


@pytest.mark.parametrize('mean', [-9000.0, -2e5, 5e4])
def test_weights_of_large_images_add_up(mean):
  log_weights = np.random.default_rng(0).normal(mean, 5, (3000, 2))
  log_weights = log_weights.astype(np.float32)
  exact = special.logsumexp(log_weights.astype(np.float64), axis=0)
  shares = np.exp(log_weights - exact)
  bound, size = bounds.weigh(jnp.asarray(log_weights))
  # In the digits of float32.
  np.testing.assert_allclose(bound, exact - np.log(3000), rtol=1e-7)
  np.testing.assert_allclose(size, 1 / (shares**2).sum(axis=0), rtol=1e-3)


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
  found = bounds.pixel_gaussian((train[:100], train[100:]), (images,))
  # The moments of the training images' densities, flat in each bin.
  means = (train / 256 + 1 / 512).mean(axis=0).ravel()
  second = ((train / 256 + 1 / 512) ** 2 + 1 / (12 * 256**2)).mean(axis=0)
  deviations = np.sqrt(second.ravel() - means**2)
  for image, log_prob in zip(images, found, strict=True):
    expected = sum(
      256
      * integrate.quad(
        lambda y, m=m, s=s: stats.norm.logpdf(y, m, s), x / 256, (x + 1) / 256
      )[0]
      for x, m, s in zip(image.ravel(), means, deviations, strict=True)
    )
    assert log_prob == pytest.approx(expected)
