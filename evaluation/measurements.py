"""What is known of a trained model: numbers by name, with units."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from evaluation.aggregate_posterior import Interval


@dataclasses.dataclass(frozen=True)
class Null:
  """A metric's value if there is nothing to find, such as by permuted labels.

  Attributes:
    value: mean over random repetitions.
    deviation: standard deviation over them.
  """

  value: float
  deviation: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Null':
    """The null of at least two repetitions."""
    return cls(float(np.mean(values)), float(np.std(values, ddof=1)))


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number about a split.

  Attributes:
    value: of the metric.
    unit: that it is in.
    about: what it is, in a few words.
    standard_error: over the choice of images, unless `about` says of what.
    null: to compare the value with.
  """

  value: float
  unit: str
  about: str
  standard_error: float | None = None
  null: Null | None = None


@dataclasses.dataclass
class Measurements:
  """What is known of a trained model on a split.

  Attributes:
    metrics: by name, in the order in which they are read.
    verdict: on the posterior, in words.
    dimensions: lists of numbers, one for each latent dimension.
    labels: for each label, its numbers by name.
    notes: what could not be measured, and why.
    num_images: of the split.
  """

  num_images: int
  metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
  verdict: str = ''
  dimensions: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  labels: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)

  def mean(self, name: str, values: np.ndarray, unit: str, about: str) -> None:
    """Adds the mean of one value per image, with its standard error."""
    values = values.astype(np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    self.metrics[name] = Metric(float(values.mean()), unit, about, error)

  def interval(
    self, name: str, interval: Interval, unit: str, about: str
  ) -> None:
    """Adds bounds on a number, two metrics."""
    for end in ('lower', 'upper'):
      self.metrics[f'{name}_{end}_bound'] = Metric(
        getattr(interval, end), unit, about, getattr(interval, f'{end}_error')
      )

  def number(
    self,
    name: str,
    value: float,
    unit: str,
    about: str,
    standard_error: float | None = None,
    null: Null | None = None,
  ) -> None:
    """Adds a number that is no mean over images."""
    self.metrics[name] = Metric(float(value), unit, about, standard_error, null)
