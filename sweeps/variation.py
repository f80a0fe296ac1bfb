"""What varies between the points of a sweep: its order, and its names."""

from collections.abc import Iterable
import math
import statistics

from sweeps.results import Result

BETA = 'objective.beta'
LATENT_DIM = 'model.latent_dim'
SEED = 'seed'


def keys(results: list[Result]) -> list[str]:
  """The keys that points have a value of, in the order in which they came."""
  return list(dict.fromkeys(key for result in results for key in result.values))


def varied(results: list[Result]) -> list[str]:
  """Those of the keys that have more than one value."""
  return [key for key in keys(results) if len(distinct(results, key)) > 1]


def setting(result: Result, key: str) -> object:
  """The value of a key, None where the point has none."""
  value = result.values.get(key)
  return tuple(value) if isinstance(value, list) else value


def distinct(results: list[Result], key: str) -> list[object]:
  """The values of a key, in order."""
  return [value for (value,) in grouped(results, [key])]


def grouped(
  results: Iterable[Result], by: list[str]
) -> dict[tuple[object, ...], list[Result]]:
  """Points that share the values of these keys, in the order of the values."""
  groups = {}
  for result in results:
    values = tuple(setting(result, key) for key in by)
    groups.setdefault(values, []).append(result)
  return dict(sorted(groups.items(), key=lambda item: _rank(item[0])))


def _rank(values: tuple[object, ...]) -> list[tuple[bool, float, str]]:
  """Numbers by their size, and all else behind them, by its text."""
  return [
    (False, value, '') if is_number(value) else (True, 0.0, text(value))
    for value in values
  ]


def is_number(value: object) -> bool:
  """Whether a value has a place on an axis."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(value: object, digits: int = 6) -> str:
  """A value as it is read: `0.5`, `(32,64)`, `gaussian`.

  Args:
    value: of a key.
    digits: significant ones, of a float.
  """
  if value is None:
    return '–'
  if isinstance(value, float):
    return f'{value:.{digits}g}'
  if isinstance(value, (tuple, list)):
    return f'({",".join(map(text, value))})'
  return str(value)


def names(of: list[str]) -> dict[str, str]:
  """What keys are called: β, or by their last part, unless others are too."""
  last = [key.rpartition('.')[2] for key in of]
  return {
    key: 'β' if key == BETA else part if last.count(part) == 1 else key
    for key, part in zip(of, last, strict=True)
  }


def describe(
  values: dict[str, object], called: dict[str, str], digits: int = 6
) -> str:
  """Settings in words, such as `β 0.5, latent_dim 16`.

  Args:
    values: by key.
    called: `names` of these keys, and perhaps of others.
    digits: significant ones, of floats.
  """
  return ', '.join(
    f'{called[key]} {text(value, digits)}' for key, value in values.items()
  )


def mean(results: list[Result], metric: str) -> float:
  """Mean of a metric over the points in which it is finite, else NaN."""
  values = _finite(results, metric)
  return statistics.fmean(values) if values else math.nan


def deviation(results: list[Result], metric: str) -> float:
  """Standard deviation over the same points; 0 of a single one."""
  values = _finite(results, metric)
  return statistics.stdev(values) if len(values) > 1 else 0.0


def finite(results: list[Result], *metrics: str) -> list[Result]:
  """The points in which all of these metrics are known and finite."""
  return [
    result
    for result in results
    if all(
      math.isfinite(result.metrics.get(metric, math.nan)) for metric in metrics
    )
  ]


def unit(results: list[Result], metric: str) -> str:
  """The unit of a metric, empty where the points have several."""
  units = {result.units.get(metric, '') for result in results}
  return units.pop() if len(units) == 1 else ''


def _finite(results, metric):
  return [result.metrics[metric] for result in finite(results, metric)]
