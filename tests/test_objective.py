from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from scipy import stats
from vae.model import VAE

from vae import objective as objectives

MEAN = np.array([[0.3, -1.2, 0.0], [2.0, 0.1, -0.4]], np.float32)
LOGVAR = np.array([[0.5, -2.0, 0.0], [-0.1, 1.0, -6.0]], np.float32)


def test_kl_is_the_integral():
  for mean, logvar in zip(MEAN.ravel(), LOGVAR.ravel(), strict=True):
    q = stats.norm(mean, np.exp(logvar / 2))
    expected, _ = integrate.quad(
      lambda z, q=q: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)),
      *(q.mean() - 12 * q.std(), q.mean() + 12 * q.std()),
    )
    actual = objectives.kl_to_standard_normal(mean[None], logvar[None])
    assert actual == pytest.approx(expected, abs=1e-5)


def test_kl_is_its_monte_carlo_estimate():
  epsilon = jax.random.normal(jax.random.key(0), (200_000, *MEAN.shape))
  z = objectives.reparameterize(MEAN, LOGVAR, epsilon)
  ratio = stats.norm.logpdf(z, MEAN, np.exp(LOGVAR / 2)) - stats.norm.logpdf(z)
  ratio = ratio.sum(axis=-1)
  error = ratio.std(axis=0) / len(ratio) ** 0.5
  actual = objectives.kl_to_standard_normal(MEAN, LOGVAR)
  assert np.all(np.abs(actual - ratio.mean(axis=0)) < 4 * error)


def test_kl_keeps_its_digits_close_to_the_prior():
  logvar = jnp.array([1e-4])
  # ½ (e^t - 1 - t) = t²/4 + t³/12 + …
  actual = objectives.kl_to_standard_normal(jnp.zeros(1), logvar)
  assert actual == pytest.approx(1e-8 / 4, rel=0.01)


def test_reparameterization_has_the_posteriors_moments():
  epsilon = jax.random.normal(jax.random.key(1), (200_000, *MEAN.shape))
  z = np.asarray(objectives.reparameterize(MEAN, LOGVAR, epsilon))
  std = np.exp(LOGVAR / 2)
  np.testing.assert_allclose(z.mean(axis=0), MEAN, atol=0.02)
  np.testing.assert_allclose(z.std(axis=0), std, rtol=0.01)


def evaluate(objective, epsilon, model=None):
  model = model or VAE((8, 8, 3), 3, (4,))
  x = np.random.default_rng(0).uniform(size=(5, 8, 8, 3)).astype(np.float32)
  variables = model.init(jax.random.key(0), x)
  terms = nn.apply(objectives.terms, model)(
    variables, objective, x, x, epsilon, train=False
  )
  return x, model, variables, terms


def test_terms_are_the_elbo_and_its_parts():
  epsilon = jax.random.normal(jax.random.key(2), (4, 5, 3))
  model = VAE((8, 8, 3), 3, (4,), sigma=0.3)
  x, model, variables, terms = evaluate(
    objectives.Objective(2.5, num_samples=4), epsilon, model
  )
  mean, logvar = model.apply(variables, x, method='encode')
  kl = 0.5 * np.sum(mean**2 + np.exp(logvar) - 1 - logvar, axis=-1)
  distortions, squares = [], []
  for e in epsilon:
    z = mean + np.exp(logvar / 2) * e
    decoded = model.apply(variables, z, method='decode')
    log_prob = stats.norm.logpdf(x, decoded, 0.3).sum(axis=(1, 2, 3))
    distortions.append(-log_prob)
    squares.append(np.mean((x - decoded) ** 2, axis=(1, 2, 3)))
  distortion = np.mean(distortions, axis=0)
  expected = {
    'loss': distortion + 2.5 * kl,
    'elbo': -(distortion + kl),
    'distortion': distortion,
    'kl': kl,
    'mse': np.mean(squares, axis=0),
  }
  assert terms.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-4, err_msg=name)


def test_articles_loss_in_these_units():
  epsilon = jax.random.normal(jax.random.key(2), (1, 5, 3))
  dimensions = 8 * 8 * 3
  beta = 0.00025 * dimensions / 2
  *_, terms = evaluate(objectives.Objective(beta), epsilon)
  article = terms['mse'] + 0.00025 * terms['kl']
  constant = dimensions / 2 * np.log(2 * np.pi)
  np.testing.assert_allclose(
    terms['loss'], dimensions / 2 * article + constant, rtol=1e-5
  )


def test_without_sampling_it_is_the_autoencoder():
  objective = objectives.Objective(0.0, sample_posterior=False)
  x, model, variables, terms = evaluate(objective, None)
  expected = np.mean((x - model.apply(variables, x)) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(terms['mse'], expected, rtol=1e-5)
  np.testing.assert_allclose(terms['loss'], terms['distortion'])


def test_learned_sigma_is_among_the_terms():
  model = VAE((8, 8, 3), 3, (4,), sigma=0.3, learn_sigma=True)
  objective = objectives.Objective(1.0, sample_posterior=False)
  *_, terms = evaluate(objective, None, model)
  np.testing.assert_allclose(terms['sigma'], np.full(5, 0.3), rtol=1e-6)
