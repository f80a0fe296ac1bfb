"""The settings that a config may have: keys, types, values, combinations.

The keys of `config.model` and `config.objective` are `name` and the dataclass
fields of the class of that name, which checks their values. All others are
those of configs/default.py, and `RULES` checks their values.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from flax import traverse_util
import jax
import ml_collections

from configs import default
from runs import processes
from vae import devices, models, objectives, registry, steps
from vae.errors import shown, UserError

# The groups whose keys are the fields of a class.
_CLASSES = {'model': models, 'objective': objectives}

# Side of the central square of CelebA's images, 178×218, that is the custom.
_CELEBA_CROP_SIZE = 148

_COUNT = 1, 2**31 - 1  # Counters on the devices are int32.

# The values that a key may have: one of a list, or from a tuple's first to its
# last. A key without a rule is checked by the type of its default alone.
RULES = {
  'seed': (0, 2**32 - 1),
  # A JPEG has no longer side.
  'data.crop_size': (0, 2**16 - 1),
  'data.image_size': (1, 2**16 - 1),
  'data.channels': [1, 3],
  'data.binarize': ['none', 'dynamic', 'fixed', 'threshold'],
  'data.cache': ['auto', 'none', 'host', 'device'],
  # Adam moves each parameter by this in a step: float32 cannot resolve less.
  'optimizer.learning_rate': (1e-12, 1e3),
  'optimizer.epsilon': (1e-30, 1e3),
  'optimizer.decay_per_epoch': (1e-6, 1),
  'optimizer.weight_decay': (0, 1e3),
  'optimizer.clip_norm': (0, 1e9),
  'optimizer.average_decay': (0, 1 - 1e-9),
  'train.batch_size': _COUNT,
  # The learning rate of each is kept.
  'train.num_epochs': (1, 1_000_000),
  'train.on_nonfinite': ['stop', 'skip'],
  'train.steps_per_dispatch': (0, _COUNT[1]),
  'train.log_every_steps': _COUNT,
  'eval.every_epochs': _COUNT,
  'eval.batch_size': _COUNT,
  'checkpoint.keep_best': _COUNT,
  'checkpoint.every_minutes': (1e-9, 1e9),
}

# Settings that may change when a run continues: they say how long it is and how
# it is carried out, and leave every step as it would have been.
FREE_KEYS = frozenset(
  'data.dir data.cache data.decoded_dir train.num_epochs train.on_nonfinite '
  'train.steps_per_dispatch train.log_every_steps eval.every_epochs '
  'eval.batch_size checkpoint.keep_best checkpoint.every_minutes'.split()
)


def flatten(config: ml_collections.ConfigDict) -> dict[str, object]:
  """`{'model.latent_dim': 128, …}` of a nested config."""
  return traverse_util.flatten_dict(config.to_dict(), sep='.')


def complete(
  config: ml_collections.ConfigDict, names: Mapping[str, str] | None = None
) -> None:
  """Adds the keys that a config lacks, with their defaults, in place.

  `names` has `model.name` and `objective.name`, if not those of the config.
  Raises a UserError if it is not a config, or names an unknown class.
  """
  _check_group('the config', config)
  table = default.get_config()
  groups = [key for key in table if isinstance(table[key], type(table))]
  with config.unlocked(), config.ignore_type():
    for group in groups:
      if group not in config:
        config[group] = ml_collections.ConfigDict()
      _check_group(f'config.{group}', config[group])
    for group in _CLASSES:
      name = config[group].get('name', table[group].name)
      config[group].name = (names or {}).get(f'{group}.name', name)
    known = _known(config)
    for group in _CLASSES:
      # Another class than the table's need not have all of its keys.
      for name, value in table[group].items():
        if f'{group}.{name}' not in known and config[group].get(name) == value:
          del config[group][name]
    for key, (kind, value) in known.items():
      group, _, name = key.rpartition('.')
      settings = config[group] if group else config
      if name not in settings:
        if value is dataclasses.MISSING:
          raise UserError(f'config.{key} is missing; it has no default.')
        settings[name] = value
      elif isinstance(found := settings[name], list):
        del settings[name]  # It would cast a tuple to its own type.
        settings[name] = tuple(found)
      elif kind is float and _fits(settings[name], int):
        settings[name] = float(settings[name])


def _check_group(name: str, group: object) -> None:
  if not isinstance(group, ml_collections.ConfigDict):
    raise UserError(
      f'{name} is {shown(repr(group), 100)}; it must be a ConfigDict, as in '
      'configs/default.py.'
    )


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A complete copy, with the crop that a CelebA source has by default."""
  config = config.copy_and_resolve_references()
  complete(config)
  if config.data.source in ('celeba', 'cartoon_faces'):
    config.data.crop_size = config.data.crop_size or _CELEBA_CROP_SIZE
  return config


def validate(config: ml_collections.ConfigDict) -> None:
  """Completes a config; raises a UserError that names the first wrong key."""
  complete(config)
  known = _known(config)
  for key, value in flatten(config).items():
    check_known(f'config.{key}', key, known)
    if accepted := _violated(value, known[key][0], RULES.get(key)):
      raise UserError(
        f'config.{key} is {shown(repr(value), 100)}; it must be {accepted}.'
      )
  source = config.data.source
  needed = {'folder': 'dir', 'tfds': 'name'}.get(source)
  if needed and not config.data[needed]:
    raise UserError(
      f'config.data.{needed} is empty; config.data.source={source} needs it.'
    )
  # The splits of the others are given.
  for key in ('name', 'train', 'validation', 'test'):
    if config.data[key] and source in ('celeba', 'cartoon_faces', 'folder'):
      raise UserError(
        f'config.data.{key} is {config.data[key]!r}; it goes with '
        'config.data.source=tfds.'
      )
  epochs = config.optimizer.decay_epochs
  if not all(_fits(e, int) and e > 0 for e in epochs) or (
    sorted(set(epochs)) != list(epochs)
  ):
    raise UserError(
      f'config.optimizer.decay_epochs is {epochs}; it must be ascending whole '
      'numbers from 1.'
    )
  if config.model.get('dtype') == 'float64' and not jax.config.jax_enable_x64:
    raise UserError(
      'config.model.dtype is float64; that needs JAX_ENABLE_X64=1 in the '
      'environment.'
    )
  for group, package in _CLASSES.items():
    try:
      package.check(config)
    except ValueError as error:
      raise UserError(f'config.{group}.{error}') from error
  try:  # The trace is kept for the first state.
    steps.abstract_state(
      steps.program_from_config(config, config.train.batch_size)
    )
  except ValueError as error:
    raise UserError(f'config.model.{error}') from error


def check_known(name: str, key: str, keys: Iterable[str]) -> None:
  """Raises a UserError, with the closest match, if `key` is not in `keys`."""
  if key not in keys:
    (close,) = difflib.get_close_matches(key, keys, n=1) or [None]
    hint = 'configs/default.py and docs/family.md have all.'
    if close:
      hint = f'did you mean {close}?'
    raise UserError(f'{name}: there is no such key; {hint}')


def check_devices(config: ml_collections.ConfigDict, num_devices: int) -> None:
  """Raises a UserError unless the devices divide the batch, and have memory.

  The least that each needs are the state and, at different times, a copy of it
  for a checkpoint and the reconstructions of its part of a batch.
  """
  batch_size, size = config.train.batch_size, config.data.image_size
  if batch_size % num_devices:
    raise UserError(
      f'config.train.batch_size is {batch_size}; it is global, and must be a '
      f'multiple of the {num_devices} devices.'
    )
  state = steps.abstract_state(steps.program_from_config(config, batch_size))
  state_bytes = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
  )
  objective = config.objective
  samples = objective.get('num_samples', 1) * objective.get('num_bounds', 1)
  numbers = batch_size // num_devices * samples * size**2 * config.data.channels
  itemsize = jax.numpy.dtype(config.model.get('dtype', 'float32')).itemsize
  needed = state_bytes + max(state_bytes, numbers * itemsize)
  # A CPU's devices share the host's memory.
  sharing = min(num_devices, jax.local_device_count())
  free = devices.free_memory()
  if free is None:
    free = processes.free_memory() // sharing
  if needed > free:
    raise UserError(
      f'config.model has {steps.num_parameters(state):,} parameters, and with '
      f'config.train.batch_size={batch_size}, {samples} draws of z for each '
      f'image and config.data.image_size={size} training needs at least '
      f'{needed / 1e9:,.1f} GB; each device has {free / 1e9:,.1f} GB free. '
      'Lower one of them.'
    )


def _known(config: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
  """Type and default of each key that a config may have."""
  known = {
    key: (type(value), value)
    for key, value in flatten(default.get_config()).items()
    if key.partition('.')[0] not in _CLASSES
  }
  for group, package in _CLASSES.items():
    name = config[group].name
    try:
      fields = registry.fields(package.find(str(name)))
    except UserError as error:
      raise UserError(f'config.{group}.name: {error}') from error
    known[f'{group}.name'] = (str, name)
    known |= {f'{group}.{key}': field for key, field in fields.items()}
  return known


def _violated(value: object, kind: Any, rule: Any) -> str | None:
  """The accepted values in words, if `value` is not one of them."""
  if not _fits(value, kind):
    return _words(kind)
  if isinstance(rule, list) and value not in rule:
    return 'one of ' + ', '.join(map(str, rule))
  if isinstance(rule, tuple) and not rule[0] <= value <= rule[1]:
    return f'at least {rule[0]:,} and at most {rule[1]:,}'
  return None


def _fits(value: object, kind: Any) -> bool:
  """Whether a value is of a type, as dataclass fields are annotated."""
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return True
  if origin is typing.Literal:
    return value in parts
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, part) for part in parts)
  if origin is tuple:
    return isinstance(value, tuple) and all(_fits(v, parts[0]) for v in value)
  if isinstance(value, bool):
    return kind is bool
  if kind is float:
    return isinstance(value, (int, float)) and abs(value) < math.inf
  if kind is int:
    return isinstance(value, int) and abs(value) < 2**32
  return not isinstance(kind, type) or isinstance(value, kind)


def _words(kind: Any) -> str:
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if origin is typing.Literal:
    return 'one of ' + ', '.join(map(str, parts))
  if origin is tuple:
    return f'a tuple, each entry {_words(parts[0])}'
  if parts:
    return ' or '.join(map(_words, parts))
  names = {bool: 'True or False', int: 'a whole number below 2**32'}
  names |= {float: 'a finite number', str: 'a string'}
  return names.get(kind, getattr(kind, '__name__', str(kind)))
