"""The points of a sweep: which settings each has, and what it is called."""

import ast
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import re

import ml_collections

from configs import default
from runs import schema
from sweeps import variation
from vae.errors import UserError

# Settings by config key, such as `objective.beta`.
Values = dict[str, object]

# In the folder of a sweep: a folder for each point, a run like any other.
FOLDER = 'points'


@dataclasses.dataclass(frozen=True)
class Range:
  """Where a search looks for a setting.

  Attributes:
    low: at least this.
    high: at most this.
    log: whether it looks as much between 1 and 10 as between 10 and 100.
  """

  low: float
  high: float
  log: bool = False


def parse(key: str, text: str, flag: str) -> list[object] | Range:
  """The values of a setting as a flag names them.

  Args:
    key: of the config.
    text: `0.5,1,2`, or for a search `0.1:10` or `0.1:10:log`.
    flag: that has it, for the message.

  Raises:
    UserError: if the key does not exist, or a value is not of its type.
  """
  known = schema.flatten(default.get_config())
  if key not in known:
    raise UserError(
      f'{flag}: there is no such key; configs/default.py lists all.'
    )
  example = known[key]
  convert = _converter(example)
  low, _, rest = text.partition(':')
  if rest and isinstance(example, (int, float)) and type(example) is not bool:
    high, _, scale = rest.partition(':')
    if scale not in ('', 'log'):
      raise UserError(f'{flag}={text}: after LOW:HIGH only :log can follow.')
    low, high = (_convert(convert, v, flag, text) for v in (low, high))
    if not low < high or (scale and low <= 0):
      raise UserError(
        f'{flag}={text}: LOW must be less than HIGH, and above 0 with :log.'
      )
    return Range(low, high, bool(scale))
  # Commas within parentheses are a tuple's own.
  parts = re.split(r',(?![^()]*\))', text)
  return [_convert(convert, part.strip(), flag, text) for part in parts]


def _converter(example: object) -> Callable[[str], object]:
  if isinstance(example, bool):
    return {'True': True, 'true': True, 'False': False, 'false': False}.get
  if example is None or isinstance(example, (tuple, list)):
    return ast.literal_eval
  return type(example)


def _convert(convert, part: str, flag: str, text: str) -> object:
  try:
    value = convert(part)
  except (ValueError, SyntaxError):
    value = None
  if value is None or part == '':
    what = repr(part) if part else 'an empty value'
    raise UserError(
      f'{flag}={text}: {what} is not what the setting takes; the form is '
      'VALUE,VALUE,….'
    )
  return value


def grid(axes: Mapping[str, Sequence[object]]) -> list[Values]:
  """Every combination of the values, the first key's varying slowest.

  Raises:
    UserError: if a value of a key is there twice.
  """
  for key, values in axes.items():
    # Also of those that differ in their last digits alone.
    names = [name({key: value}) for value in values]
    for index, value in enumerate(values):
      if names[index] in names[:index]:
        raise UserError(
          f'{key} has the value {variation.text(value)} twice; name each point '
          'once.'
        )
  return [
    dict(zip(axes, combination, strict=True))
    for combination in itertools.product(*axes.values())
  ]


def name(values: Values) -> str:
  """Such as `beta=0.5,latent_dim=16`, which is also the folder's name."""
  last = [key.rpartition('.')[2] for key in values]
  parts = []
  for key, value in values.items():
    part = key.rpartition('.')[2]
    called = part if last.count(part) == 1 else key
    parts.append(f'{called}={variation.text(value, digits=12)}')
  return re.sub(r'[^\w.,=+()-]', '-', ','.join(parts))


def configure(
  base: ml_collections.ConfigDict, values: Values
) -> ml_collections.ConfigDict:
  """The config of a point.

  Raises:
    UserError: if its values are not accepted, or do not fit together.
  """
  config = base.copy_and_resolve_references()
  known = schema.flatten(default.get_config())
  for key in values:
    if key not in known:
      raise UserError(
        f'config.{key}: there is no such key; configs/default.py lists all.'
      )
  # Of wrong types `validate` tells, in a line.
  with config.ignore_type():
    config.update_from_flattened_dict(
      {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
      }
    )
  schema.validate(config)
  return config
