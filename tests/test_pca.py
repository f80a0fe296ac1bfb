"""Initialisation by PCA, against scikit-learn's PCA and the linear optimum."""

from flax import linen as nn
import jax
import numpy as np
import pytest
from sklearn import decomposition

from runs import schema
from tests.conftest import make_data, make_small_config
from vae import steps
from vae.checkpoints import Checkpoints
from vae.errors import UserError
from vae.models import conv
from vae.population import Population
from vae.trainer import Trainer

SIGMA, BETA = 0.2, 1.5
NOISE = BETA * SIGMA**2


def make_images(count, size, channels):
  """Smooth images with a mean that is not flat, within [0, 1]."""
  generator = np.random.default_rng(0)
  grid = np.linspace(0, 1, size)
  waves = np.cos(np.pi * np.arange(size // 2)[:, None] * grid)
  weights = generator.normal(size=(count, channels, *[size // 2] * 2))
  weights /= 1 + np.add.outer(*[np.arange(size // 2)] * 2)
  images = np.einsum('nckl,ky,lx->nyxc', weights, waves, waves)
  images += 0.02 * generator.normal(size=images.shape) + grid[:, None]
  return ((images - images.min()) / np.ptp(images)).astype(np.float32)


def initialise(images, **settings):
  """A model with its first variables for these images."""
  model = conv.Model(
    images.shape[1:], sigma=SIGMA, initialisation='pca', **settings
  )
  variables = model.init(jax.random.key(0), images[:1])
  variables, count = model.initial_variables(variables, images, BETA)
  return model, variables, count


def linear_vae(images, latent_dim):
  """Means [n, count], variances [count] and the reconstructions of means."""
  pca = decomposition.PCA(latent_dim, svd_solver='full')
  scores = pca.fit_transform(images.reshape(len(images), -1).astype(float))
  # scikit-learn divides by n - 1.
  variances = pca.explained_variance_ * (len(images) - 1) / len(images)
  kept = variances > NOISE
  variances, scores = variances[kept], scores[:, kept]
  means = scores * np.sqrt(variances - NOISE) / variances
  outputs = (means * np.sqrt(variances - NOISE)) @ pca.components_[kept]
  return means, NOISE / variances, (outputs + pca.mean_).reshape(images.shape)


@pytest.mark.parametrize(
  ('channels', 'hidden_channels', 'latent_dim', 'activation'),
  [
    # Pairs for all of the 4, 16 and 64 numbers of a block.
    pytest.param(1, (8, 32, 128), 40, 'leaky_relu', marks=pytest.mark.slow),
    (1, (10, 35, 129), 3, 'relu'),
    pytest.param(3, (24, 96), 40, 'leaky_relu', marks=pytest.mark.slow),
    (3, (), 40, 'leaky_relu'),
  ],
)
def test_network_is_the_linear_vae(
  channels, hidden_channels, latent_dim, activation
):
  images = make_images(96, 16, channels)
  model, variables, count = initialise(
    images,
    hidden_channels=hidden_channels,
    # Room for all numbers of a block on the way back too.
    decoder_channels=(*hidden_channels[-2::-1], 2 * channels)[
      : len(hidden_channels)
    ],
    latent_dim=latent_dim,
    activation=activation,
  )
  means, variances, outputs = linear_vae(images, latent_dim)
  assert count == len(variances) > 2
  for train in (False, True):  # The batch is all that the statistics are of.
    posterior, _ = nn.apply(
      lambda model, train=train: model.encode(images, train),
      model,
      mutable='batch_stats',
    )(variables)
    found = np.array(posterior.mean)
    # A principal component has no sign.
    signs = np.sign((found[:, :count] * means).sum(0))
    np.testing.assert_allclose(found[:, :count], signs * means, atol=2e-3)
    np.testing.assert_allclose(found[:, count:], 0, atol=1e-6)
    found = np.exp(posterior.logvar)
    np.testing.assert_allclose(found[:, count:], 1, rtol=1e-6)
    np.testing.assert_allclose(
      found[:, :count], np.tile(variances, (len(images), 1)), rtol=1e-3
    )
  found = nn.apply(lambda model: model.decode(posterior.mean).mean, model)(
    variables
  )
  np.testing.assert_allclose(found, outputs, atol=1e-3)


@pytest.mark.slow
def test_narrow_network_keeps_the_strongest_components():
  images = make_images(96, 16, 3)
  model, variables, _ = initialise(
    images, hidden_channels=(16, 32, 64), latent_dim=40
  )
  found = model.apply(variables, images).mean
  linear = linear_vae(images, 40)[-1]
  errors = [np.square(images - each).mean() for each in (found, linear)]
  assert errors[1] < errors[0] < 1.5 * errors[1] < 0.4 * images.var()


@pytest.mark.slow
def test_runs_begin_with_it():
  config = make_small_config('')
  config.model.initialisation = 'pca'
  config.model.hidden_channels = (8, 8)
  config.optimizer.average_decay = 0.9
  schema.validate(config)
  data = make_data()
  trainer = Trainer(config, data)
  (drawn,) = trainer.states(trainer.snapshot())
  trainer.restore([Checkpoints('/nowhere')])
  (state,) = trainer.states(trainer.snapshot())
  expected, _ = trainer._model.initial_variables(
    drawn.variables, data.train.images / np.float32(255), config.objective.beta
  )
  jax.tree.map(np.testing.assert_array_equal, state.params, expected['params'])
  jax.tree.map(np.testing.assert_array_equal, state.variables, expected)
  assert steps.AVERAGED in state.collections

  population = Population([config], data)
  population.restore([Checkpoints('/nowhere')])
  (member,) = population.states(population.snapshot())
  jax.tree.map(np.testing.assert_array_equal, member.variables, expected)


@pytest.mark.parametrize(
  ('settings', 'word'),
  [
    ({'likelihood': 'bernoulli'}, 'likelihood'),
    ({'upsampling': 'nearest'}, 'upsampling'),
    ({'spectral_norm': True}, 'spectral_norm'),
    ({'decoder_channels': (8, 5)}, 'at least 6'),
  ],
)
def test_what_it_needs_is_said(settings, word):
  config = make_small_config('')
  config.model.initialisation = 'pca'
  config.model.hidden_channels = (8, 8)
  config.model.update(settings)
  with pytest.raises(UserError, match=f'initialisation is pca.*{word}'):
    schema.validate(config)
