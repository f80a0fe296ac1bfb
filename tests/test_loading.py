"""Trained models, read back from a workdir."""

import json
import shutil

import jax
import numpy as np
import pytest

from runs import progress, schema
from tests.conftest import make_data
import train
import vae
from vae import loading
from vae.checkpoints import Checkpoints
from vae.errors import UserError
from vae.trainer import Trainer


@pytest.fixture(scope='module')
def model(trained_run):
  return vae.load(trained_run)


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), np.uint8)


@pytest.fixture
def run(trained_run, tmp_path):
  """A function that changes settings of the model in a copy of the run."""

  def change(**settings):
    shutil.copytree(trained_run, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    changed = config['model'] | settings
    # None: as if the run were older than the setting.
    config['model'] = {k: v for k, v in changed.items() if v is not None}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    return tmp_path

  return change


def test_config_of_other_code_gets_one_line(run):
  for changes, match in (
    ({'prior': 'mixture'}, "not fit this.*'prior'"),
    ({'latent_dim': 7}, r'not fit its config: .*\[7, 128\]'),
  ):
    with pytest.raises(UserError, match=match) as caught:
      vae.load(run(**changes))
    assert '\n' not in str(caught.value)


def test_folder_without_a_readable_config_gets_one_line(tmp_path):
  with pytest.raises(UserError, match='holds no run'):
    vae.load(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UserError, match='cannot be read'):
    vae.load(tmp_path)


def test_config_that_is_older_than_a_setting_has_its_default(
  run, model, images
):
  old = vae.load(run(decoder_channels=None))
  np.testing.assert_array_equal(
    old.reconstruct(images), model.reconstruct(images)
  )


def test_any_checkpoint_can_be_loaded(trained_run, model):
  assert vae.load(trained_run, 'last').step == 15
  assert vae.load(str(trained_run), model.step).step == model.step
  with pytest.raises(UserError, match='no checkpoint 4; there are best, last'):
    vae.load(trained_run, 4)


def test_methods_are_the_models_whatever_the_number_of_rows(
  model, images, monkeypatch
):
  bound = model.model.bind(model.variables)
  posterior = bound.encode(images / np.float32(255))
  decoded = np.clip(bound.decode(posterior.mean).mean, 0, 1)
  precisions, encode = [], loading._encode
  before = encode._cache_size()

  def spy(*args):
    precisions.append(jax.config.jax_default_matmul_precision)
    return encode(*args)

  monkeypatch.setattr(loading, '_encode', spy)
  for count in (70, 64, 1, 0):
    found = model.encode(images[:count]), model.reconstruct(images[:count])
    expected = jax.tree.map(lambda a, n=count: a[:n], (posterior, decoded))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
    )
  # All in float32, and with one compiled program.
  assert found[0].mean.dtype == np.float32 and set(precisions) == {'highest'}
  assert encode._cache_size() <= before + 1
  same = model.encode(images / 255)
  np.testing.assert_allclose(same.mean, posterior.mean, atol=1e-5)


def test_samples_depend_on_the_seed_and_the_temperature(model):
  samples = model.sample(5, seed=3)
  assert samples.shape == (5, 16, 16, 3)
  np.testing.assert_array_equal(samples, model.sample(5, seed=3))
  assert not np.array_equal(samples, model.sample(5, seed=4))
  np.testing.assert_allclose(
    model.sample(5, temperature=0.0),
    np.tile(model.decode(np.zeros((1, 2))), (5, 1, 1, 1)),
    atol=1e-6,
  )


def test_drawn_reconstructions_scatter_as_the_posterior_does(
  model, images, monkeypatch
):
  # Through a decoder that is the identity, the draws themselves.
  monkeypatch.setattr(loading.TrainedVAE, 'decode', lambda self, z, labels: z)
  draws = model.reconstruct(np.tile(images[:1], (2000, 1, 1, 1)), seed=0)
  posterior = model.encode(images[:1])
  deviation = np.exp(0.5 * posterior.logvar[0])
  scaled = (draws - posterior.mean) / deviation
  np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=4 / 2000**0.5)
  np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=0.1)


@pytest.mark.parametrize(
  ('wrong', 'match'),
  [
    (np.zeros((16, 16, 3), np.uint8), r'\(16, 16, 3\); they must be \[n, 16, '),
    (np.zeros((2, 16, 16, 1), np.uint8), r'must be \[n, 16, 16, 3\]'),
    (np.full((1, 16, 16, 3), 255.0), 'from 255 to 255; .* in \\[0, 1\\]'),
    (np.full((1, 16, 16, 3), np.nan), 'in \\[0, 1\\]'),
    (np.zeros((1, 16, 16, 3), np.int64), 'int64; .* uint8 or floating'),
  ],
)
def test_arrays_that_are_no_images_are_refused(model, wrong, match):
  with pytest.raises(ValueError, match=match):
    model.encode(wrong)
  with pytest.raises(ValueError, match=r'\(3, 5\); it must be \[n, 2\]'):
    model.decode(np.zeros((3, 5)))


@pytest.mark.slow
def test_run_starts_from_what_fits_of_another(trained_run, tmp_path, capsys):
  config = loading.read_config(trained_run)
  config.model.latent_dim, config.init_from = 3, str(trained_run)
  config.optimizer.average_decay, config.train.num_epochs = 0.9, 1
  schema.validate(config)
  data = make_data()
  trainer = Trainer(config, data)
  drawn = jax.device_get(trainer.snapshot())
  trainer.restore([Checkpoints(tmp_path)])
  state, other = jax.device_get(trainer.snapshot()), vae.load(trained_run)
  (line,) = capsys.readouterr().out.splitlines()
  assert f'From step {other.step}' in line and 'Not used: ' in line
  assert 'Newly initialised: ' in line and 'params/encoder' in line
  same = np.testing.assert_array_equal
  own, theirs = state.params, other.variables['params']
  for params in (own, state.variables['params']):
    jax.tree.map(same, params['encoder']['Conv_0'], theirs['encoder']['Conv_0'])
  same(
    own['encoder']['mean']['kernel'], drawn.params['encoder']['mean']['kernel']
  )
  jax.tree.map(
    same,
    state.collections['batch_stats'],
    jax.device_get(other.variables['batch_stats']),
  )
  # A run that has a checkpoint of its own does not ask for the other again.
  train.train_and_evaluate(config, tmp_path / 'own', data, progress.Writer())
  config.init_from, config.train.num_epochs = '/nowhere', 2
  train.train_and_evaluate(config, tmp_path / 'own', data, progress.Writer())
  with pytest.raises(UserError, match='nowhere holds no run'):
    Trainer(config, data).restore([Checkpoints(tmp_path)])
