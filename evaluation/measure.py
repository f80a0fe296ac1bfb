"""Measure a trained model on a split.

Each group of metrics has an evaluator: a module with a function

  evaluate(context: Context, results: Measurements) -> None

that adds its metrics to the results, and optionally

  check(context: Context) -> str | None

that runs before any long work; it raises UserError for a mistake, and returns
a reason if the group cannot be measured. `GROUPS` are modules of this package;
any other name is a module on `sys.path`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import types
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import numpy as np

from evaluation import reconstruction
from runs.progress import track
from vae import devices
from vae import numerics
from vae import randomness
from vae import splits
from vae.errors import UserError
from vae.loading import TrainedVAE

GROUPS = ('bounds', 'reconstruction', 'posterior', 'labels', 'fid')

# Images whose codes probes and mixtures are fitted to; the customary number
# (Locatello et al. 2019).
MAX_FITTED = 10_000

# Draws of z per image if many models are compared quickly.
_DRAWS_OF_SUMMARY = 4


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a measurement.

  Attributes:
    groups: names of evaluators.
    num_importance_samples: K of the importance-weighted bound.
    batch_size: global.
    seed: of every random draw.
    inception_weights: path of the Inception network's weights; None for the
      cached or downloaded ones.
    required: raise UserError, not a note, for a group that cannot be measured.
  """

  groups: tuple[str, ...] = GROUPS
  num_importance_samples: int = 100
  batch_size: int = 256
  seed: int = 0
  inception_weights: str | None = None
  required: bool = False


class Null(NamedTuple):
  """A metric's mean and deviation if there is nothing to find."""

  value: float
  deviation: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Null':
    """The null of at least two random repetitions, such as permutations."""
    return cls(float(np.mean(values)), float(np.std(values, ddof=1)))


class Interval(NamedTuple):
  """Bounds on a quantity, and the standard error of each."""

  lower: float
  upper: float
  lower_error: float
  upper_error: float


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number about a split.

  Attributes:
    value: finite, NaN if undefined.
    unit: of the value.
    about: definition, in a few words.
    standard_error: over the choice of images, unless `about` names another.
    null: value to compare with.
  """

  value: float
  unit: str
  about: str
  standard_error: float | None = None
  null: Null | None = None


@dataclasses.dataclass
class Measurements:
  """Metrics of a trained model on a split.

  Attributes:
    num_images: in the split.
    metrics: by name, in reading order.
    verdict: a sentence on the posterior.
    dimensions: lists of one number for each latent dimension.
    labels: metrics of each label.
    notes: what was not measured, and why.
  """

  num_images: int
  metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
  verdict: str = ''
  dimensions: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  labels: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)

  def number(
    self,
    name: str,
    value: float,
    unit: str,
    about: str,
    standard_error: float | None = None,
    null: Null | None = None,
  ) -> None:
    """Adds a number."""
    self.metrics[name] = Metric(float(value), unit, about, standard_error, null)

  def mean(self, name: str, values: np.ndarray, unit: str, about: str) -> None:
    """Adds the mean of [num_images] values, with its standard error."""
    mean, error = mean_and_error(values)
    self.number(name, mean, unit, about, error)

  def interval(
    self, name: str, interval: Interval, unit: str, about: str
  ) -> None:
    """Adds bounds on a number, two metrics."""
    lower, upper, *errors = interval
    self.number(f'{name}_lower_bound', lower, unit, about, errors[0])
    self.number(f'{name}_upper_bound', upper, unit, about, errors[1])


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """Mean and standard error of independent values [n], in float64."""
  values = values.astype(np.float64)
  error = values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(error)


class Context:
  """Model, data and passes over it, shared by the evaluators of a measurement.

  Attributes:
    trained: the model.
    data: all splits; None in a summary.
    split_name: of the measured split.
    split: that split.
    fitted_name: the split that probes are fitted to.
    settings: of the measurement.
    draws_z: whether z is drawn from q(z|x), or is its mean.
  """

  def __init__(
    self,
    trained: TrainedVAE,
    data: splits.DataSet | None,
    split_name: str,
    settings: Settings,
    split: splits.Split | None = None,
  ):
    self.trained, self.data, self.settings = trained, data, settings
    self.split_name = split_name
    self.split = split or getattr(data, split_name)
    self.fitted_name = 'validation' if split_name == 'train' else 'train'
    self.draws_z = trained.config.objective.get('sample_posterior', True)
    self.variables = devices.replicate(trained.variables)

  @functools.cached_property
  def likelihood(self) -> Any:
    """The family of p(x|z): the model's likelihood, of shapes for arrays."""

    def reconstruct(model, images):
      return model.decode(model.encode(images).mean)

    images = np.zeros((1, *self.split.image_shape), np.float32)
    apply = nn.apply(reconstruct, self.trained.model)
    return jax.eval_shape(apply, self.trained.variables, images)

  @functools.cached_property
  def images(self) -> dict[str, np.ndarray]:
    """`reconstruction.make_step` of each image of the split, [num_images, …]."""
    return self.measure_images(reconstruction.NUM_DRAWS, 'encoding and decoding')

  def measure_images(
    self, num_draws: int, label: str = ''
  ) -> dict[str, np.ndarray]:
    """The same, with so many draws of z, and progress if there is a label."""
    step = reconstruction.make_step(
      self.trained.model, num_draws if self.draws_z else 0
    )
    key = randomness.measure_key(self.settings.seed)
    return self.over_split(functools.partial(step, self.variables, key), label)

  @functools.cached_property
  def fitted_positions(self) -> np.ndarray:
    """Positions in the fitted split of the images of `fitted`."""
    count = getattr(self.data, self.fitted_name).num_examples
    return splits.spread(count, MAX_FITTED)

  @functools.cached_property
  def fitted(self) -> dict[str, np.ndarray]:
    """`reconstruction.codes` of images of another split than the measured."""
    split = getattr(self.data, self.fitted_name)
    positions, parts, done = self.fitted_positions, [], 0
    with track('encoding images to fit to', len(positions)) as report:
      for batch in split.batches(positions, self.settings.batch_size):
        parts.append(reconstruction.codes(self.trained.encode(batch)))
        done += len(batch)
        report(done)
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)

  def over_split(
    self,
    step: Callable[[jax.Array, int], Any],
    label: str = '',
    split: splits.Split | None = None,
    batch_size: int | None = None,
  ) -> Any:
    """Applies a step to every image, in order, on all local devices.

    Args:
      step: a function of images [devices, per_device_batch, height, width,
        channels] and the position of the first, that returns a tree of arrays
        [devices, per_device_batch, …].
      label: of the progress lines; empty for none.
      split: by default the measured one.
      batch_size: global, at most; by default that of the settings.

    Returns:
      The tree of numpy arrays [num_images, …].
    """
    split = split or self.split
    progress = track(label, split.num_examples) if label else (
      contextlib.nullcontext(lambda done: None)
    )
    topology = devices.Topology(jax.local_device_count())
    size = batch_size or self.settings.batch_size
    collected, running = [], None
    with progress as report:
      for images, start in splits.eval_batches(split, size, topology):
        ahead = step(images, start)
        # One batch behind, so that the device always has its next one.
        if running is not None:
          collected.append(jax.device_get(running))
          report(start)
        running = ahead
      collected.append(jax.device_get(running))
      report(split.num_examples)
    flat = [
      jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), part)
      for part in collected
    ]
    return jax.tree.map(
      lambda *parts: np.concatenate(parts)[: split.num_examples], *flat
    )


def find(name: str) -> types.ModuleType:
  """The evaluator of a name.

  Raises:
    UserError: if there is none.
  """
  path = f'evaluation.{name}' if name in GROUPS else name
  try:
    found = importlib.util.find_spec(path)
  except (ImportError, ValueError):
    found = None
  module = found and importlib.import_module(path)
  if not hasattr(module, 'evaluate'):
    raise UserError(
      f'--metrics: there is no {name}; there are {", ".join(GROUPS)}, and '
      'modules on PYTHONPATH that have evaluate(context, results).'
    )
  return module


def measure(
  trained: TrainedVAE,
  data: splits.DataSet,
  split_name: str,
  settings: Settings,
  results: Measurements | None = None,
) -> Measurements:
  """Measures a model on every image of a split, each once.

  Args:
    trained: the model.
    data: all splits; readers and mixtures are fitted to another split.
    split_name: `train`, `validation` or `test`.
    settings: what to measure, and how.
    results: filled in place, so that a failure leaves what was measured.

  Raises:
    UserError: if a group is unknown, or required and cannot be measured.
  """
  context = Context(trained, data, split_name, settings)
  if context.split.num_examples < 2:
    raise UserError(
      f'the {split_name} split has one image; what varies over images needs at '
      'least 2. Choose another --split.'
    )
  if results is None:
    results = Measurements(context.split.num_examples)
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
  with numerics.precise(trained.model.dtype):
    for evaluator in evaluators:
      evaluator.evaluate(context, results)
  return results


def summarise(
  trained: TrainedVAE, split: splits.Split, settings: Settings
) -> Measurements:
  """Measures what a single pass over a split shows, with few draws of z.

  Args:
    trained: the model.
    split: every image counts once.
    settings: batch size and seed count; the groups do not.

  Returns:
    Rate, distortion, ELBO, also at the optimal σ, MSE and active dimensions.
    Without sampling (a plain autoencoder) they mean little, as in training.
  """
  from evaluation import bounds
  from evaluation import posterior

  context = Context(trained, None, '', settings, split)
  results = Measurements(split.num_examples)
  with numerics.precise(trained.model.dtype):
    values = context.measure_images(_DRAWS_OF_SUMMARY)
    bounds.add_elbo(results, context, values)
    reconstruction.add_mse(results, values)
    posterior.add_dimensions(results, values, draws_z=True)
  return results
