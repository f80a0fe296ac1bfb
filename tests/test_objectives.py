"""Objectives against closed forms, SciPy and other formulations."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vae import distributions, likelihoods, objectives
from vae.errors import UserError
from vae.models import conv, fsq
from vae.objectives import elbo, free_bits

SHAPE = (8, 8, 3)
IMAGES = np.random.default_rng(0).uniform(size=(5, *SHAPE)).astype(np.float32)


def make_model(**settings):
  settings = {'latent_dim': 3, 'hidden_channels': (4,), **settings}
  return conv.Model(SHAPE, **settings)


def make_batch(images=IMAGES, **changes):
  keys = jax.random.split(jax.random.key(2), (2, len(images)))
  batch = objectives.Batch(
    images=images,
    mask=np.ones(len(images), bool),
    keys=keys[0],
    noise_keys=keys[1],
    epoch=np.inf,
    train=False,
    num_train_examples=100,
    axis_name=None,
  )
  return batch.replace(**changes)


@functools.partial(jax.jit, static_argnums=1)
def call(objective, model, variables, batch):
  return nn.apply(objective.__call__, model)(variables, batch)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(model, variables, inputs, method='__call__'):
  return model.apply(variables, inputs, method=method)


def evaluate(objective, model=None, **changes):
  model = model or make_model()
  variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
  return variables, call(objective, model, variables, make_batch(**changes))


def test_metrics_are_the_elbo_and_its_parts():
  model = make_model(sigma=0.3, learn_sigma=True)
  variables, metrics = evaluate(elbo.Objective(2.5, num_samples=4), model)
  posterior = apply(model, variables, IMAGES, 'encode')
  mean, logvar = posterior.mean, posterior.logvar
  kl = 0.5 * np.sum(mean**2 + np.exp(logvar) - 1 - logvar, axis=-1)
  distortions, squares = [], []
  for z in posterior.sample(make_batch().keys, 4):
    decoded = apply(model, variables, z, 'decode').mean
    log_prob = stats.norm.logpdf(IMAGES, decoded, 0.3).sum(axis=(1, 2, 3))
    distortions.append(-log_prob)
    squares.append(np.mean((IMAGES - decoded) ** 2, axis=(1, 2, 3)))
  distortion = np.mean(distortions, axis=0)
  expected = {
    'loss': distortion + 2.5 * kl,
    'elbo': -(distortion + kl),
    'distortion': distortion,
    'kl': kl,
    'mse': np.mean(squares, axis=0),
    'sigma': np.full(5, 0.3),
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_articles_autoencoder_and_loss_in_these_units():
  model, half_d = make_model(), 8 * 8 * 3 / 2
  objective = elbo.Objective(0.00025 * half_d, sample_posterior=False)
  variables, metrics = evaluate(objective, model)
  decoded = apply(model, variables, IMAGES).mean
  mse = np.mean((IMAGES - decoded) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(metrics['mse'], mse, rtol=1e-5)
  article = mse + 0.00025 * metrics['kl']
  constant = half_d * np.log(2 * np.pi)
  np.testing.assert_allclose(
    metrics['loss'], half_d * article + constant, rtol=1e-5
  )


def test_elbo_of_codes_is_the_likelihood_less_the_log_of_their_number():
  model = fsq.Model(SHAPE, levels=(4, 3), channels=(4,), sigma=0.5)
  variables, metrics = evaluate(elbo.Objective(), model)
  decoded = apply(model, variables, IMAGES).mean
  log_prob = stats.norm.logpdf(IMAGES, decoded, 0.5).sum(axis=(1, 2, 3))
  # 4 × 4 positions of 12 codes each.
  np.testing.assert_allclose(
    metrics['elbo'], log_prob - 16 * np.log(12), rtol=1e-5
  )


class Given:
  """A model with a given posterior, whose decoder ignores z."""

  def __init__(self, mean, logvar):
    self._posterior = distributions.Normal(mean, logvar)

  def encode(self, images, train=False):
    return self._posterior

  def decode(self, z, train=False):
    return likelihoods.Gaussian(jnp.zeros((len(z), *IMAGES.shape)), 1.0)

  def prior(self):
    return distributions.StandardNormal((4,))

  def latent_mask(self):
    return 1.0


@pytest.mark.parametrize('per', ['dimension', 'image'])
def test_free_bits_cost_and_teach_nothing_below_the_floor(per):
  generator = np.random.default_rng(1)
  # Dimensions that carry from next to nothing to a lot.
  mean = generator.normal(size=(5, 4)) * [0.01, 0.5, 1.0, 2.0]
  mean[0] *= 0.01
  logvar = generator.normal(size=(5, 4)) * [0.01, 0.5, 1.0, 1.0]
  logvar[0] *= 0.01
  kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
  if per == 'dimension':
    mask, free_nats = np.array([1, 1, 1, 1, 0], bool), 0.3
    average = kl[mask].mean(axis=0)
    rates = np.full(5, np.maximum(free_nats, average).sum())
    # Of each posterior's part in the average, but for the padding's.
    weights = mask[:, None] * (average > free_nats) / mask.sum()
    assert 0 < (average > free_nats).sum() < 4
  else:
    mask, free_nats = np.ones(5, bool), 1.0
    rates = np.maximum(free_nats, kl.sum(axis=1))
    weights = (kl.sum(axis=1, keepdims=True) > free_nats) / 5
    assert 0 < (rates > free_nats).sum() < 5
  objective = free_bits.Objective(2.0, free_nats=free_nats, per=per)

  def loss(mean, logvar):
    metrics = objective(Given(mean, logvar), make_batch(mask=mask))
    return metrics['loss'].mean(), metrics

  gradients, metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(
    jnp.asarray(mean), jnp.asarray(logvar)
  )
  found = metrics['loss'] - metrics['distortion']
  np.testing.assert_allclose(found, 2 * rates, rtol=1e-4)
  # The logged KL and bound have no floor.
  np.testing.assert_allclose(metrics['kl'], kl.sum(axis=1), rtol=1e-4)
  expected = 2 * weights * mean, 2 * weights * (np.exp(logvar) - 1) / 2
  for actual, wanted in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(actual[wanted == 0], 0)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'kl': jnp.zeros(3)}, 'its loss is missing'),
    ({'loss': jnp.zeros(())}, r'loss of shape \[\]'),
    ({'loss': jnp.zeros(3), 'kl': jnp.zeros((1, 3))}, r'kl of shape \[1, 3\]'),
  ],
)
def test_values_of_an_objective_are_of_each_example(values, message):
  with pytest.raises(UserError, match=message):
    objectives.check_values(elbo.Objective(), values, 3)
  objectives.check_values(elbo.Objective(), {'loss': jnp.zeros(3)}, 3)
