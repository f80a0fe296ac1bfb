"""Distributions against SciPy, integrals, and their definitions."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
import numpy as np
import pytest
from scipy import integrate, stats

from vae import (
  autoregressive,
  discrete,
  distributions,
  flows,
  numerics,
  second_stage,
)

MEAN = np.array([[0.3, -1.2, 0.0], [2.0, 0.1, -0.4]], np.float32)
LOGVAR = np.array([[0.5, -2.0, 0.0], [-0.1, 1.0, -6.0]], np.float32)
POSTERIOR = distributions.Normal(MEAN, LOGVAR)
PRIOR = distributions.StandardNormal((3,))
LEVELS = (5, 4, 2)
CODES = discrete.UniformCodes((2, 3), LEVELS)


def keys(num_keys, seed=0):
  return jax.random.split(jax.random.key(seed), num_keys)


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
  z = POSTERIOR.sample(keys(2), 3)
  np.testing.assert_allclose(
    distributions.kl(POSTERIOR, PRIOR, z), expected.sum(axis=-1), atol=1e-5
  )


def test_kl_keeps_its_digits_close_to_the_prior():
  posterior = distributions.Normal(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-4))
  prior = distributions.StandardNormal((1,))
  # ½ (e^t - 1 - t) = t²/4 + t³/12 + …
  terms = distributions.kl_per_dimension(posterior, prior)
  assert terms == pytest.approx(1e-8 / 4, rel=0.01)
  assert distributions.kl_per_dimension(posterior, CODES) is None


@pytest.mark.parametrize('levels', [(8, 5, 5, 5), LEVELS])
def test_codes_are_the_grid_of_all_levels(levels):
  """Mentzer et al. 2023, section 3: Π levels codes, equally spaced."""
  inner = np.arctanh(np.linspace(-0.99, 0.99, 15))
  axis = np.array([-9, *inner, 9], np.float32)
  z = np.array(list(itertools.product(axis, repeat=len(levels))))
  codes = np.unique(np.asarray(discrete.quantise(z, levels)), axis=0)
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
    total(lambda z: discrete.quantise(z, LEVELS)),
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
  posterior = discrete.Codes(code)
  expected = np.full(4, 2 * np.log(math.prod(LEVELS)))
  np.testing.assert_allclose(
    distributions.kl(posterior, CODES, code[None]), expected, rtol=1e-6
  )
  np.testing.assert_allclose(-CODES.log_prob(code), expected, rtol=1e-6)
  z = posterior.sample(keys(4), 2)
  np.testing.assert_array_equal(z, np.stack([code, code]))
  np.testing.assert_array_equal(posterior.log_prob(z), np.zeros((2, 4)))


def make_full(size=3, batch=2):
  """A posterior with covariances."""
  generator = np.random.default_rng(1)
  mean = generator.normal(size=(batch, size)).astype(np.float32)
  logvar = generator.normal(size=(batch, size)).astype(np.float32)
  rows = generator.normal(size=(batch, size * (size - 1) // 2))
  return distributions.FullNormal.from_rows(
    mean, logvar, rows.astype(np.float32)
  )


def test_gaussian_with_covariances_is_scipys():
  full = make_full()
  z = np.asarray(full.sample(keys(2), 100_000))
  for index in range(2):
    scale = np.asarray(full.scale[index], np.float64)
    assert np.all(np.diag(scale) > 0) and np.all(np.triu(scale, 1) == 0)
    covariance = scale @ scale.T
    exact = stats.multivariate_normal(full.mean[index], covariance)
    found = full.log_prob(z[:9])[:, index]
    np.testing.assert_allclose(found, exact.logpdf(z[:9, index]), rtol=1e-4)
    error = np.abs(np.cov(z[:, index].T) - covariance)
    assert error.max() < 0.02 * covariance.max()
  # KL(N(μ, Σ) ‖ N(0, I)) = ½ (tr Σ + μᵀμ - d - log det Σ).
  prior = distributions.StandardNormal((3,))
  covariance = np.einsum('bij,bkj->bik', full.scale, full.scale)
  expected = np.trace(covariance, axis1=1, axis2=2) - 3
  expected += np.square(full.mean).sum(axis=1)
  expected -= np.linalg.slogdet(covariance)[1]
  terms = full.kl_per_dimension(prior)
  np.testing.assert_allclose(terms.sum(axis=1), expected / 2, rtol=1e-5)
  assert np.all(terms > 0)


def test_gaussian_with_covariances_of_zero_is_the_diagonal_one():
  rows = np.zeros((2, 3), np.float32)
  full = distributions.FullNormal.from_rows(MEAN, LOGVAR, rows)
  z = POSTERIOR.sample(keys(2), 4)
  np.testing.assert_allclose(full.sample(keys(2), 4), z, rtol=1e-6)
  np.testing.assert_allclose(full.log_prob(z), POSTERIOR.log_prob(z), rtol=1e-5)
  np.testing.assert_allclose(
    full.kl_per_dimension(PRIOR), POSTERIOR.kl_per_dimension(PRIOR), atol=1e-5
  )


def make_flow(base, size, context=None):
  """A flow with parameters of its own, far from the identity."""
  network = flows.Coupling(4, 8)
  variables = network.init(jax.random.key(0), base.mean, context)
  generator = np.random.default_rng(2)
  variables = jax.tree.map(
    lambda a: np.float32(generator.normal(0, 0.4, a.shape)), variables
  )
  del size
  return distributions.Flow(base, network, variables, context)


def test_flow_inverts_and_its_log_determinant_is_the_jacobians():
  context = np.random.default_rng(3).normal(size=(2, 5)).astype(np.float32)
  flow = make_flow(POSTERIOR, 3, context)
  u = POSTERIOR.sample(keys(2), 4)
  z, log_det = flow.network.apply(flow.variables, u, context)
  assert np.abs(z - u).max() > 0.1
  back, inverse_log_det = flow.network.apply(
    flow.variables, z, context, method='inverse'
  )
  np.testing.assert_allclose(back, u, atol=1e-5)
  np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-5)
  for sample, index in itertools.product(range(4), range(2)):

    def one(u, index=index):
      own = context[index : index + 1]
      return flow.network.apply(flow.variables, u[None], own)[0][0]

    jacobian = jax.jacfwd(one)(u[sample, index])
    expected = np.linalg.slogdet(jacobian)[1]
    assert log_det[sample, index] == pytest.approx(expected, abs=1e-4)


def make_second_stage(sigma=0.5):
  """A linear second stage with the exact posterior of each u; W and b.

  p(z) = N(b, W² + σ² I) for a diagonal W.
  """
  weights, offset = np.array([0.5, 1.5, 0.0]), np.array([1.0, -1.0, 0.5])
  precision = weights**2 / sigma**2 + 1
  gain = weights / sigma**2 / precision
  no_weights = np.zeros((3, 3))

  def dense(kernel, bias):
    # The features are the input, twice.
    kernel = np.concatenate([kernel, no_weights])
    return {'kernel': np.float32(kernel), 'bias': np.float32(bias)}

  params = {
    'mean': dense(np.diag(gain), -offset * gain),
    'logvar': dense(no_weights, -np.log(precision)),
    'image': dense(np.diag(weights), offset),
    'log_sigma': np.float32(np.log(sigma)),
  }
  network = second_stage.SecondStage(3, widths=())
  prior = distributions.SecondStage(network, {'params': params}, 3)
  return prior, stats.multivariate_normal(
    offset, np.diag(weights**2 + sigma**2)
  )


def test_second_stage_is_a_density_by_draws():
  prior, exact = make_second_stage()
  z = np.random.default_rng(5).normal(size=(4, 2, 3)).astype(np.float32)
  found = distributions.log_prior(prior, z, keys(2))
  # By the exact posterior any draw gives log p(z).
  np.testing.assert_allclose(found, exact.logpdf(z), rtol=1e-4)
  params = prior.variables['params']
  wider = {**params['logvar'], 'bias': params['logvar']['bias'] + 0.5}
  other = prior.replace(variables={'params': {**params, 'logvar': wider}})
  draws = distributions.log_prior(
    other, np.broadcast_to(z[0, :1], (20_000, 3)), keys(20_000)
  )
  weights = np.exp(np.asarray(draws, np.float64))
  assert weights.std() > 0.1 * weights.mean()
  error = weights.std() / np.sqrt(len(weights))
  assert abs(weights.mean() - exact.pdf(z[0, 0])) < 4 * error
  samples = np.asarray(prior.sample(keys(100), 100)).reshape(-1, 3)
  error = np.abs(np.cov(samples.T) - exact.cov)
  assert error.max() < 0.05 * exact.cov.max()
  np.testing.assert_allclose(samples.mean(axis=0), exact.mean, atol=0.05)


@pytest.mark.slow
def test_gradient_of_a_mixture_is_that_of_its_densities():
  generator = np.random.default_rng(6)
  # Components as narrow as the posteriors of a VampPrior.
  means, logvars = generator.normal(size=(2, 5, 2, 3))
  means, logvars = 2 * means, logvars - 5
  logits = generator.normal(size=5)
  z = means[generator.integers(5, size=(4, 6))]
  z += np.exp(-2.5) * generator.normal(size=z.shape)
  with numerics.fixed('float64'):
    args = jax.tree.map(jnp.asarray, (z, logits, means, logvars))

    def directly(z, logits, means, logvars):
      each = norm.logpdf(z[:, :, None], means, jnp.exp(0.5 * logvars))
      each = each.sum(axis=(-2, -1)) + jax.nn.log_softmax(logits)
      return jax.nn.logsumexp(each, axis=-1)

    def value(z, *mixture):
      return distributions.Mixture(*mixture).log_prob(z)

    weights = generator.normal(size=(4, 6))
    results = [
      jax.vjp(function, *args)[1](jnp.asarray(weights))
      for function in (value, directly)
    ]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)
    jax.tree.map(close, *results)
    close(value(*args), directly(*args))


@pytest.mark.parametrize('kind', ['flow', 'mixture'])
def test_learned_priors_are_densities_and_sample_them(kind):
  if kind == 'flow':
    prior = make_flow(distributions.StandardNormal((2,)), 2)
  else:
    generator = np.random.default_rng(4)
    prior = distributions.Mixture(
      *(
        jnp.array(generator.normal(size=shape).astype(np.float32))
        for shape in ((3,), (3, 2), (3, 2))
      )
    )
  line = np.linspace(-12, 12, 601, dtype=np.float32)
  grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
  density = np.exp(np.asarray(prior.log_prob(grid), np.float64))
  area = (line[1] - line[0]) ** 2
  assert density.sum() * area == pytest.approx(1, abs=1e-3)
  z = np.asarray(prior.sample(keys(500), 40)).reshape(-1, 2)
  mean = density @ grid * area
  error = z.std(axis=0) / np.sqrt(len(z))
  assert np.all(np.abs(z.mean(axis=0) - mean) < 5 * error)
  # The entropy, by draws and by the grid.
  log_prob = np.asarray(prior.log_prob(z))
  inside = density[density > 0]
  entropy = np.sum(inside * np.log(inside)) * area
  error = log_prob.std() / np.sqrt(len(z))
  assert abs(log_prob.mean() - entropy) < 5 * error + 1e-3
  # Quantiles of each dimension.
  u = np.tile([[0.1], [0.5], [0.9]], (1, 2))
  expected = np.quantile(z, [0.1, 0.5, 0.9], axis=0)
  found = distributions.quantile(prior, u)
  np.testing.assert_allclose(found, expected, atol=0.15)


def test_flow_starts_as_the_identity():
  network = flows.Coupling(4, 8)
  u = np.random.default_rng(5).normal(size=(6, 3)).astype(np.float32)
  z, log_det = network.apply(network.init(jax.random.key(0), u), u)
  np.testing.assert_array_equal(z, u)
  np.testing.assert_array_equal(log_det, np.zeros(6))


@pytest.mark.parametrize(
  'is_uniform', [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_prior_of_codes_sums_to_one_and_samples_it(is_uniform):
  table = jnp.array([[0.0, 1.0], [2.0, -1.0], [-1.0, 0.5]])
  network, variables = None, None
  if not is_uniform:
    network = autoregressive.Transformer(3, 1, 8)
    variables = network.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    generator = np.random.default_rng(6)
    variables = jax.tree.map(
      lambda a: np.float32(generator.normal(0, 1, a.shape)), variables
    )
  prior = discrete.CodePrior(table, (2, 1, 2), network, variables)
  pairs = np.array(list(itertools.product(range(3), repeat=2)))
  z = table[pairs].reshape(-1, 2, 1, 2)
  probabilities = np.exp(np.asarray(prior.log_prob(z), np.float64))
  assert probabilities.sum() == pytest.approx(1, abs=1e-5)
  assert is_uniform == (np.ptp(probabilities) < 1e-6)
  drawn = np.asarray(prior.sample(keys(4000), 2)).reshape(-1, 2, 2)
  codes = np.asarray(discrete.nearest(drawn, table))
  counts = np.bincount(codes @ [3, 1], minlength=9)
  assert (
    stats.chisquare(counts, 8000 * probabilities / sum(probabilities))[1] > 1e-3
  )


def test_transformer_sees_only_the_codes_before():
  network = autoregressive.Transformer(5, 2, 8)
  codes = np.random.default_rng(7).integers(0, 5, (2, 6))
  variables = network.init(jax.random.key(0), codes)
  logits = network.apply(variables, codes)
  changed = codes.copy()
  changed[:, 3] = (changed[:, 3] + 1) % 5
  differs = np.any(network.apply(variables, changed) != logits, axis=(0, 2))
  np.testing.assert_array_equal(differs, [False] * 4 + [True] * 2)
