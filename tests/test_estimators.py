"""Objectives that estimate something, against what they estimate."""

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import test_objectives
from vae import distributions, likelihoods
from vae.models import mlp
from vae.objectives import (
  capacity,
  cyclical,
  dip,
  elbo,
  factor,
  iwae,
  mmd,
  rae,
  total_correlation,
)

GENERATOR = np.random.default_rng(0)


def make_batch(size, seed=2, **changes):
  """A batch of which only keys and mask are used."""
  keys = jax.random.split(jax.random.key(seed), (2, size))
  return test_objectives.make_batch(
    jnp.zeros((size, 1, 1, 1)), keys=keys[0], noise_keys=keys[1], **changes
  )


@pytest.mark.parametrize(
  'neutral',
  [
    cyclical.Objective(),
    capacity.Objective(beta=1.0, capacity=0.0),
    total_correlation.Objective(tc_weight=1.0),
    dip.Objective(off_diagonal=0.0, diagonal=0.0),
    mmd.Objective(beta=1.0, mmd_weight=0.0),
    factor.Objective(gamma=0.0, critic_sizes=(4,)),
  ],
  ids=lambda objective: type(objective).__module__.rpartition('.')[2],
)
def test_objective_with_neutral_settings_is_the_elbo(neutral):
  model = test_objectives.make_model()
  variables, expected = test_objectives.evaluate(elbo.Objective(), model)
  if hasattr(neutral, 'critic'):
    network, shape = neutral.critic(model), neutral.critic_input(model)
    own = network.init(jax.random.key(1), jnp.zeros((1, *shape)))
    variables['params']['critic'] = own['params']
  batch = test_objectives.make_batch()
  found = test_objectives.call(neutral, model, variables, batch)
  mean = float(expected['loss'].mean())
  assert float(found['loss'].mean()) == pytest.approx(mean, rel=1e-6)
  for name in ('elbo', 'distortion', 'kl', 'mse'):
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize('gradient', ['plain', 'dreg', 'piwae'])
def test_importance_weighted_bound_of_one_draw_is_the_elbo(gradient):
  model = mlp.Model(test_objectives.SHAPE, sigma=0.5, hidden_sizes=(4,))
  objective = iwae.Objective(num_samples=1, gradient=gradient)
  variables, found = test_objectives.evaluate(objective, model, train=True)
  batch = test_objectives.make_batch()
  images = test_objectives.IMAGES
  posterior = test_objectives.apply(model, variables, images, 'encode')
  z = posterior.sample(batch.keys, 1)
  likelihood = test_objectives.apply(model, variables, z, 'decode')
  kl = posterior.log_prob(z) - model.apply(variables, method='prior').log_prob(
    z
  )
  expected = (likelihood.log_prob(images) - kl)[0]
  for name in ('elbo', 'bound'):
    np.testing.assert_allclose(found[name], expected, rtol=1e-6)
  np.testing.assert_allclose(found['loss'], -expected, rtol=1e-6)


def test_capacity_holds_the_mean_rate():
  model = test_objectives.make_model()
  objective = capacity.Objective(7.0, capacity=4.0, capacity_epochs=8.0)
  for epoch, at in ((0.0, 0.0), (2.0, 1.0), (np.inf, 4.0)):
    _, found = test_objectives.evaluate(
      objective, model, epoch=np.float32(epoch), train=False
    )
    distance = abs(found['kl'].mean() - at)
    np.testing.assert_allclose(
      found['loss'] - found['distortion'], 7 * distance, rtol=1e-4
    )


def test_cyclical_weight_is_a_sawtooth_with_a_plateau():
  objective = cyclical.Objective(2.0, cycle_epochs=4.0, rising_share=0.5)
  epochs = np.arange(0, 9)
  weights = [
    float(objective.weight(make_batch(1, epoch=jnp.float32(e), train=True)))
    for e in epochs
  ]
  np.testing.assert_allclose(weights, [0, 1, 2, 2, 0, 1, 2, 2, 0], atol=1e-6)
  assert objective.weight(make_batch(1, epoch=jnp.float32(1))) == 2.0


class Linear(nn.Module):
  """x = w z + e, e ~ N(0, σ²), and q(z|x) = N(a x, s²): images of one pixel."""

  sigma = 0.5

  def setup(self):
    for name, value in (('w', 0.8), ('a', 0.4), ('log_s', -0.5)):
      setattr(self, name, self.param(name, lambda _, v=value: jnp.float32(v)))

  def encode(self, images, train=False):
    mean = self.a * images.reshape(-1, 1)
    return distributions.Normal(mean, jnp.full_like(mean, 2 * self.log_s))

  def decode(self, z, train=False):
    return likelihoods.Gaussian(self.w * z[..., None, None], self.sigma)

  def prior(self):
    return distributions.StandardNormal((1,))


X = 1.5
PARAMS = {
  'w': jnp.float32(0.8),
  'a': jnp.float32(0.4),
  'log_s': jnp.float32(-0.5),
}


def exact_bound(params, num_samples):
  """L_K by Gauss-Hermite quadrature over the noise of K = 1 or 2 draws."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(80)
  weights = weights / weights.sum()
  z = params['a'] * X + jnp.exp(params['log_s']) * nodes

  def normal(x, mean, scale):
    return -0.5 * ((x - mean) / scale) ** 2 - jnp.log(scale)

  log_w = normal(X, params['w'] * z, Linear.sigma) + normal(z, 0.0, 1.0)
  log_w -= normal(z, params['a'] * X, jnp.exp(params['log_s']))
  if num_samples == 1:
    return weights @ log_w
  pairs = jnp.logaddexp(log_w[:, None], log_w) - jnp.log(2)
  return weights @ pairs @ weights


def exact_gradient(num_samples):
  return jax.grad(exact_bound)(PARAMS, num_samples)


def estimates(objective, num_batches=200, size=200):
  """Gradients of the bound by each of many batches."""
  images = jnp.full((size, 1, 1, 1), X)

  def gradient(key):
    keys = jax.random.split(key, (2, size))
    batch = test_objectives.make_batch(
      images, keys=keys[0], noise_keys=keys[1], train=True
    )

    def bound(params):
      apply = nn.apply(objective.__call__, Linear())
      return -apply({'params': params}, batch)['loss'].mean()

    return jax.grad(bound)(PARAMS)

  keys = jax.random.split(jax.random.key(5), num_batches)
  return jax.jit(lambda: lax.map(gradient, keys))()


ONE, TWO = exact_gradient(1), exact_gradient(2)
HALF = jax.tree.map(lambda a, b: (a + b) / 2, ONE, TWO)


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    ({'num_samples': 2}, TWO),
    ({'num_samples': 2, 'gradient': 'dreg'}, TWO),
    ({'num_samples': 1, 'num_bounds': 2}, ONE),
    ({'num_samples': 2, 'num_bounds': 2, 'gradient': 'dreg'}, TWO),
    # The encoder has the gradient of L_1, the decoder that of L_2.
    (
      {'num_samples': 1, 'num_bounds': 2, 'gradient': 'piwae'},
      {'w': TWO['w'], 'a': ONE['a'], 'log_s': ONE['log_s']},
    ),
    ({'num_samples': 2, 'elbo_weight': 0.5}, HALF),
  ],
  ids=str,
)
def test_gradients_of_bounds_are_the_exact_ones_in_the_mean(settings, expected):
  found = estimates(iwae.Objective(**settings))
  for name, values in found.items():
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - expected[name]) < 4 * error, name
  # L_1 and L_2 differ by more than the errors.
  assert abs(ONE['a'] - TWO['a']) > 8 * found['a'].std() / np.sqrt(200)


def test_doubly_reparameterised_gradient_has_less_variance():
  plain, dreg = (
    estimates(iwae.Objective(num_samples=16, gradient=gradient))
    for gradient in ('plain', 'dreg')
  )
  for name in ('a', 'log_s'):
    assert dreg[name].var() < 0.5 * plain[name].var()
  # The decoder's is the same estimate.
  np.testing.assert_allclose(dreg['w'], plain['w'], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('sampling', ['weighted', 'stratified'])
def test_total_correlation_of_correlated_gaussians(sampling):
  count, correlation, s = 3000, 0.8, 0.5
  covariance = np.array([[1, correlation], [correlation, 1]])
  means = GENERATOR.multivariate_normal([0, 0], covariance, count)
  z = means + s * GENERATOR.normal(size=(count, 2))
  posterior = distributions.Normal(
    np.float32(means), np.full((count, 2), 2 * np.log(s), np.float32)
  )
  batch = make_batch(count, num_train_examples=count)
  estimate = total_correlation.total_correlation(
    np.float32(z), posterior, batch, 1.0, sampling
  )
  variance = 1 + s**2
  expected = -0.5 * np.log(1 - (correlation / variance) ** 2)
  value = float(estimate.mean())
  if sampling == 'weighted':
    # Each of the three densities lacks the batch's size as a factor.
    value -= np.log(count)
  assert value == pytest.approx(expected, abs=0.05)


def test_total_correlation_leaves_padding_of_a_batch_out():
  posterior = distributions.Normal(
    *(np.float32(GENERATOR.normal(size=(6, 2))) for _ in range(2))
  )
  z = np.float32(GENERATOR.normal(size=(6, 2)))
  mask = np.arange(6) < 4
  for sampling in ('weighted', 'stratified'):
    padded = total_correlation.total_correlation(
      z, posterior, make_batch(6, mask=mask), 1.0, sampling
    )
    cut = jax.tree.map(lambda a: a[:4], posterior)
    alone = total_correlation.total_correlation(
      z[:4], cut, make_batch(4), 1.0, sampling
    )
    np.testing.assert_allclose(padded[:4], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shift', [0.0, 0.7])
def test_mmd_of_gaussians_is_unbiased(shift):
  size, dims = 20, 3
  mean = np.array([shift, 0, -shift])
  values = []
  for seed in range(300):
    ours = GENERATOR.normal(size=(size, dims))
    theirs = GENERATOR.normal(size=(size, dims)) + mean
    batch = make_batch(size, seed)
    terms = mmd.mmd(batch, jnp.array(ours), jnp.array(theirs), dims, 'gaussian')
    values.append(float(terms.mean()))
  # E exp(-d²/2D) of two draws of N(0, I), and of one that is shifted.
  same = (1 + 2 / dims) ** (-dims / 2)
  across = same * np.exp(-np.square(mean).sum() / (2 * (dims + 2)))
  error = np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(values) - 2 * (same - across)) < 4 * error


def test_discriminator_estimates_the_density_ratio():
  correlation, size = 0.7, 500
  covariance = np.array([[1, correlation], [correlation, 1]])
  network = factor.Discriminator((32, 32), jnp.float32)
  params = network.init(jax.random.key(0), jnp.zeros((1, 2)))
  optimizer = optax.adam(0.01)

  @jax.jit
  def step(params, state, z, batch):
    def loss(params):
      permuted = factor.permuted(batch, z)
      ours, theirs = network.apply(params, z), network.apply(params, permuted)
      return (nn.softplus(-ours) + nn.softplus(theirs)).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for seed in range(300):
    z = GENERATOR.multivariate_normal([0, 0], covariance, size)
    params, state = step(params, state, jnp.array(z), make_batch(size, seed))
  z = GENERATOR.multivariate_normal([0, 0], covariance, 5000)
  ratio = network.apply(params, jnp.array(z)).mean()
  assert ratio == pytest.approx(-0.5 * np.log(1 - correlation**2), abs=0.06)


def test_permutation_keeps_each_dimension_and_breaks_their_ties():
  z = np.stack([np.arange(50)] * 3, axis=1).astype(np.float32)
  permuted = np.asarray(factor.permuted(make_batch(50), z))
  np.testing.assert_array_equal(np.sort(permuted, axis=0), z)
  assert np.all(np.abs(np.corrcoef(permuted.T) - np.eye(3)) < 0.5)


@pytest.mark.parametrize('of', ['mean', 'z'])
def test_dip_penalises_the_covariance(of):
  model = test_objectives.make_model()
  objective = dip.Objective(1.0, covariance_of=of)
  variables, found = test_objectives.evaluate(objective, model)
  images = test_objectives.IMAGES
  posterior = test_objectives.apply(model, variables, images, 'encode')
  covariance = np.cov(posterior.mean.T, bias=True)
  if of == 'z':
    covariance += np.diag(np.exp(posterior.logvar).mean(axis=0))
  off = covariance - np.diag(np.diag(covariance))
  np.testing.assert_allclose(
    found['off_diagonal'], np.square(off).sum(), rtol=1e-4
  )
  np.testing.assert_allclose(
    found['diagonal'], np.square(np.diag(covariance) - 1).sum(), rtol=1e-4
  )


def test_penalty_on_the_decoders_gradient_is_that_of_its_jacobian():
  model = test_objectives.make_model(hidden_channels=())
  objective = rae.Objective(regulariser='gradient')
  images = np.repeat(test_objectives.IMAGES[:1], 4000, axis=0)
  variables = model.init(jax.random.key(0), images[:1])
  keys = jax.random.split(jax.random.key(3), (2, 4000))
  batch = test_objectives.make_batch(images, keys=keys[0], noise_keys=keys[1])
  found = test_objectives.call(objective, model, variables, batch)
  z = np.zeros((1, 3), np.float32)
  jacobian = jax.jacfwd(
    lambda z: model.apply(variables, z, method='decode').mean
  )(z)
  expected = np.square(jacobian).sum()
  error = found['gradient'].std() / np.sqrt(4000)
  assert abs(found['gradient'].mean() - expected) < 4 * error
