import functools
import importlib
import pkgutil
import random

import jax
import pytest

import configs
from configs import celeba, default, faces
from runs import processes, schema
from vae import devices
from vae.errors import UserError


def changed(key, value, config=None):
  """A config with a setting of any type."""
  config = config or default.get_config()
  group, _, name = key.rpartition('.')
  with config.ignore_type():
    (config[group] if group else config)[name] = value
  return config


def project_configs():
  """Each config, and each of those that have an argument."""
  for module in pkgutil.walk_packages(configs.__path__, 'configs.'):
    found = importlib.import_module(module.name)
    if not module.ispkg:
      names = getattr(found, 'MEMBERS', {})
      yield pytest.param(found.get_config, id=module.name)
      for name in names:
        make = functools.partial(found.get_config, name)
        yield pytest.param(make, id=f'{module.name}:{name}')


@pytest.mark.parametrize('make', list(project_configs()))
def test_the_projects_configs_are_valid(make):
  schema.validate(make())


def test_every_rule_and_free_key_is_of_a_setting():
  config = default.get_config()
  schema.complete(config)
  assert schema.RULES.keys() | schema.FREE_KEYS <= schema.flatten(config).keys()


def test_celeba_is_the_articles_schedule():
  config = celeba.get_config()
  pixels = config.data.image_size**2 * config.data.channels
  assert config.objective.beta == pytest.approx(0.00025 * pixels / 2)
  assert config.model.sigma == 1.0 and not config.model.get('learn_sigma')
  assert (config.seed, config.train.num_epochs) == (1265, 100)
  assert config.train.batch_size == 64
  optimizer = config.optimizer
  assert (optimizer.learning_rate, optimizer.decay_per_epoch) == (0.005, 0.95)


@pytest.mark.parametrize(
  ('key', 'value', 'accepted'),
  [
    ('seed', -1, 'at least 0'),
    ('objective.beta', -0.5, 'at least 0'),
    ('objective.beta', float('nan'), 'a finite number'),
    ('objective.name', 'elbow', 'elbo'),
    ('model.latent_dim', 0, 'at least 1'),
    ('model.latent_dim', 2.0, 'a whole number'),
    ('model.latent_dim', True, 'a whole number'),
    ('model', 3, 'a ConfigDict'),
    ('model.hidden_channels', (32, 'x'), 'a tuple, each entry a whole number'),
    ('model.hidden_channels', (1,) * 7, 'multiples of 128'),
    ('model.decoder_channels', (32,) * 4, 'it must have 5'),
    ('model.likelihood', 'poisson', 'one of gaussian, gaussian_per_pixel, '),
    ('model.dtype', 'float64', 'JAX_ENABLE_X64=1'),
    ('optimizer.learning_rate', 1e300, 'at most 1,000'),
    ('train.flip', 1, 'True or False'),
    ('train.on_nonfinite', 'go', 'one of stop, skip'),
    ('data.source', 3, 'a string'),
    ('data.source', 'folder', 'config.data.dir is empty'),
  ],
)
def test_error_names_key_value_and_accepted_values(key, value, accepted):
  with pytest.raises(UserError) as caught:
    schema.validate(changed(key, value))
  message = str(caught.value)
  assert f'config.{key.split(".")[0]}' in message and accepted in message
  assert '\n' not in message and len(message) < 300


def test_settings_without_effect_are_refused():
  config = default.get_config()
  config.objective.update(sample_posterior=False, num_samples=5)
  with pytest.raises(UserError, match='config.objective.*must be 1'):
    schema.validate(config)


def test_values_of_research_are_accepted():
  config = changed('model.hidden_channels', [4, 8])
  changed('objective.beta', 0, config).objective.num_samples = 5000
  config.data.dir = 'Gesichter/α'
  schema.validate(config)
  assert config.model.hidden_channels == (4, 8)


def test_unknown_key_comes_with_the_closest_one():
  with pytest.raises(UserError, match='latent_dims: .*mean model.latent_dim?'):
    schema.validate(changed('model.latent_dims', 3))


def test_references_stay_references():
  config = default.get_config()
  config.eval.batch_size = config.train.get_ref('batch_size') * 2
  schema.validate(config)
  config.train.batch_size = 8
  assert config.eval.batch_size == 16


OWN_MODEL = """
import dataclasses
from typing import Literal
from vae.models import conv

class Model(conv.Model):
  depth: int = 3
  rates: tuple[float, ...] = (0.5,)
  kind: Literal['a', 'b'] = 'a'
  limit: float | None = None

  def setup(self):
    super().setup()
    if self.depth > 5:
      raise ValueError(f'depth is {self.depth}; it must be at most 5.')
"""


@pytest.fixture
def own_model(tmp_path, monkeypatch):
  """A config of a model in a module outside the project."""
  (tmp_path / 'own_model.py').write_text(OWN_MODEL)
  monkeypatch.syspath_prepend(tmp_path)
  config = default.get_config()
  config.model.name = 'own_model'
  return config


@pytest.mark.parametrize(
  ('name', 'value', 'accepted'),
  [
    ('depth', 6, 'at most 5'),
    ('rates', (0.5, 'x'), 'a tuple, each entry a finite number'),
    ('kind', 'c', 'one of a, b'),
    ('limit', 'x', 'a finite number or'),
  ],
)
def test_schema_of_a_model_are_its_fields(own_model, name, value, accepted):
  schema.validate(own_model)
  assert own_model.model.rates == (0.5,) and own_model.model.limit is None
  own_model.model.limit = 2
  schema.validate(own_model)
  with pytest.raises(UserError, match=rf'config.model.{name} is .*{accepted}'):
    schema.validate(changed(f'model.{name}', value, own_model))


def test_keys_of_another_model_are_refused_unless_unchanged():
  config = default.get_config()
  config.model.name = 'mlp'
  schema.validate(config)
  assert 'hidden_channels' not in config.model
  config = faces.get_config()
  config.model.name = 'mlp'
  with pytest.raises(UserError, match='config.model.hidden_channels: there is'):
    schema.validate(config)


def test_devices_must_divide_the_batch():
  config = changed('train.batch_size', 20)
  schema.validate(config)
  schema.check_devices(config, 4)
  with pytest.raises(UserError, match='batch_size is 20.*the 8 devices'):
    schema.check_devices(config, 8)


# Parameters and their two moments, and BatchNorm's means and variances, are
# float32, and the step and the two counts of the optimizer int32. The
# reconstructions of a batch are float32 numbers.
STATE = 4 * (3 * 3_937_635 + 2 * (32 + 64 + 128 + 256 + 512) + 3)
STATE += 4 * 2 * (256 + 128 + 64 + 32 + 32)
IMAGE = 4 * 64 * 64 * 3


@pytest.mark.parametrize(
  ('batch_size', 'num_devices', 'needed'),
  [
    (64, 1, 2 * STATE),
    (8192, 1, STATE + 8192 * IMAGE),
    (8192, 2, STATE + 4096 * IMAGE),
  ],
)
def test_state_and_a_batch_must_fit_each_device(
  monkeypatch, batch_size, num_devices, needed
):
  config = celeba.get_config()
  config.train.batch_size = batch_size
  monkeypatch.setattr(devices, 'free_memory', lambda: needed)
  schema.check_devices(config, num_devices)
  monkeypatch.setattr(devices, 'free_memory', lambda: needed - 1)
  with pytest.raises(UserError, match=f'3,937,635 .*batch_size={batch_size},'):
    schema.check_devices(config, num_devices)
  # The devices of a CPU share the host's memory.
  monkeypatch.setattr(devices, 'free_memory', lambda: None)
  monkeypatch.setattr(jax, 'local_device_count', lambda: 4)
  monkeypatch.setattr(
    processes, 'free_memory', lambda: num_devices * needed - 1
  )
  with pytest.raises(UserError, match=' GB free. Lower one'):
    schema.check_devices(config, num_devices)


# By type: expressions that no key of it takes, and some that a key may take.
WRONG = {
  bool: ('0', '"True"', '1.0', '()'),
  int: ('"3"', 'True', '2.5', '[3]', '1e400', '-2**63', '10**400'),
  float: ('"3"', '[3.0]', '1e400', '-1e400', '-1.0'),
  tuple: ('32', '"abc"', '(4, True)', '(4, None)', '((4,), 8)', '(0, 8)'),
  str: ('3', '("celeba",)', 'True', 'b"celeba"'),
}
EXTREME = {
  bool: ('True', 'False'),
  int: ('0', '1', '2', '7', '-1', '4096', '10**6', '10**9', '2**31', '2**63'),
  float: ('0', '-0.0', '5e-324', '1e-38', '1', '1e9', '1e19', '1e300'),
  tuple: ('()', '(1,)', '[4, 8]', '(4, 8, 16)', '(2**31,)', '(1,) * 40'),
  str: ('""', '"nosuch"', '"x" * 300', '"a\\nb"', '"\\x1b[31m"', '"α"', '"{}"'),
}
NEVER = ('None', 'object()', '1j', 'int', 'float("nan")', '{"a": 1}')


def check_fuzzed(seed, count):
  """Each is refused in a line that names the key, or makes a model."""
  chance, refused = random.Random(seed), 0
  table = default.get_config()
  schema.complete(table)
  examples = schema.flatten(table)
  for index in range(count):
    key = chance.choice(list(examples))
    kind, wrong = type(examples[key]), index % 2 == 0
    pool = WRONG[kind] + NEVER if wrong else EXTREME[kind]
    value = chance.choice(pool)
    config = default.get_config()
    group, _, name = key.rpartition('.')
    with config.ignore_type():
      (config[group] if group else config)[name] = eval(value)
    try:
      schema.validate(config)
      schema.check_devices(config, 1)
      assert not wrong, (key, value)
    except UserError as error:
      refused += 1
      message = str(error)
      names = f'config.{group or key}', 'config.model'  # Made for the image.
      assert message.startswith(names), (key, message)
      assert message.isprintable() and len(message) < 500
  return refused


def test_fuzzed_configs_are_refused_in_one_line():
  assert 20 < check_fuzzed(seed=1, count=40) < 40


@pytest.mark.faults
def test_500_fuzzed_configs(record_property):
  check_fuzzed(seed=2, count=500)
  record_property('faults', ['fuzzed configs', 500, 500, 'nothing'])
