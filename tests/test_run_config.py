import ml_collections
from ml_collections import config_dict
import numpy as np
import pytest

from configs import autoencoder
from configs import celeba
from configs import default
from configs import denoising_autoencoder
from configs import faces
from runs import schema
from vae.errors import UserError


@pytest.mark.parametrize(
  'module', [default, celeba, faces, autoencoder, denoising_autoencoder]
)
def test_the_projects_configs_are_valid(module):
  schema.validate(module.get_config())


def test_every_key_has_a_rule_and_every_rule_a_key():
  keys = schema.flatten(default.get_config())
  assert schema.RULES.keys() == keys.keys()
  assert schema.FREE_KEYS <= keys.keys()


def test_key_without_a_rule_is_checked_by_its_type(monkeypatch):
  """As one that a researcher adds to configs/default.py."""
  config = default.get_config()
  config.model.prior = 'normal'
  config.optimizer.betas = (0.9, 0.999)
  config.optimizer.names = ()
  config.train.anneal_steps = 0
  config.train.note = None
  monkeypatch.setattr(default, 'get_config', config.copy_and_resolve_references)
  changed = default.get_config()
  changed.model.prior = 'mixture'
  changed.optimizer.betas = (0.5, 0.9)
  changed.optimizer.names = ('a', 'b')
  changed.train.note = 'for the article'
  for accepted in (config, changed):
    schema.validate(accepted)
  for key, value, said in (
    ('model.prior', 3, 'it must be a string'),
    ('optimizer.betas', 0.9, 'it must be a tuple'),
    ('train.anneal_steps', 0.5, 'it must be a whole number'),
  ):
    wrong = default.get_config()
    with wrong.ignore_type():
      wrong.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f'config.{key} is .*; {said}'):
      schema.validate(wrong)


def test_celeba_is_the_articles_schedule():
  config = celeba.get_config()
  pixels = config.data.image_size**2 * config.data.channels
  assert config.objective.beta == pytest.approx(0.00025 * pixels / 2)
  assert config.model.sigma == 1.0 and not config.model.learn_sigma
  assert (config.seed, config.train.num_epochs) == (1265, 100)
  assert config.train.batch_size == 64
  optimizer = config.optimizer
  assert (optimizer.learning_rate, optimizer.decay_per_epoch) == (0.005, 0.95)


@pytest.mark.parametrize(
  ('key', 'value', 'said'),
  [
    ('seed', -1, 'from 0 to'),
    ('objective.beta', -0.5, 'at least 0'),
    ('objective.beta', float('nan'), 'a finite number'),
    ('objective.beta', float('inf'), 'a finite number'),
    ('objective.beta', '1', 'a finite number'),
    ('model.latent_dim', 0, 'at least 1'),
    ('model.latent_dim', -3, 'at least 1'),
    ('model.latent_dim', 2.0, 'a whole number'),
    ('model.latent_dim', None, 'a whole number'),
    ('model.hidden_channels', (32, 0), 'at least 1 each'),
    ('model.hidden_channels', (32, 'x'), 'a tuple of whole numbers'),
    ('model.hidden_channels', 32, 'a tuple of whole numbers'),
    ('model.likelihood', 'poisson', 'one of gaussian, bernoulli'),
    ('model.dtype', 'float16', 'one of float32, bfloat16, float64'),
    ('model.dtype', 'float64', 'JAX_ENABLE_X64=1'),
    ('model.sigma', 0.0, 'at least 1e-06'),
    ('model.sigma', 1e-300, 'at least 1e-06'),
    ('model.latent_dim', 10**12, 'at most 2,147,483,647'),
    pytest.param(
      *('model.latent_dim', 10**5000, 'something of type int'), id='long int'
    ),
    ('model.latent_dim', {}, 'a whole number'),
    ('model', 3, 'a group of settings'),
    ('model.hidden_channels', (10**12,), 'at most 2,147,483,647'),
    ('model.hidden_channels', (1,) * 40, 'there may be at most 6'),
    ('model.decoder_channels', (32, 0), 'at least 1 each'),
    ('model.decoder_channels', (8.5,) * 5, 'a tuple of whole numbers'),
    ('model.decoder_channels', ((1,), 2, 3, 4, 5), 'a tuple of whole numbers'),
    ('model.decoder_channels', (True,) * 5, 'a tuple of whole numbers'),
    ('model.decoder_channels', (32,) * 4, 'it must have 5, or none'),
    ('objective.beta', 1e308, 'at most 1e+09'),
    ('optimizer.learning_rate', 1e-320, 'at least 1e-12'),
    ('optimizer.learning_rate', 1e300, 'at most 1000'),
    ('train.num_epochs', 10**30, 'at most 1,000,000'),
    ('data.image_size', 2**20, 'at most 65,535'),
    ('data.crop_size', -1, 'at least 0'),
    ('data.dir', 'a\0b', 'a folder'),
    ('data.dir', '\udcff', 'in UTF-8'),
    ('data.dir', 'bogus://x', 'local or of gs://'),
    pytest.param('data.source', 'x' * 10**6, 'one of celeba', id='long string'),
    ('data.source', np.array([['a'], ['b']]), 'a string'),
    ('data.source', 'imagenet', 'one of celeba, cartoon_faces, folder'),
    ('data.source', 'folder', 'data.dir is empty'),
    ('data.cache', 'disk', 'one of auto, none, host, device'),
    ('data.image_size', 72, 'a multiple of 32'),
    ('data.channels', 2, 'one of 1, 3'),
    ('train.batch_size', 0, 'at least 1'),
    ('train.flip', 1, 'True or False'),
    ('optimizer.decay_per_epoch', 1.5, 'at most 1'),
  ],
)
def test_wrong_values_are_named(key, value, said):
  config = default.get_config()
  with config.ignore_type():
    group, _, name = key.rpartition('.')
    (config[group] if group else config)[name] = value
  with pytest.raises(UserError) as caught:
    schema.validate(config)
  message = str(caught.value)
  assert f'config.{key}' in message and said in message
  assert '\n' not in message and len(message) < 300


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('model.sigma', 1e-3),
    ('model.latent_dim', 8192),
    ('objective.beta', 1e6),
    ('objective.beta', 0.0),
    ('objective.num_samples', 5000),
    ('data.image_size', 256),
    ('data.dir', 'gs://bucket/faces'),
    ('data.dir', 'Gesichter/α'),
    ('train.num_epochs', 10**5),
    ('train.steps_per_dispatch', 10**6),
    ('optimizer.learning_rate', 1e-6),
  ],
)
def test_what_research_may_ask_for_is_accepted(key, value):
  config = default.get_config()
  config.update_from_flattened_dict({key: value})
  schema.validate(config)


def test_references_are_read_or_named():
  config = default.get_config()
  config.model.latent_dim = config.train.get_ref('batch_size') * 2
  schema.validate(config)
  config = default.get_config()
  with config.ignore_type():
    config.seed = config_dict.required_placeholder(int)
  with pytest.raises(UserError, match='config.seed cannot be read .*required'):
    schema.validate(config)


def test_groups_and_keys_of_other_kinds_are_told():
  config = default.get_config()
  config.model.encoder = config
  with pytest.raises(UserError, match='config.model.encoder: there is no'):
    schema.validate(config)
  config = ml_collections.ConfigDict({'seed': 3, 1: 2})
  with pytest.raises(UserError, match='keys that are no names'):
    schema.validate(config)


def test_unknown_and_missing_keys_are_named():
  config = default.get_config()
  config.model.latent_dims = 3
  with pytest.raises(UserError, match='config.model.latent_dims: there is no'):
    schema.validate(config)
  config = default.get_config()
  del config.train['flip']
  with pytest.raises(UserError, match='config.train.flip: missing'):
    schema.validate(config)


@pytest.mark.parametrize(
  ('group', 'values', 'said'),
  [
    ('model', {'likelihood': 'bernoulli', 'learn_sigma': True}, 'has none'),
    ('objective', {'sample_posterior': False, 'num_samples': 5}, 'must be 1'),
  ],
)
def test_settings_that_would_do_nothing_are_refused(group, values, said):
  config = default.get_config()
  config[group].update(values)
  with pytest.raises(UserError, match=said):
    schema.validate(config)


def test_whole_numbers_are_numbers():
  config = default.get_config()
  with config.ignore_type():
    config.objective.beta = 4
  schema.validate(config)


def test_devices_must_divide_the_batch():
  config = default.get_config()
  config.train.batch_size = 20
  schema.check_devices(config, 4)
  with pytest.raises(UserError, match='batch_size is 20.*the 8 devices'):
    schema.check_devices(config, 8)
