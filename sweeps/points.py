"""Points of a sweep: their settings, names, configs and results."""

import ast
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import re

import ml_collections
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
import pandas as pd

from runs import schema
from vae import trainer
from vae.errors import UserError

BETA = 'objective.beta'
LATENT_DIM = 'model.latent_dim'
SEED = 'seed'

# Subfolder of a sweep's workdir; each point's run has a folder in it.
FOLDER = 'points'

# Settings by config key, such as `objective.beta`.
Values = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Range:
  """Interval that a search samples, with its ends; by `log` in the log."""

  low: float
  high: float
  log: bool = False


Axes = Mapping[str, Sequence[object] | Range]

# Metrics of a validation by the objectives that a pruner can follow.
VALIDATION_METRICS = {
  'rate': 'val/kl',
  'distortion': 'val/distortion',
  'elbo': 'val/elbo',
  'mse_of_mean': 'val/mse',
}


@dataclasses.dataclass(frozen=True)
class Point:
  """A point that this worker has taken: name, settings by key, and trial."""

  name: str
  values: Values
  trial: optuna.Trial


@dataclasses.dataclass(frozen=True)
class Results:
  """Table of a sweep's points.

  Attributes:
    frame: a row a point, in the order of the settings, with the columns `point`
      (name), `state` (`complete`, `failed`, `pruned`, `running`, `waiting`),
      the settings, the metrics, `kl` (nats of each latent dimension), `active`
      (bool of each), `error` and `trial` (number in the study).
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
    frame = pd.DataFrame(rows, columns=[*columns, 'trial'])
    for key in keys:  # Pandas would make floats of whole numbers beside None.
      frame[key] = pd.Series([row[key] for row in rows], dtype=object)
    return cls(frame.astype(dict.fromkeys(units, float)), keys, units)

  @classmethod
  def of_trials(cls, trials: Iterable[FrozenTrial], before: Values):
    """Makes the table of trials.

    Args:
      trials: one for each point.
      before: values of the settings that a trial does not have, from JSON.
    """
    rows, units, keys, before = [], {}, {}, from_json(before)
    for trial in trials:
      attrs, state = trial.user_attrs, trial.state.name.lower()
      settings = from_json(attrs['values'])
      keys |= settings
      row = before | settings | {'point': attrs['name'], 'error': ''}
      row |= {'state': state.replace('fail', 'failed'), 'trial': trial.number}
      if trial.state == TrialState.COMPLETE:
        row |= attrs['result']['row']
        units |= attrs['result']['units']
      elif trial.state.is_finished():
        row['error'] = attrs.get('error', 'its worker died')
      rows.append(row)
    return cls.of(rows, list(keys), units)

  @property
  def varied(self) -> list[str]:
    """Settings that have more than one value."""
    return [key for key in self.keys if self.frame[key].nunique(False) > 1]

  def having(self, *metrics: str) -> pd.DataFrame:
    """Rows in which all of these metrics are finite."""
    if not set(metrics) <= set(self.units):
      return self.frame.iloc[:0]
    finite = self.frame[list(metrics)].abs() < float('inf')
    return self.frame[finite.all(axis=1)]

  def over_seeds(self, *metrics: str) -> pd.DataFrame:
    """Means and standard deviations of metrics over the seeds.

    Returns:
      A row for each combination of the other settings that vary, with columns
      for those settings, METRIC, METRIC_std (NaN for one seed), and `seeds`,
      their number; empty if no point has all the metrics.
    """
    rows, by = self.having(*metrics), [k for k in self.varied if k != SEED]
    if rows.empty:
      return pd.DataFrame()
    columns = {m: (m, 'mean') for m in metrics}
    columns |= {f'{m}_std': (m, 'std') for m in metrics}
    columns = {'seeds': ('point', 'count'), **columns}
    table = grouped(rows, by).agg(**columns)
    return table.reset_index(drop=not by)


def grouped(frame: pd.DataFrame, by: list[str]):
  """Rows by their values of settings, in the order of the rows."""
  by = by or (lambda index: 0)
  return frame.groupby(by, sort=False, dropna=False)


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
  names = [
    k if last.count(n) > 1 else n for k, n in zip(keys, last, strict=True)
  ]
  return dict(zip(keys, names, strict=True)) | {BETA: 'β'}


def parse(
  key: str, values: str, base: ml_collections.ConfigDict
) -> list[object] | Range:
  """Parses the values of a setting in a flag; `configure` checks them.

  Args:
    key: config key, such as `objective.beta`.
    values: `0.5,1,2`, or for a search `0.1:10` or `0.1:10:log`.
    base: config with the key.

  Raises:
    UserError: if the key does not exist, or a range is malformed.
  """
  example = _known(base, key)

  def convert(part):
    if isinstance(example, str):
      return part
    try:
      value = ast.literal_eval(part)
    except (ValueError, SyntaxError):
      return part
    is_int = isinstance(example, float) and type(value) is int
    return float(value) if is_int else value

  # Commas within parentheses are a tuple's own.
  listed = [convert(v.strip()) for v in re.split(r',(?![^()]*\))', values)]
  low, colon, high = values.removesuffix(':log').partition(':')
  if not colon or not is_number(example):
    return listed
  low, high, log = convert(low), convert(high), values.endswith(':log')
  are_numbers = is_number(low) and is_number(high)
  if are_numbers and low < high and (low > 0 or not log):
    return Range(low, high, log)
  raise UserError(
    f'config.{key}={values}: a range is LOW:HIGH or LOW:HIGH:log, with LOW '
    'less than HIGH, and above 0 with :log.'
  )


def from_config(axes: object, path: str) -> dict[str, list[object]]:
  """Axes that the function `sweep` of a config file returned.

  Raises:
    UserError: if it is no dict of lists.
  """
  if not isinstance(axes, dict) or not all(
    isinstance(key, str) and isinstance(values, (list, tuple)) and values
    for key, values in axes.items()
  ):
    raise UserError(
      f'{path}: sweep() must return a dict of config keys, such as '
      "'objective.beta', each with a list of values."
    )
  # Numpy's numbers are neither JSON nor a setting.
  plain = lambda v: v.item() if isinstance(v, np.generic) else v
  return {k.removeprefix('config.'): [*map(plain, v)] for k, v in axes.items()}


def _known(base: ml_collections.ConfigDict, key: str) -> object:
  known = schema.flatten(base)
  if key not in known:
    raise UserError(
      f'config.{key}: there is no such key; configs/default.py lists all.'
    )
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


def grid(axes: Mapping[str, Sequence[object]]) -> list[Values]:
  """Every combination of the values; the first key varies slowest.

  Raises:
    UserError: if a key has a value twice.
  """
  for key, values in axes.items():
    # Folders are named by these texts, so those must differ.
    texts = [text(value, digits=12) for value in values]
    for shown in texts:
      if texts.count(shown) > 1:
        raise UserError(f'{key} has the value {shown} twice; name it once.')
  return [
    dict(zip(axes, combination, strict=True))
    for combination in itertools.product(*axes.values())
  ]


def extremes(axes: Axes) -> list[Values]:
  """Points such that each listed value, and each range's end, is in one."""
  listed = {
    key: [choices.low, choices.high] if isinstance(choices, Range) else choices
    for key, choices in axes.items()
  }
  grid(listed)  # Finds values that are given twice.
  return [
    {key: values[min(i, len(values) - 1)] for key, values in listed.items()}
    for i in range(max(map(len, listed.values())))
  ]


def name(values: Values) -> str:
  """Name of a point and of its folder, such as `beta=0.5,latent_dim=16`."""
  short = short_names(list(values)) | {BETA: 'beta'}
  parts = [f'{short[k]}={text(v, digits=12)}' for k, v in values.items()]
  return re.sub(r'[^\w.,=+()-]', '-', ','.join(parts))


def program(values: Values) -> str:
  """Text that is the same for points that can train together."""
  free = trainer.FREE_KEYS
  return repr({key: v for key, v in values.items() if key not in free})


def configure(
  base: ml_collections.ConfigDict, values: Values
) -> ml_collections.ConfigDict:
  """The config of a point.

  Raises:
    UserError: if a key does not exist, or the values are invalid.
  """
  config = base.copy_and_resolve_references()
  for key in values:
    _known(config, key)
  with config.ignore_type():  # `validate` has the better messages.
    config.update_from_flattened_dict(values)
  schema.validate(config)
  return config
