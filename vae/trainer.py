"""A run in training, on all devices."""

import collections
from collections.abc import Callable, Iterator, Sequence
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vae import (
  conditioning,
  devices,
  figures,
  initialisation,
  loading,
  numerics,
  splits,
  steps,
)
from vae.checkpoints import Checkpoints

# Steps of a dispatch by default. A CPU is slow, and Ctrl-C and progress wait
# for the steps in flight; images of the host must not crowd the devices.
_STEPS_ON_CPU = 10
_MAX_STEPS = 100
_MAX_BYTES = 64_000_000

# Batches of a dispatch of the validation, at most, and dispatches ahead of one.
_MAX_EVAL_BATCHES = 10
_EVAL_AHEAD = 2


class Trainer:
  """The state of a run, and how batches go through it.

  Each batch is split over the devices. `num_parameters` are those of all runs,
  `step` is the number of updates dispatched, and `is_validated` is whether the
  restored state had been validated.
  """

  num_runs = 1

  def __init__(self, config, data: splits.DataSet):
    """Makes the state before the first step; compiles nothing yet."""
    self._config, self._data = config, data
    self._topology = devices.Topology(
      jax.local_device_count(), jax.process_index(), jax.process_count()
    )
    program = steps.program_from_config(config, data.train.num_examples)
    self._model = program.model
    self._read_labels()
    self._settings = steps.settings_from_config(config)
    self._train_key = numerics.train_key(config.seed)
    self._eval_key = numerics.eval_key(config.seed)
    self._train_steps = steps.make_train_steps(program)
    self._eval_steps = steps.make_eval_steps(program)
    self._state = steps.create_state(program, config.seed)
    self.num_parameters = steps.num_parameters(self._state)
    self.step, self.is_validated = 0, False

  def _read_labels(self) -> None:
    read = functools.partial(conditioning.labels_of, self._config)
    self._labels, self._validation_labels = map(
      read, (self._data.train, self._data.validation)
    )

  def restore(self, saved: Sequence[Checkpoints]) -> None:
    """Restores the last checkpoint of each run, or makes its first state.

    The first process reads it and broadcasts it to the others, whose disks may
    not have it. Raises UserError if the checkpoints are of different steps.
    """
    state, is_validated = self._state, False
    if self._topology.process_index == 0:
      restored = saved[0].restore_last(self._state)
      if restored is not None:
        state, is_validated = restored.state, bool(restored.metrics)
      else:
        state = initialisation.first_state(
          self._config, self._model, state, self._data.train
        )
    state, is_validated = devices.as_first_process(
      (jax.device_get(state), np.array(is_validated))
    )
    self._state = devices.replicate(state)
    self.step, self.is_validated = int(state.step), bool(is_validated)

  def train_chunks(
    self, epoch: int, first_step: int, max_steps: int | None = None
  ) -> Iterator[splits.Chunk]:
    """The rest of an epoch, in chunks for one dispatch each."""
    return self._train_chunks(self._config.seed, epoch, first_step, max_steps)

  def _train_chunks(self, seed, epoch, first_step, max_steps):
    split, batch_size = self._data.train, self._config.train.batch_size
    max_steps = max_steps or _steps_per_dispatch(split, self._config)
    return splits.train_chunks(
      *(split, seed, epoch, first_step, batch_size, max_steps),
      *(self._topology, self._labels),
    )

  def eval_chunks(self) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split, and the position in it of each chunk."""
    split, batch_size = self._data.validation, self._config.eval.batch_size
    max_batches = min(_MAX_EVAL_BATCHES, _max_batches(split, batch_size))
    return splits.eval_chunks(
      split, batch_size, max_batches, self._topology, self._validation_labels
    )

  def train(self, chunk: splits.Chunk) -> steps.Metrics:
    """Dispatches the steps of a chunk, for metrics [..., max_steps]."""
    self._state, metrics = self._train_steps(
      self._state,
      self._settings,
      self._train_key,
      splits.stored_images(self._data.train),
      chunk.batches,
      chunk.num_batches,
    )
    self.step += chunk.num_batches
    return metrics

  def evaluate(self, chunk: splits.Chunk, start: int) -> steps.Metrics:
    """Dispatches a chunk of the validation, for sums [..., max_batches]."""
    return self._eval_steps(
      self._state.variables, *self._eval_arguments(chunk, start)
    )

  def compile_validation(self) -> None:
    """Compiles the program of `evaluate`, in any thread; reads a chunk."""
    # The next training step donates the arrays themselves.
    variables = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
      self._state.variables,
    )
    arguments = self._eval_arguments(*next(self.eval_chunks()))
    self._eval_steps.lower(variables, *arguments).compile()

  def _eval_arguments(self, chunk: splits.Chunk, start: int) -> tuple:
    return (
      self._settings,
      self._eval_key,
      splits.stored_images(self._data.validation),
      chunk.batches,
      chunk.num_batches,
      start,
      self._data.validation.num_examples,
    )

  def validate(self) -> Iterator[steps.Metrics]:
    """Dispatches the validation, every example once, for sums of each chunk."""
    dispatched: collections.deque[steps.Metrics] = collections.deque()
    for chunk, start in self.eval_chunks():
      # The devices have a few chunks of images before them, and no more.
      if len(dispatched) > _EVAL_AHEAD:
        jax.block_until_ready(dispatched.popleft())
      dispatched.append(self.evaluate(chunk, start))
      yield dispatched[-1]

  def means(self, sums: Sequence[steps.Metrics]) -> dict[str, list[float]]:
    """The means over the validation split, one for each run."""
    by_run = [self.by_run(chunk) for chunk in sums]
    # In double precision: a large split has hundreds of millions of nats.
    means = {}
    for name in by_run[0]:
      parts = [part[name].sum(axis=-1, dtype=np.float64) for part in by_run]
      means[name] = (sum(parts) / self._data.validation.num_examples).tolist()
    return means

  def by_run(self, metrics: steps.Metrics) -> dict[str, np.ndarray]:
    """Waits for results of `train` or `evaluate`; [num_runs, max_steps]."""
    return {k: v[None] for k, v in jax.device_get(metrics).items()}

  def snapshot(self) -> steps.TrainState:
    """A copy of the state on the devices, that outlives the next steps."""
    return steps.snapshot(self._state)

  def states(self, snapshot: steps.TrainState) -> list[steps.TrainState]:
    """The state of each run in a snapshot, as a checkpoint has it."""
    return [snapshot]

  def draw(
    self, originals: np.ndarray, columns: int
  ) -> Callable[[], dict[str, np.ndarray]] | None:
    """Dispatches pictures of the run; None if it draws none.

    The function that is returned waits for them, and returns grids of columns²
    samples, and of the originals [n, height, width, channels] beside their
    reconstructions. Samples of all epochs are of the same z; the originals are
    the first of the validation split.
    """
    # The first device's copy, which is not waited for.
    variables = jax.tree.map(
      lambda a: a.addressable_shards[0].data, self._state.variables
    )
    key = numerics.sample_key(self._config.seed)
    count, labels = columns**2, self._validation_labels
    given = conditioning.given(
      variables, conditioning.in_turn(self._model, count)
    )
    samples = _samples(self._model, count, given, key)
    images = originals
    if self._config.data.binarize == 'dynamic':
      images = loading.binarize(originals)
    if labels is not None:
      given = conditioning.given(variables, labels[: len(images)])
    reconstructions = _reconstructions(self._model, given, images)

    def draw():
      pairs = figures.side_by_side(originals, reconstructions)
      return {
        'samples': figures.image_grid(samples, columns),
        'reconstructions': figures.image_grid(pairs, columns),
      }

    return draw


def _steps_per_dispatch(split: splits.Split, config) -> int:
  """Training steps that go to the devices at a time."""
  if config.train.steps_per_dispatch:
    return config.train.steps_per_dispatch
  if jax.default_backend() == 'cpu':
    return _STEPS_ON_CPU
  num_steps = min(_MAX_STEPS, _max_batches(split, config.train.batch_size))
  # A dispatch that ends with a row gives the row its own speed.
  log_every_steps = config.train.log_every_steps
  if num_steps < log_every_steps:
    return num_steps
  return num_steps - num_steps % log_every_steps


def _max_batches(split: splits.Split, batch_size: int) -> int:
  """Batches that this process may send to its devices at a time."""
  if splits.stored_images(split) is not None:
    return _MAX_STEPS  # They are indices.
  local_batch_size = batch_size // jax.process_count()
  num_bytes = local_batch_size * math.prod(split.image_shape)
  return max(1, _MAX_BYTES // max(num_bytes, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _samples(model: nn.Module, count: int, variables, key: jax.Array):
  def sample(model):
    keys = numerics.example_keys(key, jnp.arange(count))
    return model.decode(model.prior().sample(keys)[0]).mean

  return nn.apply(sample, model)(variables)


@functools.partial(jax.jit, static_argnums=0)
def _reconstructions(model: nn.Module, variables, images: jax.Array):
  def reconstruct(model):
    x = steps.to_unit_range(images, steps.float_dtype(model))
    return model.decode(model.encode(x).mean).mean

  return nn.apply(reconstruct, model)(variables)
