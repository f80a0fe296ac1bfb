"""A model that sees the class of each image."""

from absl import flags
from absl.testing import flagsaver
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image
import pytest
from scipy import stats

from evaluation import measure
import generate
import input_pipeline
from runs import schema, workdirs
from sweeps import worker
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
  config = ml_collections.ConfigDict(
    {'objective': {}, 'data': {}, 'model': {'num_classes': CLASSES}}
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
    (lambda: trained.decode(np.zeros((2, 2))), 'give labels'),
    (lambda: trained.encode(images, labels[:3]), r'int32 \[3\]'),
    (lambda: trained.encode(images, labels + 0.0), 'float64'),
    (lambda: trained.encode(images, labels + 1), 'from 1 to 3'),
  ):
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.slow
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


def test_a_run_learns_what_the_class_says(tmp_path):
  """Dark and bright images, by their class alone."""
  labels = np.random.default_rng(0).integers(0, 2, 40)
  images = np.where(labels, 200, 50).astype(np.uint8)[:, None, None, None]
  split = splits.ArraySplit(
    np.broadcast_to(images, (40, 16, 16, 3)).copy(),
    splits.Labels(('kind',), labels[:, None]),
  )
  config = make_small_config('')
  config.model.num_classes, config.optimizer.learning_rate = 2, 0.01
  config.train.num_epochs, config.eval.every_epochs = 40, 40
  schema.complete(config)
  data = splits.DataSet(split, split, split)
  train.train_and_evaluate(config, tmp_path, data, Rows())
  z = np.zeros((2, config.model.latent_dim))
  dark, bright = vae.load(tmp_path).decode(z, [0, 1]).mean(axis=(1, 2, 3))
  assert dark < 0.35 and bright > 0.65


@pytest.fixture(scope='module')
def conditional_run(celeba_dir, tmp_path_factory):
  """A run on faces that smile or not."""
  config = make_small_config(celeba_dir)
  config.model.num_classes, config.data.label = 2, 'Smiling'
  schema.validate(config)
  workdir = tmp_path_factory.mktemp('conditional')
  data = input_pipeline.load(config)
  train.train_and_evaluate(config, workdir, data, Rows())
  return config, workdir, data


@pytest.fixture
def make(conditional_run, tmp_path):
  """Runs a command of `generate.py` into a folder of its own."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['generate'])

  def make(command, workdir=conditional_run[1], **settings):
    folder = tmp_path / f'{command}_{settings.get("class")}'
    with flagsaver.flagsaver(
      workdir=str(workdir), output=str(folder), split='validation', **settings
    ):
      generate.main(command)
    return folder

  return make


@pytest.mark.slow
def test_a_run_is_measured_and_swept(conditional_run, inception_file):
  config, workdir, data = conditional_run
  assert (workdir / 'samples' / 'epoch_0003.png').exists()
  settings = measure.Settings(
    ('bounds', 'posterior', 'labels', 'fid'),
    4,
    inception_weights=str(inception_file),
  )
  results = measure.measure(vae.load(workdir), data, 'validation', settings)
  for name in ('elbo', 'iw_bound', 'fid_samples', 'fid_reconstructions'):
    assert np.isfinite(results.metrics[name].value)
  row, _ = worker.measure_run(
    *(config, epath.Path(workdir), 'validation', measure.Settings(())),
    latent_dim=5,
  )
  assert row['rate'] == pytest.approx(results.metrics['rate'].value, rel=1e-4)


@pytest.mark.parametrize(
  'command', ['sample', 'reconstruct', 'interpolate', 'traverse']
)
@pytest.mark.parametrize('of_class', [None, 1])
def test_pictures_of_a_class(make, command, of_class):
  assert (make(command, **{'class': of_class}) / 'grid.png').exists()


def test_classes_that_cannot_be(make, trained_run, tmp_path):
  with pytest.raises(UserError, match='--class=2: the model has 2 classes'):
    make('sample', **{'class': 2})
  with pytest.raises(UserError, match='--class=0: the model has 0 classes'):
    make('sample', workdir=trained_run, **{'class': 0})
  Image.new('RGB', (16, 16)).save(tmp_path / 'mine.png')
  with pytest.raises(UserError, match='name one by --class'):
    make('reconstruct', images=[str(tmp_path / 'mine.png')])


def test_other_classes_are_other_data(conditional_run):
  config, workdir, data = conditional_run
  identity = conditioning.identity(config, data)
  assert identity['classes'] == 'Smiling 0, Smiling 1'
  config = config.copy_and_resolve_references()
  config.data.label = 'Eyeglasses'
  changed = conditioning.identity(config, data)
  assert changed['train_labels'] != identity['train_labels']
  with pytest.raises(UserError, match='train_labels was'):
    workdirs.check_data(epath.Path(workdir), data.identity() | changed)


@pytest.mark.slow
def test_second_stage_of_a_run(conditional_run, tmp_path):
  config, workdir, data = conditional_run
  config = config.copy_and_resolve_references()
  config.objective = {'name': 'prior_only'}
  config.model.latent_prior, config.init_from = 'two_stage', str(workdir)
  config.train.num_epochs = 1
  schema.validate(config)
  train.train_and_evaluate(config, tmp_path, data, Rows())
  config.train.num_epochs = 2
  train.train_and_evaluate(config, tmp_path, data, Rows())
  trained, first = vae.load(tmp_path), vae.load(workdir)
  z = first.sample_latents(4)
  np.testing.assert_array_equal(
    trained.decode(z, [0, 1, 0, 1]), first.decode(z, [0, 1, 0, 1])
  )
  assert not np.allclose(trained.sample_latents(4), z)
  settings = measure.Settings(('bounds', 'posterior'), 4)
  results = measure.measure(trained, data, 'validation', settings)
  assert 'at most' in results.metrics['rate'].about
  assert np.isfinite(results.metrics['iw_bound'].value)
  config.model.latent_dim = 4
  with pytest.raises(UserError, match='latent_dim was 3 and is now 4'):
    train.train_and_evaluate(config, tmp_path / 'other', data, Rows())


@pytest.mark.parametrize(
  ('num_classes', 'label', 'message'),
  [
    (2, 'Happy', "label is 'Happy'.*Bald, Eyeglasses"),
    (2, '', "label is ''.*one of the labels"),
    (1, 'Smiling', 'num_classes is 1; Smiling has 2 classes'),
  ],
)
def test_labels_that_are_missing(celeba_dir, num_classes, label, message):
  config = make_small_config(celeba_dir)
  config.model.num_classes, config.data.label = num_classes, label
  with pytest.raises(UserError, match=message):
    input_pipeline.load(config)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'data.label': 'Smiling'}, 'config.model.num_classes is 0'),
    (
      {'model.num_classes': 2, 'model.latent_prior': 'vamp'},
      'pseudo-inputs have no labels',
    ),
    ({'model.latent_prior': 'two_stage'}, 'needs config.objective.name=prior'),
  ],
)
def test_configs_that_do_not_go_together(settings, message):
  config = make_small_config('')
  config.update_from_flattened_dict(settings)
  with pytest.raises(UserError, match=message):
    schema.validate(config)
