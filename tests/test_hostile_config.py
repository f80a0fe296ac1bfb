"""Configs of wrong types and extreme values, and files that are no configs."""

import random

import pytest

from configs import default
from runs import schema
from tests.preloaded import run
from vae.errors import UserError

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


CONFIG = 'from configs import default\ndef get_config():\n  config = default.'
CONFIG += 'get_config()\n'


@pytest.mark.parametrize(
  ('program', 'reason'),
  [
    ('', "KeyError: 'get_config'"),
    ('x = = 1\n', 'config.py, line 1: SyntaxError'),
    ('import sys\nsys.exit(0)\n', 'line 2: SystemExit: 0'),
    ('def get_config():\n  return {"seed": 3}\n', "the config is {'seed': 3}"),
    (CONFIG + '  raise OSError("a\\nb")\n', 'line 4: OSError: a b'),
    (CONFIG + '  config.bata = 4\n  return config\n', 'config.bata: there is'),
  ],
)
def test_file_that_is_no_config_gets_one_line(tmp_path, program, reason):
  path = tmp_path / 'config.py'
  path.write_text(program)
  check_refused(tmp_path, reason, f'--config={path}')


@pytest.mark.parametrize(
  ('flags', 'reason'),
  [
    (['--config.model={}'], '--config.model: there is no such key'),
    (['--config.model.__class__=1'], 'there is no such key'),
    (['--config.model.hidden_channels[0]=1'], 'did you mean model.hidden_ch'),
    (['--config.seed=' + '9' * 5000], 'config.seed'),
    (['--config.model.latent_dim=1000000000'], ' GB free'),
    (['--config=a\nb.py'], '--config=a b.py: there is no such file'),
    (['--config.seed=3', '--config=configs/faces.py'], 'before a value for'),
  ],
)
def test_flags_that_are_no_settings_get_one_line(tmp_path, flags, reason):
  check_refused(tmp_path, reason, *flags)


def check_refused(tmp_path, reason, *flags):
  code, out, err = run(*flags, f'--workdir={tmp_path}/w')
  assert (code, out) == (2, ''), err
  assert err.startswith('error: ') and err.count('\n') == 1 and reason in err
  assert len(err) < 2100 and not (tmp_path / 'w').exists()
