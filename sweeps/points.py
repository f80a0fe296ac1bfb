"""Points of a sweep: their settings, names, configs and results."""

import ast
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import itertools
import re

import ml_collections
import optuna
import pandas as pd

from runs import schema
from vae import population
from vae.errors import UserError

BETA, LATENT_DIM, SEED = 'objective.beta', 'model.latent_dim', 'seed'

# Settings by config key, such as `objective.beta`.
Values = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Range:
  """Interval that a search samples, ends included.

  With `log` it samples uniformly in the logarithm.
  """

  low: float
  high: float
  log: bool = False


Axes = Mapping[str, Sequence[object] | Range]


@dataclasses.dataclass(frozen=True)
class Results:
  """Table of a sweep's points.

  Attributes:
    frame: a row a point, in the order of the settings, with the columns `point`
      (name), `state` (`complete`, `failed`, `running`, `waiting`), settings,
      metrics, `kl` (nats) and `active` [latent_dim], and `error`.
    keys: columns that are settings.
    units: unit of each column that is a metric, in the order of reading.
  """

  frame: pd.DataFrame
  keys: list[str]
  units: dict[str, str]

  @classmethod
  def of(cls, rows: list[dict], keys: list[str], units: dict[str, str]):
    """Makes the table of rows in any order; metrics may be missing."""
    rows = sorted(rows, key=lambda row: [_rank(row[key]) for key in keys])
    columns = ['point', 'state', *keys, *units, 'kl', 'active', 'error']
    # Else whole numbers beside None become floats.
    frame = pd.DataFrame(rows, columns=columns, dtype=object)
    return cls(frame.astype(dict.fromkeys(units, float)), keys, units)

  @property
  def varied(self) -> list[str]:
    """Settings that have more than one value."""
    return [key for key in self.keys if self.frame[key].nunique(False) > 1]

  def over_seeds(self, *metrics: str) -> pd.DataFrame:
    """Means and standard deviations of metrics over the seeds.

    A row for each combination of the other settings that vary, with columns for
    those settings, METRIC, METRIC_std (NaN for one seed), and `seeds`, their
    number; empty if no point has all the metrics, finite.
    """
    if not set(metrics) <= set(self.units):
      return pd.DataFrame()
    is_finite = self.frame[list(metrics)].abs() < float('inf')
    rows = self.frame[is_finite.all(axis=1)]
    by = [key for key in self.varied if key != SEED]
    columns = {m: (m, 'mean') for m in metrics}
    columns |= {f'{m}_std': (m, 'std') for m in metrics}
    table = grouped(rows, by).agg(seeds=('point', 'count'), **columns)
    return table.reset_index(drop=not by)


def grouped(frame: pd.DataFrame, by: list[str]):
  """Rows by their values of settings, in the order of the rows."""
  return frame.groupby(by or (lambda index: 0), sort=False, dropna=False)


def from_json(values: Mapping[str, object]) -> Values:
  """Settings from JSON, which has lists for tuples."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _rank(value: object) -> tuple[bool, float, str]:
  """Sort key: numbers by size, then everything else by its text."""
  return (False, value, '') if is_number(value) else (True, 0, text(value))


def is_number(value: object) -> bool:
  """Whether a value has a place on an axis."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(value: object, digits: int = 6) -> str:
  """A value as it is read: `0.5`, `(32,64)`, `gaussian`."""
  if isinstance(value, float):
    return f'{value:.{digits}g}'
  if isinstance(value, (tuple, list)):
    return f'({",".join(map(text, value))})'
  return '–' if value is None else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
  """Names on charts: β, a key's last part, or all if two share that."""
  last = [key.rpartition('.')[2] for key in keys]
  names = {
    key: key if last.count(name) > 1 else name
    for key, name in zip(keys, last, strict=True)
  }
  return names | {BETA: 'β'}


def name(values: Values) -> str:
  """Name of a point and of its folder, such as `beta=0.5,latent_dim=16`."""
  short = short_names(list(values)) | {BETA: 'beta'}
  parts = [f'{short[k]}={text(v, digits=12)}' for k, v in values.items()]
  return re.sub(r'[^\w.,=+()-]', '-', ','.join(parts))


def parse(
  key: str, values: str, base: ml_collections.ConfigDict
) -> list[object] | Range:
  """Parses the values of a setting in a flag; `configure` checks them.

  They are `0.5,1,2`, or for a search `0.1:10` or `0.1:10:log`. Raises UserError
  if the key does not exist, or a range is malformed.
  """
  example = _known(base, key)
  low, colon, high = values.removesuffix(':log').partition(':')
  if not colon or not is_number(example):
    # Commas within parentheses are a tuple's own.
    listed = [v.strip() for v in re.split(r',(?![^()]*\))', values)]
    return listed if isinstance(example, str) else [*map(_literal, listed)]
  log = values.endswith(':log')
  with contextlib.suppress(ValueError):
    low, high = type(example)(low), type(example)(high)
    if low < high and (low > 0 or not log):
      return Range(low, high, log)
  raise UserError(
    f'config.{key}={values}: a range is LOW:HIGH or LOW:HIGH:log, with LOW '
    'less than HIGH, and above 0 with :log.'
  )


def _literal(text: str) -> object:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text  # Which `configure` names.


def _known(base: ml_collections.ConfigDict, key: str) -> object:
  known = schema.flatten(base)
  schema.check_known(f'config.{key}', key, known)
  return known[key]


def suggest(
  trial: optuna.Trial, key: str, choices: Sequence[object] | Range
) -> object:
  """A value of a setting that the sampler chooses."""
  if isinstance(choices, Range):
    is_int = isinstance(choices.low, int)
    sample = trial.suggest_int if is_int else trial.suggest_float
    return sample(key, choices.low, choices.high, log=choices.log)
  texts = {text(choice, digits=12): choice for choice in choices}
  # To Optuna, a parameter with more categories is another one.
  parameter = f'{key} of {", ".join(texts)}'
  return texts[trial.suggest_categorical(parameter, list(texts))]


def grid(axes: Axes) -> list[Values]:
  """Every combination of the values, or of a range's ends."""
  listed = [
    [choices.low, choices.high] if isinstance(choices, Range) else choices
    for choices in axes.values()
  ]
  return [
    dict(zip(axes, combination, strict=True))
    for combination in itertools.product(*listed)
  ]


def program(values: Values) -> str:
  """Text that is the same for points that can train together."""
  free = population.FREE_KEYS
  return repr({key: v for key, v in values.items() if key not in free})


def configure(
  base: ml_collections.ConfigDict, values: Values
) -> ml_collections.ConfigDict:
  """The config of a point; UserError if a key or a value is invalid."""
  config = base.copy_and_resolve_references()
  for key in values:
    _known(config, key)
  with config.ignore_type():  # `validate` has the better messages.
    config.update_from_flattened_dict(values)
  schema.validate(config)
  return config
