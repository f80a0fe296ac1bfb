import functools

import jax
import numpy as np
import pytest
from scipy import stats
from vae.model import VAE

from evaluation import bounds
from evaluation import image_quality
from evaluation import per_image
from vae import randomness
from vae import splits

SIGMA = 0.1
COUNT = 60


def make_linear():
  """A linear VAE, its split, and log p(x) of any x, exactly.

  p(x) = N(b, WᵀW + σ²I), as in probabilistic PCA. The posterior is near the
  true one but not it, so that the ELBO is well below log p(x).
  """
  generator = np.random.default_rng(0)
  weights = 0.1 * generator.normal(size=(4, 48))
  offset = generator.uniform(0.4, 0.6, 48)
  precision = weights @ weights.T / SIGMA**2 + np.eye(4)
  encoder = np.linalg.solve(precision, weights).T / SIGMA**2
  bias = 0.8 / np.sqrt(np.diag(precision)) - offset @ encoder
  params = {
    'encoder': {
      'mean': {'kernel': encoder, 'bias': bias},
      'logvar': {
        'kernel': np.zeros((48, 4)),
        'bias': np.log(1.5 / np.diag(precision)),
      },
    },
    'decoder': {'Dense_0': {'kernel': weights, 'bias': offset}},
  }
  params = jax.tree.map(lambda a: a.astype(np.float32), params)
  x = offset + generator.normal(size=(COUNT, 4)) @ weights
  x += SIGMA * generator.normal(size=x.shape)
  pixels = np.clip(np.round(255 * x), 0, 255).astype(np.uint8)
  model = VAE((4, 4, 3), 4, (), sigma=SIGMA)

  def log_evidence(x, sigma=SIGMA):
    covariance = weights.T @ weights + sigma**2 * np.eye(48)
    return stats.multivariate_normal(offset, covariance).logpdf(x)

  split = splits.ArraySplit(pixels.reshape(COUNT, 4, 4, 3))
  return model, {'params': params}, split, log_evidence


@pytest.fixture(scope='module')
def linear():
  return make_linear()


def measure(model, variables, split, batch_size=16, sample_posterior=True):
  step = per_image.make_measure_step(model, sample_posterior)
  step = functools.partial(step, variables, randomness.measure_key(0))
  return per_image.over_split(step, split, batch_size)


@pytest.fixture(scope='module')
def bound_of(linear):
  model, variables, split, _ = linear
  step = per_image.make_bound_step(model)

  def bound_of(num_samples, batch_size=16, sigma=SIGMA, seed=0):
    key = randomness.bound_key(seed)
    return per_image.over_split(
      lambda x, start: step(variables, key, x, start, num_samples, sigma),
      split,
      batch_size,
    )

  return bound_of


def pixels_of(split):
  return next(split.batches(np.arange(COUNT), COUNT))


def test_bound_of_5000_samples_is_the_evidence_of_ppca(linear, bound_of):
  *_, split, log_evidence = linear
  exact = log_evidence(pixels_of(split).reshape(COUNT, -1) / 255)
  bound = bound_of(5000)['bound']
  assert bound.mean() == pytest.approx(exact.mean(), abs=0.02)
  np.testing.assert_allclose(bound, exact, atol=0.1)
  # One sample's is an ELBO, and well below.
  assert bound_of(1)['bound'].mean() < exact.mean() - 0.5


def test_dequantised_bound_has_its_own_sigma(linear, bound_of):
  *_, split, log_evidence = linear
  y = (pixels_of(split).reshape(COUNT, -1) + 0.5) / 256
  exact = log_evidence(y, sigma=0.15)
  bound = bound_of(2000, sigma=0.15)['dequantised_bound']
  # The noise of the dequantisation is small against σ, but not nothing.
  assert bound.mean() == pytest.approx(exact.mean(), abs=0.2)


def test_bound_does_not_fall_with_more_samples(bound_of):
  means, errors = [], []
  for count in (1, 3, 10, 100, 1000):
    values = bound_of(count, seed=count)
    means.append(values['bound'].mean())
    errors.append(values['bound'].std() / COUNT**0.5 / count**0.5)
  for i in range(len(means) - 1):
    assert means[i + 1] >= means[i] - 3 * (errors[i] + errors[i + 1])
  assert means[-1] > means[0] + 0.5


def test_bound_of_one_sample_is_the_elbo_of_its_draw(linear, bound_of):
  """log p(x, z) - log q(z|x) has the ELBO's mean, by another formulation."""
  model, variables, split, _ = linear
  values = measure(model, variables, split)
  mean, logvar = values['mean'], values['logvar']
  kl = 0.5 * (mean**2 + np.exp(logvar) - logvar - 1).sum(axis=1)
  elbo = -values['distortion'] - kl
  ones = np.stack([bound_of(1, seed=s)['bound'] for s in range(50)])
  # Of fifty draws, and of the eight in the distortion.
  error = ones.std(axis=0).mean() / COUNT**0.5 * (1 / 50 + 1 / 8) ** 0.5
  assert abs(ones.mean() - elbo.mean()) < 4 * error


@pytest.mark.parametrize('num_samples', [1, 7, 40])
def test_halves_are_bounds_of_half_the_draws(bound_of, num_samples):
  values = bound_of(num_samples)
  counts = np.array([(num_samples + 1) // 2, num_samples // 2])
  # log Σ w of both is that of all.
  total = np.logaddexp.reduce(
    values['half_bounds'][:, counts > 0] + np.log(counts[counts > 0]), axis=1
  )
  np.testing.assert_allclose(
    total - np.log(num_samples), values['bound'], rtol=1e-5
  )
  # The first half has the draws of a bound with as many.
  np.testing.assert_allclose(
    values['half_bounds'][:, 0], bound_of(counts[0])['bound'], rtol=1e-5
  )


def test_halves_say_how_much_the_bound_varies(bound_of):
  repeated = [bound_of(20, seed=seed) for seed in range(30)]
  observed = np.std([values['bound'].mean() for values in repeated], ddof=1)
  variances = [
    bounds.monte_carlo_variance(values['half_bounds']) for values in repeated
  ]
  stated = np.sqrt(np.sum(variances, axis=1).mean()) / COUNT
  assert 0.8 < stated / observed < 2.2


def test_weights_are_all_worth_the_same_under_the_true_posterior():
  # With orthogonal weights the true posterior is diagonal, and the encoder's.
  model, variables, split, _ = make_linear()
  params = variables['params']
  q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(48, 4)))
  weights, offset = 0.5 * q.T, params['decoder']['Dense_0']['bias']
  precision = 0.25 / SIGMA**2 + 1
  encoder = (weights.T / SIGMA**2 / precision).astype(np.float32)
  params = {
    'encoder': {
      'mean': {'kernel': encoder, 'bias': -offset @ encoder},
      'logvar': {
        'kernel': np.zeros((48, 4), np.float32),
        'bias': np.full(4, -np.log(precision), np.float32),
      },
    },
    'decoder': {
      'Dense_0': {'kernel': weights.astype(np.float32), 'bias': offset}
    },
  }
  step = per_image.make_bound_step(model)
  values = per_image.over_split(
    lambda x, start: step(
      {'params': params}, randomness.bound_key(0), x, start, 50, SIGMA
    ),
    split,
    16,
  )
  np.testing.assert_allclose(values['effective_sample_size'], 50, rtol=1e-3)


def test_batches_and_chunks_do_not_matter(linear, bound_of, monkeypatch):
  model, variables, split, _ = linear
  values = measure(model, variables, split, batch_size=16)
  for batch_size in (7, COUNT, 1000):
    other = measure(model, variables, split, batch_size)
    for name, value in values.items():
      assert value.shape[0] == COUNT
      np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5)
  bound = bound_of(30)['bound']
  # Other batch sizes are other chunks: 128 are decoded at a time.
  for batch_size in (1, 7, 200):
    np.testing.assert_allclose(
      bound_of(30, batch_size)['bound'], bound, rtol=1e-4
    )


def test_expectations_under_the_posterior_are_those_of_the_linear_model(linear):
  model, variables, split, _ = linear
  values = measure(model, variables, split)
  x = pixels_of(split).reshape(COUNT, -1) / 255
  params = variables['params']
  mean = x @ params['encoder']['mean']['kernel']
  mean += params['encoder']['mean']['bias']
  np.testing.assert_allclose(values['mean'], mean, atol=1e-4)
  dense = params['decoder']['Dense_0']
  errors = x - mean @ dense['kernel'] - dense['bias']
  spread = (np.exp(values['logvar']) * (dense['kernel'] ** 2).sum(axis=1)).sum(
    axis=1
  )
  expected = (errors**2).sum(axis=1) + spread
  assert values['squared_error'].mean() == pytest.approx(
    expected.mean(), rel=0.03
  )
  distortion = values['squared_error'] / (2 * SIGMA**2)
  distortion += 48 * (np.log(SIGMA) + 0.5 * np.log(2 * np.pi))
  np.testing.assert_allclose(values['distortion'], distortion, atol=1e-2)
  clipped = np.clip(x - errors, 0, 1)
  np.testing.assert_allclose(
    values['mse'], ((x - clipped) ** 2).mean(axis=1), rtol=1e-3
  )
  np.testing.assert_allclose(
    values['psnr'], -10 * np.log10(values['mse']), rtol=1e-5
  )
  assert 'ssim' not in values


def test_without_sampling_there_is_one_draw_the_mean(linear):
  model, variables, split, _ = linear
  values = measure(model, variables, split, sample_posterior=False)
  x = pixels_of(split) / np.float32(255)
  decoded = model.apply(variables, values['mean'], method='decode')
  np.testing.assert_allclose(
    values['squared_error'],
    np.square(x - decoded).sum(axis=(1, 2, 3)),
    rtol=1e-4,
  )


def test_ssim_is_of_the_reconstruction_through_the_mean():
  model = VAE((16, 16, 1), 2, (4,))
  pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 1), np.uint8)
  variables = jax.jit(model.init)(jax.random.key(0), pixels / 255.0)
  values = measure(model, variables, splits.ArraySplit(pixels), batch_size=4)
  x = pixels.astype(np.float32) / 255
  decoded = np.clip(model.apply(variables, x), 0, 1)
  np.testing.assert_allclose(
    values['ssim'], image_quality.ssim(x, decoded), rtol=1e-4
  )


def test_over_split_keeps_the_order_and_tells_how_far_it_is():
  pixels = np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1)
  told = []
  values = per_image.over_split(
    lambda images, start: {'pixel': images[..., 0, 0, 0], 'twice': 2 * images},
    splits.ArraySplit(pixels),
    4,
    told.append,
  )
  np.testing.assert_array_equal(values['pixel'], np.arange(11))
  np.testing.assert_array_equal(values['twice'], 2 * pixels)
  assert told == [4, 8, 11]
