"""A model that sees the class of each image."""

import types

from absl import flags
from absl.testing import flagsaver
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from evaluation import measure
import generate
import input_pipeline
from runs import schema
from tests.conftest import make_small_config, Rows
import train
import vae
from vae import conditioning, numerics, objectives, splits
from vae.errors import UserError
from vae.loading import TrainedVAE
from vae.models import mlp
from vae.objectives import elbo

SIGMA, CLASSES, COUNT, PIXELS = 0.1, 3, 41, 16


def make_linear():
  """A linear model of p(x|z, y) in a measurement; log p(x|y) of its images.

  p(x|y) = N(b + v_y, WᵀW + σ²I), and the posterior is the exact one but for
  its correlations; the columns of W are orthogonal, so that there are none.
  """
  generator = np.random.default_rng(0)
  orthogonal = np.linalg.qr(generator.normal(size=(PIXELS, 2)))[0]
  weights = 0.2 * orthogonal.T
  offset = np.full(PIXELS, 0.5)
  of_class = 0.1 * generator.normal(size=(CLASSES, PIXELS))
  labels = generator.integers(0, CLASSES, COUNT).astype(np.int32)
  x = offset + of_class[labels] + generator.normal(size=(COUNT, 2)) @ weights
  x += SIGMA * generator.normal(size=x.shape)
  pixels = np.clip(np.round(255 * x), 0, 255).astype(np.uint8)
  precision = 0.2**2 / SIGMA**2 + 1
  encoder = weights.T / SIGMA**2 / precision
  # The image and its embedding take turns; the mean is linear in x - v_y.
  kernel = np.stack([encoder, -encoder], axis=1).reshape(2 * PIXELS, 2)
  zeros = np.zeros((2 * PIXELS, 2))
  params = {
    'label_embedding': {'embedding': of_class},
    'encoder': {
      'mean': {'kernel': kernel, 'bias': -offset @ encoder},
      'logvar': {'kernel': zeros, 'bias': np.full(2, -np.log(precision))},
    },
    'decoder': {
      'image': {'kernel': np.concatenate([of_class, weights]), 'bias': offset}
    },
  }
  params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
  model = mlp.Model(
    (4, 4, 1), latent_dim=2, hidden_sizes=(), sigma=SIGMA, num_classes=CLASSES
  )
  config = types.SimpleNamespace(
    objective={}, data=types.SimpleNamespace(label='', get=lambda key: None)
  )
  trained = TrainedVAE(config, model, {'params': params}, step=0)
  split = splits.ArraySplit(
    pixels.reshape(COUNT, 4, 4, 1), splits.Labels(('kind',), labels[:, None])
  )
  data = splits.DataSet(split, split, split)
  covariance = weights.T @ weights + SIGMA**2 * np.eye(PIXELS)
  exact = [
    stats.multivariate_normal(offset + of_class[y], covariance).logpdf(one)
    for y, one in zip(labels, pixels / 255, strict=True)
  ]
  return trained, data, np.array(exact), labels


@pytest.mark.parametrize('batch_size', [7, 64])
def test_bounds_are_of_the_conditional_density(batch_size):
  trained, data, exact, _ = make_linear()
  settings = measure.Settings(('bounds',), 3, batch_size)
  metrics = measure.measure(trained, data, 'test', settings).metrics
  # Every draw of the exact posterior has the same weight.
  assert metrics['iw_bound'].value == pytest.approx(exact.mean(), abs=1e-3)


def test_library_takes_the_class_of_each_image():
  trained, data, _, labels = make_linear()
  images = data.test.images
  reconstructions = trained.reconstruct(images, labels=labels)
  assert np.square(reconstructions - images / 255).mean() < 1.1 * SIGMA**2
  others = trained.reconstruct(images, labels=(labels + 1) % CLASSES)
  assert np.abs(others - reconstructions).max() > 0.05
  in_turn = trained.sample(7, seed=1)
  given = trained.sample(7, seed=1, labels=[0, 1, 2, 0, 1, 2, 0])
  np.testing.assert_array_equal(in_turn, given)
  for call, message in (
    (lambda: trained.encode(images), 'give labels'),
    (lambda: trained.encode(images, labels[:3]), r'int32 \[3\]'),
    (lambda: trained.encode(images, labels + 0.0), 'float64'),
    (lambda: trained.encode(images, labels + 1), 'from 1 to 3'),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def test_a_label_of_no_weight_leaves_the_loss():
  plain = mlp.Model((4, 4, 1), latent_dim=2, hidden_sizes=(5,))
  conditional = plain.clone(num_classes=CLASSES)
  images = jax.random.uniform(jax.random.key(0), (6, 4, 4, 1))
  variables = conditional.init(jax.random.key(1), images)
  params = jax.tree.map(np.array, variables['params'])
  params['label_embedding']['embedding'][:] = 0
  first_of_encoder, first_of_decoder = (
    params[part]['Dense_0'] for part in ('encoder', 'decoder')
  )
  first_of_decoder['kernel'][:CLASSES] = 0
  own = jax.tree.map(np.copy, {k: params[k] for k in ('encoder', 'decoder')})
  own['encoder']['Dense_0']['kernel'] = first_of_encoder['kernel'][::2]
  own['decoder']['Dense_0']['kernel'] = first_of_decoder['kernel'][CLASSES:]
  keys = numerics.example_keys(jax.random.key(2), jnp.arange(6))
  batch = objectives.Batch(
    *(images, jnp.ones(6, bool), keys, keys, 0.0),
    train=True,
    num_train_examples=6,
    axis_name=None,
  )

  def loss(model, variables):
    return model.apply(variables, batch, method=elbo.Objective())['loss']

  given = conditioning.given({'params': params}, jnp.arange(6) % CLASSES)
  np.testing.assert_allclose(
    loss(conditional, given), loss(plain, {'params': own}), rtol=1e-6
  )


@pytest.fixture(scope='module')
def conditional_run(celeba_dir, tmp_path_factory):
  """A run on faces that smile or not."""
  config = make_small_config(celeba_dir)
  config.model.num_classes, config.data.label = 2, 'Smiling'
  schema.validate(config)
  workdir = tmp_path_factory.mktemp('conditional')
  data = input_pipeline.load(config)
  train.train_and_evaluate(config, workdir, data, Rows())
  return workdir, data


def test_a_run_learns_samples_and_is_measured(conditional_run, tmp_path):
  workdir, data = conditional_run
  assert (workdir / 'samples' / 'epoch_0003.png').exists()
  trained = vae.load(workdir)
  smiles = np.array([0, 1])
  images = trained.decode(np.zeros((2, 3)), smiles)
  assert np.abs(images[0] - images[1]).max() > 1e-3
  settings = measure.Settings(('bounds', 'posterior', 'labels'), 4)
  results = measure.measure(trained, data, 'validation', settings)
  assert np.isfinite(results.metrics['elbo'].value)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['generate'])
  for command in ('sample', 'reconstruct', 'interpolate', 'traverse'):
    for of_class in (None, 1):
      folder = tmp_path / f'{command}_{of_class}'
      settings = {'class': of_class, 'output': str(folder)}
      with flagsaver.flagsaver(
        workdir=str(workdir), split='validation', **settings
      ):
        generate.main(command)
      assert (folder / 'grid.png').exists()
  with (
    pytest.raises(UserError, match='2 classes'),
    flagsaver.flagsaver(
      workdir=str(workdir), output=str(tmp_path / 'no'), **{'class': 2}
    ),
  ):
    generate.main('sample')


@pytest.mark.parametrize(
  ('num_classes', 'label', 'message'),
  [
    (2, 'Happy', "label is 'Happy'.*Bald, Eyeglasses"),
    (1, 'Smiling', 'num_classes is 1; the classes of Smiling go from 0 to 1'),
  ],
)
def test_labels_that_are_missing(
  celeba_dir, tmp_path, num_classes, label, message
):
  config = make_small_config(celeba_dir)
  config.model.num_classes, config.data.label = num_classes, label
  data = input_pipeline.load(config)
  with pytest.raises(UserError, match=message):
    train.train_and_evaluate(config, tmp_path, data, Rows())


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'data.label': 'Smiling'}, 'config.model.num_classes is 0'),
    (
      {'model.num_classes': 2, 'model.latent_prior': 'vamp'},
      'pseudo-inputs have no labels',
    ),
  ],
)
def test_configs_that_do_not_go_together(settings, message):
  config = make_small_config('')
  config.update_from_flattened_dict(settings)
  with pytest.raises(UserError, match=message):
    schema.validate(config)
