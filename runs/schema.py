"""What a config may say.

A config is checked before any data is read: against the table of
`configs/default.py`, which knows every key and its type, and against the
rules below, which know the values.
"""

import math
from typing import get_args
from typing import get_origin
from typing import Literal

import jax
import ml_collections

from configs import default
from runs import memory
from vae import models
from vae import objectives
from vae import registry
from vae.errors import UserError

SOURCES = ('celeba', 'cartoon_faces', 'folder')
CACHES = ('auto', 'none', 'host', 'device')
DTYPES = ('float32', 'bfloat16', 'float64')

# Side of the central square of CelebA's images, 178×218, that is the custom.
CELEBA_CROP_SIZE = 148


def _one_of(*values):
  accepted = 'one of ' + ', '.join(map(str, values))
  return lambda v: v in values, accepted


def _between(low, high):
  def text(bound):
    return f'{bound:,}' if isinstance(bound, int) else f'{bound:g}'

  return (
    lambda v: low <= v <= high,
    f'at least {text(low)} and at most {text(high)}',
  )


def _is_path(value):
  # TensorBoard's files have names in UTF-8, the system's calls end at a NUL.
  try:
    return b'\0' not in value.encode()
  except UnicodeEncodeError:
    return False


_POSITIVE = lambda v: v > 0, 'greater than 0'
_ANY = lambda v: True, 'anything'

# What is counted on the devices is an int32, the steps of a run among it.
_MAX_COUNT = 2**31 - 1
_COUNT = _between(1, _MAX_COUNT)

# Of an image, in pixels: a JPEG has no more.
_SIDE_BITS = 16
_SIDE = _between(1, 2**_SIDE_BITS - 1)

# Each epoch's learning rate is kept.
_MAX_EPOCHS = 1_000_000

# Key: whether a value is accepted, and what is, in words. A key that is not
# here is checked by its default's type alone.
RULES = {
  'seed': (lambda v: 0 <= v < 2**32, 'from 0 to 2**32 - 1'),
  'data.source': _one_of(*SOURCES),
  'data.dir': (
    lambda v: _is_path(v) and ('://' not in v or v.startswith('gs://')),
    'a folder, local or of gs://, named in UTF-8; or empty',
  ),
  'data.crop_size': _between(0, 2**_SIDE_BITS - 1),
  'data.image_size': _SIDE,
  'data.channels': _one_of(1, 3),
  'data.cache': _one_of(*CACHES),
  'data.decoded_dir': (
    lambda v: _is_path(v) and '://' not in v,
    'a local folder, named in UTF-8; or empty',
  ),
  'data.skip_corrupt': _ANY,
  # By which Adam moves each parameter in a step: less than float32 can tell
  # from none, and more than leaves it any digit.
  'optimizer.learning_rate': _between(1e-12, 1e3),
  'optimizer.decay_per_epoch': _between(1e-6, 1),
  'optimizer.weight_decay': _between(0, 1e3),
  'optimizer.clip_norm': _between(0, 1e9),
  'train.batch_size': _COUNT,
  'train.num_epochs': _between(1, _MAX_EPOCHS),
  'train.flip': _ANY,
  'train.on_nonfinite': _one_of('stop', 'skip'),
  'train.steps_per_dispatch': _between(0, _MAX_COUNT),
  'train.log_every_steps': _COUNT,
  'eval.every_epochs': _COUNT,
  'eval.batch_size': _COUNT,
  'checkpoint.keep_best': _COUNT,
  'checkpoint.every_minutes': _POSITIVE,
}

# What may change when a run goes on: it says how the run is carried out, or
# how long it is, and leaves every step as it would have been.
FREE_KEYS = frozenset(
  {
    'data.dir',
    'data.cache',
    'data.decoded_dir',
    'train.num_epochs',
    'train.on_nonfinite',
    'train.steps_per_dispatch',
    'train.log_every_steps',
    'eval.every_epochs',
    'eval.batch_size',
    'checkpoint.keep_best',
    'checkpoint.every_minutes',
  }
)


def flatten(config, prefix: str = '') -> dict[str, object]:
  """`{'model.latent_dim': 128, …}` of a nested config."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, (ml_collections.ConfigDict, dict)):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy with the source's own `data.crop_size` in the place of 0.

  So a folder's stays 0, the largest square.
  """
  config = config.copy_and_resolve_references()
  if config.data.source != 'folder':
    config.data.crop_size = config.data.crop_size or CELEBA_CROP_SIZE
  return config


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks a config by itself: keys, types, values, and how they fit.

  Raises:
    UserError: names the first key that is wrong, and what is accepted.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'the config is {_shown(config)}; get_config() must return a ConfigDict, '
      'best the one of configs/default.py, changed.'
    )
  known = default.get_config()
  for group, seam in (('model', models), ('objective', objectives)):
    fields = _complete(config, group, seam)
    known[group] = ml_collections.ConfigDict(
      {'name': '', **{name: field.default for name, field in fields.items()}}
    )
  _check_group(config, known, '')
  for group, seam in (('model', models), ('objective', objectives)):
    try:
      seam.check(config)
    except ValueError as error:
      raise UserError(f'config.{group}.{error}') from error
  _check_combinations(config)


def _complete(config, group: str, seam) -> dict[str, registry.Field]:
  """Fills in the defaults of a model's or an objective's settings."""
  found = config.get(group)
  if not isinstance(found, ml_collections.ConfigDict):
    return {}
  with found.unlocked():
    found.name = found.get('name', default.get_config()[group].name)
    fields = seam.fields(seam.find(found.name))
    for name, field in fields.items():
      if name not in found:
        found[name] = field.default
      choices = get_args(field.annotation)
      if get_origin(field.annotation) is Literal and found[name] not in choices:
        raise UserError(
          f'config.{group}.{name} is {_shown(found[name])}; it must be one of '
          f'{", ".join(choices)}.'
        )
  return fields


def _check_group(
  given: ml_collections.ConfigDict,
  known: ml_collections.ConfigDict,
  prefix: str,
) -> None:
  """Checks a group of settings by itself, and the groups in it."""
  try:
    names = list(given)
  except TypeError as error:  # They are sorted.
    raise UserError(
      f'config.{prefix}* has keys that are no names; configs/default.py lists '
      'all that there are.'
    ) from error
  for name in names:
    if name not in known:
      raise UserError(
        f'config.{prefix}{name}: there is no such key; configs/default.py '
        'lists all.'
      )
  for name, example in known.items():
    key = prefix + name
    if name not in names:
      raise UserError(
        f'config.{key}: missing; start the config from configs/default.py.'
      )
    try:
      value = given[name]
    except Exception as error:  # References are computed when they are read.
      raise UserError(
        f'config.{key} cannot be read ({_shown(error)}); give it a plain value.'
      ) from error
    if isinstance(example, ml_collections.ConfigDict):
      if not isinstance(value, ml_collections.ConfigDict):
        raise UserError(
          f'config.{key} is {_shown(value)}; it must be a group of settings, '
          'as in configs/default.py.'
        )
      _check_group(value, example, f'{key}.')
      continue
    _check_type(key, value, example)
    accepts, accepted = RULES.get(key, _ANY)
    if not accepts(value):
      raise UserError(
        f'config.{key} is {_shown(value)}; it must be {accepted}.'
      )


# Characters of a value in a message.
_MAX_SHOWN = 100


def _shown(value: object) -> str:
  """A value in a message: in one line, not too long, whatever it is."""
  try:
    text = ' '.join(repr(value).split())
  except Exception:  # An int of thousands of digits, among others.
    text = f'something of type {type(value).__name__}'
  return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + ' …'


def _check_type(key: str, value: object, example: object) -> None:
  if isinstance(example, bool):
    fits, wanted = isinstance(value, bool), 'True or False'
  elif isinstance(example, int):
    fits, wanted = _is_int(value), 'a whole number'
  elif isinstance(example, float):
    fits, wanted = _is_finite(value), 'a finite number'
  elif isinstance(example, (tuple, list)):
    fits, wanted = isinstance(value, (tuple, list)), 'a tuple'
    if example and all(map(_is_int, example)):
      fits = fits and all(map(_is_int, value))
      wanted = 'a tuple of whole numbers'
  elif isinstance(example, str):
    fits, wanted = isinstance(value, str), 'a string'
  else:  # No default, or of a type of its own.
    return
  if not fits:
    raise UserError(f'config.{key} is {_shown(value)}; it must be {wanted}.')


def _is_int(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
  if not _is_int(value) and not isinstance(value, float):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # A whole number that no float holds.
    return False


def _check_combinations(config: ml_collections.ConfigDict) -> None:
  if config.data.source == 'folder' and not config.data.dir:
    raise UserError(
      'config.data.dir is empty; with config.data.source=folder it must name '
      'a folder of images.'
    )
  if config.model.get('dtype') == 'float64' and not jax.config.jax_enable_x64:
    raise UserError(
      'config.model.dtype is float64; that needs JAX_ENABLE_X64=1 in the '
      'environment.'
    )


def check_devices(config: ml_collections.ConfigDict, num_devices: int) -> None:
  """Checks that the devices divide the batch, and hold what they must.

  Raises:
    UserError: if they do not.
  """
  if config.train.batch_size % num_devices:
    raise UserError(
      f'config.train.batch_size is {config.train.batch_size}; it is global, '
      f'and must be a multiple of the {num_devices} devices.'
    )
  memory.check(config, num_devices)
