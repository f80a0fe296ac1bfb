"""Configs as nobody should write them, from a seed.

A case is a config file or flags, or both, that set one or several keys of
configs/default.py to values of wrong types and of extreme sizes. Values of a
file are Python expressions, those of the command line are text.
"""

import dataclasses
import itertools
import random

from configs import default
from runs import schema

# What is printed where training would begin.
VALID = 'valid: training would begin.'

# Of a processor, that a case may take; in which others may be at work too.
SECONDS = 5.0
# After which a case hangs.
MAX_SECONDS = 60.0

# What a small run has that trains, with a data set in its data.dir.
BASE = """\
import numpy as np
from ml_collections import config_dict
from configs import default

def get_config():
  config = default.get_config()
  config.data.source = 'celeba'
  config.data.dir = {data_dir!r}
  config.data.decoded_dir = ''
  config.data.cache = 'none'
  config.data.image_size = 16
  config.model.hidden_channels = (4, 8)
  config.model.latent_dim = 3
  config.train.batch_size = 8
{changes}  return config
"""

# What no key of a type takes: the wrong types, numbers that are none.
_NEVER = (
  'None',
  "b'1'",
  'object()',
  '1j',
  '{1}',
  'int',
  'lambda: 1',
  'float("nan")',
  '{"a": 1}',
  '{}',
  'config_dict.ConfigDict()',
  'config_dict.placeholder(float)',
  'config_dict.required_placeholder(int)',
  'config_dict.FieldReference(1) // 0',
  'config_dict.FieldReference(lambda: 1)',
)
_WRONG = {
  bool: ('0', '1', '"True"', '1.0', 'np.True_', '()'),
  int: (
    *('"3"', 'True', '2.5', 'np.int64(3)', '[3]', '1e400', '-10**5000'),
    *('-2**63', '10**30', 'config_dict.FieldReference(10**30)'),
  ),
  float: (
    *('"3"', 'np.float32(1)', '[3.0]', '1e400', '-1e400', '10**400'),
    *('(1.0,)', '-1.0', '-1e-320'),
  ),
  tuple: (
    *('32', '"abc"', '(4, True)', '(4, 8.0)', '(4, None)', '((4,), 8)'),
    *('np.array([4, 8])', '(0, 8)', '(-4,)', '(10**400, 1)', '(4,) * 40'),
    *('(2**31 - 1,) * 4', '(1,) * 10**5', 'range(2)', '(4, 10**12)'),
  ),
  str: ('3', '("celeba",)', '"a\\0b"', '"\\ud800"', 'True', 'np.str_("a\\0b")'),
}
# What some keys take.
_EXTREME = {
  bool: ('True', 'False'),
  int: (
    *('0', '1', '2', '7', '-1', '16', '4096', '65_535', '65_536', '10**6'),
    *('10**9', '10**12', '2**31 - 1', '2**31', '2**32 - 1', '2**32', '2**63'),
  ),
  float: (
    *('0', '0.0', '-0.0', '5e-324', '1e-320', '1e-300', '1e-45', '1e-38'),
    *('1e-19', '1e-12', '1e-6', '1e-3', '1', '1e3', '1e6', '1e9', '1e19'),
    # ml_collections takes True for 1.0.
    *('1e38', '3.5e38', '1e300', '1.7e308', 'np.float64(0.5)', 'True'),
  ),
  tuple: (
    *('()', '(1,)', '[4, 8]', '(4, 8, 16)', '(10**5,)', '(2**31,)'),
    *('(1,) * 4', '(1,) * 5'),
  ),
  str: (
    *('""', '" "', '"nosuch"', '"x" * 300', '"a/" * 5000', '"x" * 10**6'),
    *('"a\\nb"', '"\\x1b[31m"', '"~"', '"~nosuch/x"', '"/dev/null"', '"."'),
    *('"/proc/self/mem"', '"://"', '"http://a/b"', '"bogus://x"', '"{}"'),
    *('"%s %d"', '"α"', '"folder"', '"celeba"', '"none"', '"device"', '"host"'),
    *('"float64"', '"bfloat16"', '"bernoulli"', '"relu"', '"native"'),
  ),
}
_TEXT = {
  bool: ('true', 'false', '2', '', 'yes', 'None', '1.0'),
  int: (
    *('', 'abc', '1.5', 'nan', 'None', 'True', '[1]', '1e3', '{"a": 1}'),
    *('9' * 5000, '0x10', '1_0', '٣', ' 3', '-1', '0', '1', '1000000000'),
    *('2147483647', '2147483648', '1000000000000000000000000000000'),
  ),
  float: (
    *('', 'abc', 'nan', 'inf', '-inf', 'None', 'True', '1e400', '1e308'),
    *('1e-320', '-0.0', '1e-300', '0', '1', '1e6', '1_0.5', '9' * 5000),
  ),
  tuple: (
    *('', '()', '(', '(4,8', '4', '(4,"8")', '(4.0,)', '(1000000000,)'),
    *('(4,8,16)', '(' * 3000, '(' + '4,' * 40 + ')', '{}', '[4,8]', 'None'),
    *('(4,(8,))', '(-1,)', '(0,)', '(True,)', '(' + '9' * 5000 + ',)'),
  ),
  str: (
    *('', ' ', 'nosuch', 'x' * 300, 'x' * 100_000, 'a/' * 5000, 'a\nb'),
    *('\x1b[31m', '~nosuch/x', '/dev/null', 'bogus://x', '://', 'None', '3'),
    *('\udcff', 'a\r\nerror: b', 'folder', 'celeba', 'host', 'float64'),
  ),
}
# What is to stay accepted, by itself.
GOOD = {
  'seed': ('0', '1265', '2**32 - 1'),
  'data.source': ('"folder"',),
  'data.crop_size': ('0', '1', '148', '4096'),
  'data.image_size': ('4', '64', '256'),
  'data.channels': ('1', '3'),
  'data.cache': ('"none"', '"host"', '"auto"', '"device"'),
  'data.skip_corrupt': ('True',),
  'model.latent_dim': ('1', '4096'),
  'model.hidden_channels': ('()', '(1,)', '[4, 8]', '(32, 64, 128)'),
  'model.decoder_channels': ('()', '[8, 4]', '(1, 1)'),
  'model.activation': ('"relu"',),
  'model.likelihood': ('"bernoulli"',),
  'model.sigma': ('1e-3', '1', '100.0'),
  'model.learn_sigma': ('True',),
  'model.dtype': ('"bfloat16"',),
  'model.convolution': ('"native"', '"matmul"'),
  'objective.beta': ('0', '0.0', '-0.0', '1e-3', '1e6'),
  'objective.num_samples': ('1', '50'),
  'objective.sample_posterior': ('False',),
  'objective.input_noise': ('0.2',),
  'optimizer.learning_rate': ('1e-6', '1'),
  'optimizer.decay_per_epoch': ('0.5', '1'),
  'optimizer.weight_decay': ('1e-4',),
  'train.batch_size': ('1', '40'),
  'train.num_epochs': ('1', '10**5'),
  'train.flip': ('False',),
  'train.steps_per_dispatch': ('0', '1', '10**6'),
  'train.log_every_steps': ('1', '10**6'),
  'eval.every_epochs': ('10**6',),
  'eval.batch_size': ('1', '10**4'),
  'checkpoint.keep_best': ('1', '1000'),
  'checkpoint.every_minutes': ('1e-9', '1e9'),
}
# Flags whose shape is the mistake.
_SHAPES = (
  ('--config.model={}',),
  ('--config.model={"latent_dim": 3}',),
  ('--config.model=3',),
  ('--config.model.latent_dim=3', '--config.model={}'),
  ('--config.nosuch=1',),
  ('--config.model.nosuch=1',),
  ('--config.model.latent_dim.real=1',),
  ('--config.__class__=1',),
  ('--config.model.__class__=1',),
  ('--config.model.__dict__={}',),
  ('--config.lock=1',),
  ('--config.items=1',),
  ('--config.=1',),
  ('--config..=1',),
  ('--config.model.=1',),
  ('--config.model[0]=1',),
  ('--config.model.hidden_channels[0]=1',),
  ('--config.mod el=1',),
  ('--config.seed',),
  ('--config.train.batch_size',),
  ('--config',),
  ('--config=',),
  ('--noconfig.seed',),
)
_GOOD_SHAPES = (('--noconfig.train.flip',), ('--config.train.flip',))

_RETURN = 'def get_config():\n  return {}\n'
_RUN = 'def get_config():\n  {}\n'
# Config files that are no configs.
PROGRAMS = (
  '',
  'def get_config(:\n',
  'x = = 1\n',
  '\0',
  '\tdef get_config():\n  pass\n',
  'import no_such_module\n',
  'raise OSError\n',
  'import sys\nsys.exit(0)\n',
  'get_config = 3\n',
  'class get_config:\n  pass\n',
  'def get_config(needed, arguments):\n  pass\n',
  'def get_config():\n  yield 1\n',
  *(
    _RETURN.format(value)
    for value in (
      *('None', '3', '"configs/faces.py"', '[]', '{}', '{"seed": 3}', 'object'),
      *('b"x" * 10**6', '10**5000', 'get_config', 'get_config()', '...'),
      *('__import__("ml_collections").ConfigDict()', 'range(10**9)', '"a\\nb"'),
      '__import__("ml_collections").ConfigDict({1: 2, "a": 3})',
      '__import__("ml_collections").ConfigDict({1: 2})',
      '__import__("configs.default").default.get_config().to_dict()',
    )
  ),
  *(
    _RUN.format(line)
    for line in (
      *('1 / 0', 'assert False', 'raise KeyError', 'raise KeyError("seed")'),
      *('raise ValueError("a\\nerror: b")', 'raise TypeError', 'raise OSError'),
      *('open("/nowhere/file")', '__import__("json").loads("")', 'raise Error'),
      *('raise BaseException("out")', 'raise SystemExit(0)', 'exit(3)'),
      *('raise MemoryError', 'raise RecursionError', 'raise StopIteration'),
      *('raise UnicodeDecodeError("utf-8", b"", 0, 1, "no")', '[][1]'),
      'raise type("Odd", (Exception,), {"__str__": lambda s: 1 / 0})()',
      'raise type("Odd", (ValueError,), {"__init__": lambda s, a, b: 0})(1, 2)',
      'print("noise"); return 3',
    )
  ),
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A config as it is given, and what is to come of it.

  Attributes:
    file: the text of a config file or, where there are keys, the lines that
      change the small run's; None for the small run's as it is.
    flags: of the command line, besides `--config` and `--workdir`.
    keys: that are set; none where the file or the flag as such is wrong.
    expected: 'valid', 'error', or 'either'.
  """

  file: str | None
  flags: tuple[str, ...]
  keys: tuple[str, ...]
  expected: str


def values(seed: int, count: int) -> list[Case]:
  """Cases that set keys; each key, in a file and by a flag, in turn."""
  rng = random.Random(seed)
  examples = schema.flatten(default.get_config())
  cases = []
  for key, kind in itertools.islice(
    itertools.cycle(itertools.product(sorted(examples), range(4))), count
  ):
    keys = [key]
    if kind < 3 and not rng.randrange(4):
      keys += rng.sample(sorted(examples), rng.randint(1, 3))
    keys = tuple(dict.fromkeys(keys))
    if kind == 3 and key in GOOD:
      settings = [(key, rng.choice(GOOD[key]))]
      cases.append(Case(_changes(settings, rng), (), keys, 'valid'))
    elif kind == 2:
      flags = tuple(
        f'--config.{key}={rng.choice(_TEXT[type(examples[key])])}'
        for key in keys
      )
      cases.append(Case(None, flags, keys, 'either'))
    else:
      pool = _WRONG if kind == 0 else _EXTREME
      settings = [(key, _choose(pool, examples[key], rng)) for key in keys]
      expected = 'error' if kind == 0 else 'either'
      cases.append(Case(_changes(settings, rng), (), keys, expected))
  return cases


def mistakes() -> list[Case]:
  """Cases whose flag or file as such is wrong; and two that are right."""
  return [
    *(Case(None, flags, (), 'error') for flags in _SHAPES),
    *(Case(None, flags, (), 'valid') for flags in _GOOD_SHAPES),
    *(Case(program, (), (), 'error') for program in PROGRAMS),
  ]


def _choose(
  pool: dict[type, tuple[str, ...]], example: object, rng: random.Random
) -> str:
  if pool is _WRONG and not rng.randrange(3):
    return rng.choice(_NEVER)
  return rng.choice(pool[type(example)])


def _changes(settings: list[tuple[str, str]], rng: random.Random) -> str:
  """The lines of a config file that make these settings."""
  lines = [f'config.{key} = {value}\n' for key, value in settings]
  # ml_collections refuses other types, unless it is told not to.
  if rng.randrange(3):
    lines = ['with config.ignore_type():\n', *('  ' + line for line in lines)]
  return ''.join('  ' + line for line in lines)


def text(case: Case, data_dir: str) -> str:
  """The case's config file."""
  if case.file is not None and not case.keys:
    return case.file
  return BASE.format(data_dir=data_dir, changes=case.file or '')
