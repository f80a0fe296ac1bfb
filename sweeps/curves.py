"""Which points of a sweep make a curve, and what tells the curves apart."""

from collections.abc import Iterable
import dataclasses

import numpy as np

from evaluation import plots
from evaluation import posterior
from sweeps import variation
from sweeps.results import Result

# More curves than these are not told apart by eye.
MOST_CURVES = 8
# What has more values of a setting than these, or fewer of the combinations, is
# a random search, not a grid.
MOST_VALUES = 12
_LEAST_COVERAGE = 0.5


@dataclasses.dataclass(frozen=True)
class Point:
  """Results that differ in their seed alone.

  Attributes:
    values: of the settings that vary, without the seed, by key.
    results: one for each seed.
  """

  values: dict[str, object]
  results: list[Result]

  def text(self, keys: list[str], digits: int) -> str:
    """The values of these keys, such as `0.5, 16`."""
    return ', '.join(label(self.values[key], digits) for key in keys)

  def mean(self, metric: str) -> float:
    return variation.mean(self.results, metric)

  def deviation(self, metric: str) -> float:
    return variation.deviation(self.results, metric)

  def kl(self) -> tuple[np.ndarray, np.ndarray]:
    """KL of each dimension, the most first, and whether it is active.

    Over the seeds, the mean of each one's first dimension, of the second, and
    so on.

    Returns:
      Nats, [latent_dim]; bool [latent_dim].
    """
    kl = np.array([result.kl for result in self.results])
    active = np.array([result.active for result in self.results])
    order = np.array([posterior.most_informative(row) for row in kl])
    kl = np.take_along_axis(kl, order, axis=1).mean(axis=0)
    return kl, np.take_along_axis(active, order, axis=1).mean(axis=0) >= 0.5


@dataclasses.dataclass(frozen=True)
class Curves:
  """How points are put onto curves.

  Attributes:
    along: the key whose values follow each other on a curve: β, if it varies;
      None where several keys could be that.
    across: the other keys that vary, by which the curves differ.
    names: what these keys are called.
    lines: the values of `across` that there are, in order.
    is_grid: whether the points are on curves that can be told apart, rather
      than in a cloud.
  """

  along: str | None
  across: list[str]
  names: dict[str, str]
  lines: list[tuple[object, ...]]
  is_grid: bool

  @property
  def keys(self) -> list[str]:
    """All keys that vary, but for the seed."""
    return [*self.across, *([self.along] if self.along else [])]

  def points(self, results: Iterable[Result]) -> list[Point]:
    """The points that these results make, curve by curve."""
    return [
      Point(dict(zip(self.keys, values, strict=True)), members)
      for values, members in variation.grouped(results, self.keys).items()
    ]

  def line(self, point: Point) -> tuple[object, ...]:
    """The curve that a point is on, one of `lines`."""
    return tuple(point.values[key] for key in self.across)

  def title(self) -> str:
    """What the names of the curves say: the one key that they differ by."""
    return self.names[self.across[0]] if len(self.across) == 1 else ''

  def name(self, line: tuple[object, ...]) -> str:
    """Of a curve, such as `16` below a title, or `sigma 1, latent_dim 16`."""
    if len(line) == 1:
      return label(line[0])
    values = dict(zip(self.across, map(label, line), strict=True))
    return variation.describe(values, self.names)


def label(value: object, digits: int = 6) -> str:
  """`variation.text` for a chart."""
  return plots.readable(variation.text(value, digits))


def arrange(results: list[Result]) -> Curves:
  """Finds the curves of a sweep in all its points, measured or not."""
  varied = [key for key in variation.varied(results) if key != variation.SEED]
  along = None
  if variation.BETA in varied:
    along = variation.BETA
  elif len(varied) == 1:
    along = varied[0]
  across = [key for key in varied if key != along]
  lines = list(variation.grouped(results, across))
  return Curves(
    along,
    across,
    variation.names(variation.varied(results)),
    lines,
    is_grid=len(lines) <= MOST_CURVES
    and is_grid(results, across, [along] if along else []),
  )


def is_grid(results: list[Result], rows: list[str], columns: list[str]) -> bool:
  """Whether the values of these keys make a table, and most of it is there."""
  num_cells = len(variation.grouped(results, [*rows, *columns]))
  num_rows = len(variation.grouped(results, rows))
  num_columns = len(variation.grouped(results, columns))
  return (
    max(num_rows, num_columns) <= MOST_VALUES
    and num_cells >= _LEAST_COVERAGE * num_rows * num_columns
  )
