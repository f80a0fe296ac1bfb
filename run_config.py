"""What a config may say, and which config made a workdir.

A config is checked before any data is read: against the table of
`configs/default.py`, which knows every key and its type, and against the
rules below, which know the values.
"""

import contextlib
import json
import math
import os

from etils import epath
import jax
import ml_collections

from configs import default
from vae import checkpoints
from vae import layers
from vae import likelihoods
from vae import model
from vae import trained
from vae.errors import UserError

DATA_FILENAME = 'data.json'

SOURCES = ('celeba', 'cartoon_faces', 'folder')
CACHES = ('auto', 'none', 'host', 'device')
DTYPES = ('float32', 'bfloat16', 'float64')


def _one_of(*values):
  accepted = 'one of ' + ', '.join(map(str, values))
  return lambda v: v in values, accepted


def _at_least(bound):
  return lambda v: v >= bound, f'at least {bound}'


_POSITIVE = lambda v: v > 0, 'greater than 0'
_ANY = lambda v: True, 'anything'

# Key: whether a value is accepted, and what is, in words.
RULES = {
  'seed': (lambda v: 0 <= v < 2**32, 'from 0 to 2**32 - 1'),
  'data.source': _one_of(*SOURCES),
  'data.dir': _ANY,
  'data.crop_size': _at_least(1),
  'data.image_size': _at_least(1),
  'data.channels': _one_of(1, 3),
  'data.cache': _one_of(*CACHES),
  'data.decoded_dir': (lambda v: '://' not in v, 'a local folder, or empty'),
  'data.skip_corrupt': _ANY,
  'model.latent_dim': _at_least(1),
  'model.hidden_channels': (
    lambda v: all(channels >= 1 for channels in v),
    'channels of at least 1 each',
  ),
  'model.activation': _one_of(*model.ACTIVATIONS),
  'model.likelihood': _one_of(*likelihoods.LIKELIHOODS),
  'model.sigma': _POSITIVE,
  'model.learn_sigma': _ANY,
  'model.dtype': _one_of(*DTYPES),
  'model.convolution': _one_of(*layers.METHODS),
  'objective.beta': _at_least(0),
  'objective.num_samples': _at_least(1),
  'objective.sample_posterior': _ANY,
  'objective.input_noise': _at_least(0),
  'optimizer.learning_rate': _POSITIVE,
  'optimizer.decay_per_epoch': (lambda v: 0 < v <= 1, 'in (0, 1]'),
  'optimizer.weight_decay': _at_least(0),
  'optimizer.clip_norm': _at_least(0),
  'train.batch_size': _at_least(1),
  'train.num_epochs': _at_least(1),
  'train.flip': _ANY,
  'train.on_nonfinite': _one_of('stop', 'skip'),
  'train.steps_per_dispatch': _at_least(0),
  'train.log_every_steps': _at_least(1),
  'eval.every_epochs': _at_least(1),
  'eval.batch_size': _at_least(1),
  'checkpoint.keep_best': _at_least(1),
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


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks a config by itself: keys, types, values, and how they fit.

  Raises:
    UserError: names the first key that is wrong, and what is accepted.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'the config is {config!r}; get_config() must return a ConfigDict, best '
      'the one of configs/default.py, changed.'
    )
  given = flatten(config)
  known = flatten(default.get_config())
  for key in given:
    if key not in known:
      raise UserError(
        f'config.{key}: there is no such key; configs/default.py lists all.'
      )
  for key, example in known.items():
    if key not in given:
      raise UserError(
        f'config.{key}: missing; start the config from configs/default.py.'
      )
    _check_type(key, given[key], example)
    accepts, accepted = RULES[key]
    if not accepts(given[key]):
      raise UserError(f'config.{key} is {given[key]!r}; it must be {accepted}.')
  _check_combinations(config)


def _check_type(key: str, value: object, example: object) -> None:
  if isinstance(example, bool):
    fits, wanted = isinstance(value, bool), 'True or False'
  elif isinstance(example, int):
    fits, wanted = _is_int(value), 'a whole number'
  elif isinstance(example, float):
    fits = _is_int(value) or (isinstance(value, float) and math.isfinite(value))
    wanted = 'a finite number'
  elif isinstance(example, tuple):
    fits = isinstance(value, (tuple, list)) and all(map(_is_int, value))
    wanted = 'a tuple of whole numbers'
  else:
    fits, wanted = isinstance(value, str), 'a string'
  if not fits:
    raise UserError(f'config.{key} is {value!r}; it must be {wanted}.')


def _is_int(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _check_combinations(config: ml_collections.ConfigDict) -> None:
  strides = len(config.model.hidden_channels)
  size = config.data.image_size
  if size % 2**strides:
    raise UserError(
      f'config.data.image_size is {size}; with {strides} hidden_channels it '
      f'must be a multiple of {2**strides}.'
    )
  if config.data.source == 'folder' and not config.data.dir:
    raise UserError(
      'config.data.dir is empty; with config.data.source=folder it must name '
      'a folder of images.'
    )
  if config.model.learn_sigma and config.model.likelihood != 'gaussian':
    raise UserError(
      'config.model.learn_sigma is True; only the gaussian likelihood has a '
      f'sigma, {config.model.likelihood} has none.'
    )
  if config.objective.num_samples > 1 and not config.objective.sample_posterior:
    raise UserError(
      f'config.objective.num_samples is {config.objective.num_samples}; '
      'without sampling (sample_posterior=False) it must be 1.'
    )
  if config.model.dtype == 'float64' and not jax.config.jax_enable_x64:
    raise UserError(
      'config.model.dtype is float64; that needs JAX_ENABLE_X64=1 in the '
      'environment.'
    )


def check_devices(config: ml_collections.ConfigDict, num_devices: int) -> None:
  """Checks that the devices divide the batch.

  Raises:
    UserError: if they do not.
  """
  if config.train.batch_size % num_devices:
    raise UserError(
      f'config.train.batch_size is {config.train.batch_size}; it is global, '
      f'and must be a multiple of the {num_devices} devices.'
    )


def check_workdir(
  config: ml_collections.ConfigDict, workdir: epath.Path
) -> None:
  """Checks that a run of this config can live, or go on, in a workdir.

  Keys of `FREE_KEYS` may differ from those of the run that is there; all may
  where that run came to nothing, as when its data was missing.

  Raises:
    UserError: if the workdir cannot be written, or holds checkpoints of a
      config that contradicts this one.
  """
  check_writable(workdir, '--workdir')
  begun = checkpoints.exist(workdir)
  if begun:
    _check_same_run(flatten(config), flatten(load(workdir)), workdir)


def check_writable(folder: epath.Path, flag: str) -> None:
  """Makes a folder, if it is not there, and tries to write into it.

  Args:
    folder: for results.
    flag: that names the folder.

  Raises:
    UserError: if that fails.
  """
  with _writing_errors(folder, flag):
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe.{os.getpid()}'
    probe.write_text('')
    probe.unlink()


def claim_workdir(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  num_examples: dict[str, int],
) -> None:
  """Writes into a workdir which config, on how much data, trains in it.

  Args:
    config: as `check_workdir` found it fitting.
    workdir: of the run.
    num_examples: of each split.

  Raises:
    UserError: if the workdir cannot be written, or holds checkpoints that
      were trained on another number of examples.
  """
  with _writing_errors(workdir, '--workdir'):
    if checkpoints.exist(workdir):
      check_data(workdir, num_examples)
    write_json(workdir / DATA_FILENAME, num_examples)
    write_json(workdir / trained.CONFIG, config.to_dict())


def check_data(workdir: epath.Path, num_examples: dict[str, int]) -> None:
  """Checks that a run was trained on this data, as far as can be told.

  Args:
    workdir: of the run.
    num_examples: of the train and validation split.

  Raises:
    UserError: if it was trained on another number of examples.
  """
  path = workdir / DATA_FILENAME
  if not path.exists():
    return
  found = json.loads(path.read_text())
  if found != num_examples:
    raise UserError(
      f'{workdir} holds a run on other data: {found} images, and now '
      f'{num_examples}. Name another --workdir, or give it its data.'
    )


@contextlib.contextmanager
def _writing_errors(folder: epath.Path, flag: str):
  """Turns what a file system may raise, gs:// included, into a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UserError(
      f'{flag}={folder} cannot be written ({reason}); name a folder that can.'
    ) from error


def write_json(path: epath.Path, content: object) -> None:
  """Writes a file of JSON."""
  # Written aside and renamed, so that the file is never half there.
  partial = path.parent / f'{path.name}.{os.getpid()}.partial'
  partial.write_text(json.dumps(content, indent=2) + '\n')
  partial.replace(path)


def load(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """The config that made a workdir, complete and valid.

  Raises:
    UserError: if the workdir holds no config, or one that cannot be used.
  """
  config = default.get_config()
  try:
    config.update(trained.read_config(workdir))
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    path = epath.Path(workdir) / trained.CONFIG
    raise UserError(f'{path} cannot be read as a config: {error}') from error
  validate(config)
  return config


def _check_same_run(
  given: dict[str, object], found: dict[str, object], workdir: epath.Path
) -> None:
  changed = [
    f'config.{key} was {found[key]!r} and is now {given[key]!r}'
    for key in given
    if key not in FREE_KEYS and _plain(given[key]) != _plain(found[key])
  ]
  if changed:
    raise UserError(
      f'{workdir} holds a run of another config: {"; ".join(changed)}. '
      'Name another --workdir, or give the old values.'
    )


def _plain(value: object) -> object:
  return list(value) if isinstance(value, tuple) else value
