"""What is known of a trained model: numbers by name, with units."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number about a split.

  Attributes:
    value: of the metric.
    unit: that it is in.
    about: what it is, in a few words.
    standard_error: of a mean, from the variance of what it is the mean of:
      images, or draws of z.
  """

  value: float
  unit: str
  about: str
  standard_error: float | None = None


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

  def number(self, name: str, value: float, unit: str, about: str) -> None:
    """Adds a number that is no mean over images."""
    self.metrics[name] = Metric(float(value), unit, about)
