"""Measure a trained model on a split.

Each group of metrics has an evaluator, a module with

  evaluate(context: Context, results: Measurements) -> None

which adds its metrics to the results, and optionally

  check(context: Context) -> str | None

which runs before any long work; it raises UserError for a mistake, and returns
a reason if the group cannot be measured. `GROUPS` are modules of this package;
any other name is a module on `sys.path`.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import types
from typing import Any

import jax
import numpy as np

from evaluation import reconstruction
from runs.progress import track
from vae import conditioning, devices, numerics, registry, splits, steps
from vae.errors import UserError
from vae.loading import TrainedVAE

GROUPS = ('bounds', 'reconstruction', 'posterior', 'labels', 'fid')

# Number of images that probes and mixtures are fitted to; the customary one
# (Locatello et al. 2019).
MAX_FITTED = 10_000

# Errors, nearest neighbours and mixtures need as many.
_MIN_IMAGES = 5

# Draws of z per image: the error of their mean over a split is far below that
# of the choice of images. A summary compares many models quickly.
_NUM_DRAWS, _DRAWS_OF_SUMMARY = 8, 4


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a measurement; `groups` are names of evaluators."""

  groups: tuple[str, ...] = GROUPS
  num_importance_samples: int = 100
  batch_size: int = 256  # Global.
  seed: int = 0
  inception_weights: str | None = None  # By default cached or downloaded.
  required: bool = False  # A group that cannot be measured is an error.


@dataclasses.dataclass(frozen=True)
class Null:
  """A metric's mean and deviation if there is nothing to find."""

  value: float
  deviation: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Null':
    """The null of at least two random repetitions, such as permutations."""
    return cls(float(np.mean(values)), float(np.std(values, ddof=1)))


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number, NaN if undefined, its unit and definition.

  The standard error is over the choice of images, unless `about` names another.
  """

  value: float
  unit: str
  about: str
  standard_error: float | None = None
  null: Null | None = None


@dataclasses.dataclass
class Measurements:
  """Metrics of a trained model on a split, by name, in reading order.

  Attributes:
    verdict: a sentence on the posterior.
    dimensions: lists of one number for each latent dimension.
    labels: metrics of each label.
    notes: what was not measured, and why.
    mixture: draws of the Gaussians fitted to q(z), [n, latent_dim], if any.
  """

  metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
  verdict: str = ''
  dimensions: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  labels: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)
  mixture: np.ndarray | None = None

  def number(
    self, name: str, value: float, unit: str, about: str, error=None, null=None
  ) -> None:
    """Adds a number, with its standard error and null if it has them."""
    self.metrics[name] = Metric(float(value), unit, about, error, null)

  def mean(self, name: str, values: np.ndarray, unit: str, about: str) -> None:
    """Adds the mean of [num_images] values, with its standard error."""
    mean, error = mean_and_error(values)
    self.number(name, mean, unit, about, error)

  def interval(self, name: str, lower, upper, about: str) -> None:
    """Adds bounds, nats, each a value and its error: two metrics."""
    for end, (value, error) in (('lower', lower), ('upper', upper)):
      self.number(f'{name}_{end}_bound', value, 'nats', about, error)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """Mean and standard error of independent values [n], in float64."""
  values = values.astype(np.float64)
  error = values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(error)


@dataclasses.dataclass
class Context:
  """Model, data and passes over it, shared by the evaluators of a measurement.

  Attributes:
    split: the measured one, `split_name` of `data`.
    fitted_name: the split that probes are fitted to.
    draws_z: whether z is drawn from q(z|x), or is its mean.
    binarize: whether each image is drawn black and white, once.
    is_binary: whether the images are black and white, drawn or read.
    labels: of the split, if the model is conditioned on them.
    variables: of the model, with the labels, on all local devices.
  """

  trained: TrainedVAE
  data: splits.DataSet
  split_name: str
  settings: Settings

  def __post_init__(self):
    self.split = getattr(self.data, self.split_name)
    self.fitted_name = 'validation' if self.split_name == 'train' else 'train'
    self.draws_z = self.trained.config.objective.get('sample_posterior', True)
    binarize = self.trained.config.data.get('binarize', 'none')
    self.binarize, self.is_binary = binarize == 'dynamic', binarize != 'none'
    self.labels = conditioning.labels_of(self.trained.config, self.split)
    self.variables = devices.replicate(
      conditioning.given(self.trained.variables, self.labels)
    )

  @functools.cached_property
  def images(self) -> dict[str, np.ndarray]:
    """`reconstruction.make_step` of each image, [num_images, …]."""
    return self.measure_images(_NUM_DRAWS, 'encoding and decoding')

  def measure_images(
    self, num_draws: int, label: str = ''
  ) -> dict[str, np.ndarray]:
    """`images`, with `num_draws` draws of z."""
    num_draws = num_draws if self.draws_z else 0
    step = reconstruction.make_step(
      self.trained.model, num_draws, self.binarize
    )
    key = numerics.measure_key(self.settings.seed)
    return self.over_split(functools.partial(step, self.variables, key), label)

  @functools.cached_property
  def fitted(self) -> dict[str, np.ndarray]:
    """`encode` of another split than the measured."""
    split = getattr(self.data, self.fitted_name)
    return encode(self.trained, split, self.settings.batch_size)

  def batches(self) -> Iterator[splits.Examples]:
    """Images of the split in order, with labels if the model sees any."""
    positions = np.arange(self.split.num_examples)
    return conditioning.batches(
      self.trained.config, self.split, positions, self.settings.batch_size
    )

  def over_split(
    self,
    step: Callable[[jax.Array, int], Any],
    label: str = '',
    split: splits.Split | None = None,
    batch_size: int | None = None,
  ) -> Any:
    """Applies a step to every image, in order, on all local devices.

    `step` is a function of images [devices, per_device_batch, height, width,
    channels] and the position of the first, that returns a tree of arrays
    [devices, per_device_batch, …]. Returns a tree of NumPy arrays [num_images,
    …]. Without a label there are no progress lines.
    """
    split, size = split or self.split, batch_size or self.settings.batch_size
    topology = devices.Topology(jax.local_device_count())
    collected = []
    progress = track(label, split.num_examples) if label else None
    with progress or contextlib.nullcontext(lambda done: None) as report:
      for images, start in splits.eval_batches(split, size, topology):
        collected.append(step(images, start))
        # One batch behind, so that the device always has its next one.
        if start:
          collected[-2] = jax.device_get(collected[-2])
          report(start)
      collected[-1] = jax.device_get(collected[-1])
      report(split.num_examples)

    def join(*parts):
      rows = [part.reshape(-1, *part.shape[2:]) for part in parts]
      return np.concatenate(rows)[: split.num_examples]

    return jax.tree.map(join, *collected)


def encode(
  trained: TrainedVAE, split: splits.Split, batch_size: int = 256
) -> dict[str, np.ndarray]:
  """`reconstruction.codes` of at most 10,000 images, and their `positions`."""
  positions = splits.spread(split.num_examples, MAX_FITTED)
  parts = []
  with track('encoding', len(positions)) as report:
    for examples in conditioning.batches(
      trained.config, split, positions, batch_size
    ):
      encoded = trained.encode(*examples)
      parts.append(reconstruction.codes(encoded, trained.prior))
      report(min(len(parts) * batch_size, len(positions)))
  codes = jax.tree.map(lambda *a: np.concatenate(a), *parts)
  return codes | {'positions': positions}


def find(name: str) -> types.ModuleType:
  """The evaluator of a name; raises UserError if there is none."""
  return registry.find_module('evaluation', name, 'evaluate')


def measure(
  trained: TrainedVAE,
  data: splits.DataSet,
  split_name: str,
  settings: Settings,
  results: Measurements | None = None,
) -> Measurements:
  """Measures a model on every image of a split, each once.

  Results that the caller gives keep what is measured if a later group fails.
  Raises UserError if a group is unknown, or required and cannot be measured.
  """
  context = Context(trained, data, split_name, settings)
  for name in (split_name, context.fitted_name):
    num_images = getattr(data, name).num_examples
    if num_images < _MIN_IMAGES:
      raise UserError(
        f'the {name} split has {num_images} images; a measurement of '
        f'{split_name} images needs at least {_MIN_IMAGES}.'
      )
  results = results or Measurements()
  if not context.draws_z:
    results.notes.append(
      'z is the mean (sample_posterior=False): a plain autoencoder has no '
      'rate and no bound.'
    )
  evaluators = []
  for name in settings.groups:
    evaluator = find(name)
    reason = evaluator.check(context) if hasattr(evaluator, 'check') else None
    if reason and settings.required:
      raise UserError(f'--metrics={name}: {reason}')
    if reason:
      results.notes.append(f'{name}: {reason}')
    else:
      evaluators.append(evaluator)
  with numerics.precise(steps.float_dtype(trained.model)):
    for evaluator in evaluators:
      evaluator.evaluate(context, results)
  return results


def summarise(
  trained: TrainedVAE,
  data: splits.DataSet,
  split_name: str,
  settings: Settings,
) -> Measurements:
  """Measures rate, distortion, ELBO, MSE and active dimensions in one pass.

  With few draws of z, whatever the groups of the settings. Without sampling (a
  plain autoencoder) the bounds mean little.
  """
  from evaluation import bounds, posterior

  context = Context(trained, data, split_name, settings)
  results = Measurements()
  with numerics.precise(steps.float_dtype(trained.model)):
    values = context.measure_images(_DRAWS_OF_SUMMARY)
    bounds.add_elbo(results, context, values)
    reconstruction.add_mse(results, values)
    posterior.add_dimensions(results, values, draws_z=True)
  return results
