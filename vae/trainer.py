"""Training: a run on all devices, or several runs, one on each device."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vae import devices, figures, loading, numerics, splits, steps
from vae.checkpoints import Checkpoints
from vae.errors import UserError

# Settings that may differ between members; all others are the same.
FREE_KEYS = (
  'objective.beta',
  'optimizer.learning_rate',
  'seed',
  'model.latent_dim',
)

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
    self._settings = steps.settings_from_config(config)
    self._train_key = numerics.train_key(config.seed)
    self._eval_key = numerics.eval_key(config.seed)
    self._train_steps = steps.make_train_steps(program)
    self._eval_steps = steps.make_eval_steps(program)
    self._state = steps.create_state(program, config.seed)
    self.num_parameters = steps.num_parameters(self._state)
    self.step, self.is_validated = 0, False

  def restore(self, saved: Sequence[Checkpoints]) -> None:
    """Restores the last checkpoint of each run, or starts from another run.

    The first process reads it and broadcasts it to the others, whose disks may
    not have it. Raises UserError if the checkpoints are of different steps.
    """
    state, is_validated = self._state, False
    if self._topology.process_index == 0:
      restored = saved[0].restore_last(self._state)
      if restored is not None:
        state, is_validated = restored.state, bool(restored.metrics)
      elif self._config.init_from:
        state = loading.start_from(self._config.init_from, state)
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
      split, seed, epoch, first_step, batch_size, max_steps, self._topology
    )

  def eval_chunks(self) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split, and the position in it of each chunk."""
    split, batch_size = self._data.validation, self._config.eval.batch_size
    max_batches = min(_MAX_EVAL_BATCHES, _max_batches(split, batch_size))
    return splits.eval_chunks(split, batch_size, max_batches, self._topology)

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
      self._state.variables,
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
    reconstructions. Samples of all epochs are of the same z.
    """
    # The first device's copy, which is not waited for.
    variables = jax.tree.map(
      lambda a: a.addressable_shards[0].data, self._state.variables
    )
    key = numerics.sample_key(self._config.seed)
    samples = _samples(self._model, columns**2, variables, key)
    images = originals
    if self._config.data.binarize == 'dynamic':
      images = loading.binarize(originals)
    reconstructions = _reconstructions(self._model, variables, images)

    def draw():
      pairs = figures.side_by_side(originals, reconstructions)
      return {
        'samples': figures.image_grid(samples, columns),
        'reconstructions': figures.image_grid(pairs, columns),
      }

    return draw


class Population(Trainer):
  """Runs in one compiled program, one on each of the first local devices.

  Members share the model's shapes, the data and the batch size, and differ in
  `FREE_KEYS`. If a member's latent dimension is less than the largest, its
  parameters are padded with zeros, which get no gradient and stay 0, and z is
  masked: the padding has mean and log variance 0 and a KL of 0. Each member is
  the run that it would be by itself. Each has the whole of its batches, so that
  nothing is communicated.
  """

  def __init__(self, configs, data: splits.DataSet, latent_dim=None):
    """Makes the states before the first step; compiles nothing yet.

    Populations that pad to the same `latent_dim`, by default the largest there
    is, share a program.
    """
    self._configs, self._config, self._data = configs, configs[0], data
    self._topology = devices.Topology()
    self.num_runs = len(configs)
    # Members of one seed see the same images with the same noise.
    self._one_seed = len({c.seed for c in configs}) == 1
    self._programs = [
      steps.program_from_config(c, data.train.num_examples, axis_name=None)
      for c in configs
    ]
    if latent_dim is None:
      latent_dim = max(c.model.get('latent_dim', 0) for c in configs)
    wide = configs[0].copy_and_resolve_references()
    if 'latent_dim' in wide.model:
      wide.model.latent_dim = latent_dim
    self._program = steps.program_from_config(
      wide, data.train.num_examples, axis_name=None
    )
    settings = [steps.settings_from_config(c) for c in configs]
    self._settings = devices.shard(_stack(settings))
    self._train_key = self._keys(numerics.train_key)
    self._eval_key = self._keys(numerics.eval_key)
    self._train_steps, self._eval_steps = _over_members(
      self._program, self._one_seed, self.num_runs
    )
    states = [
      steps.create_state(program, c.seed)
      for program, c in zip(self._programs, configs, strict=True)
    ]
    self._first_states = states
    self._place(states)
    self.num_parameters = sum(map(steps.num_parameters, states))
    self.step, self.is_validated = 0, False

  def _place(self, states: Iterable[steps.TrainState]) -> None:
    target = steps.abstract_state(self._program)
    padded = []
    for state, own in zip(states, self._programs, strict=True):
      state = loading.pad(jax.device_get(state), target)
      mask = loading.padding_mask(own.model, self._program.model)
      if mask:
        shapes = steps.abstract_state(own).params
        mask['padding'][steps.SIZES] = jax.tree.map(_sizes, shapes)
      padded.append(state.replace(collections=state.collections | mask))
    self._state = devices.shard(_stack(padded))

  def _keys(self, key_of_seed: Callable[[int], jax.Array]) -> jax.Array:
    if self._one_seed:
      return key_of_seed(self._config.seed)
    keys = [jax.random.key_data(key_of_seed(c.seed)) for c in self._configs]
    return numerics.wrap(devices.shard(np.stack(keys)))

  def restore(self, saved: Sequence[Checkpoints]) -> None:
    """See `Trainer.restore`."""
    found = [
      checkpoints.restore_last(steps.abstract_state(program))
      for checkpoints, program in zip(saved, self._programs, strict=True)
    ]
    restored = [r for r in found if r is not None]
    at = {0 if r is None else int(r.state.step) for r in found}
    if len(at) > 1:
      raise UserError(
        'the last checkpoints are of different steps: '
        f'{", ".join(map(str, sorted(at)))}.'
      )
    (self.step,) = at
    if self.step:
      self._place([r.state for r in restored])
      self.is_validated = all(r.metrics for r in restored)
    elif self._config.init_from:
      self._place(
        loading.start_from(self._config.init_from, state)
        for state in self._first_states
      )
    del self._first_states

  def train_chunks(
    self, epoch: int, first_step: int, max_steps: int | None = None
  ) -> Iterator[splits.Chunk]:
    """The rest of an epoch, in chunks of batches [max_steps, batch, …].

    Members of different seeds have their own, [num_runs, max_steps, batch, …].
    """
    by_seed = {
      c.seed: self._train_chunks(c.seed, epoch, first_step, max_steps)
      for c in self._configs
    }
    for chunks in zip(*by_seed.values(), strict=True):
      batches = {s: c.batches[0] for s, c in zip(by_seed, chunks, strict=True)}
      together = batches[self._config.seed]
      if not self._one_seed:
        together = np.stack([batches[c.seed] for c in self._configs])
      yield splits.Chunk(together, chunks[0].num_batches)

  def eval_chunks(self) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split; batches are [max_batches, batch, …]."""
    for chunk, start in super().eval_chunks():
      yield splits.Chunk(chunk.batches[0], chunk.num_batches), start

  def by_run(self, metrics: steps.Metrics) -> dict[str, np.ndarray]:
    """Waits for results of `train` or `evaluate`; [num_runs, max_steps]."""
    return jax.device_get(metrics)

  def states(self, snapshot: steps.TrainState) -> list[steps.TrainState]:
    """The state of each run in a snapshot, as it would be by itself."""
    together = jax.device_get(snapshot)
    others = dict(together.collections)
    others.pop('padding', None)
    together = together.replace(collections=others)

    def cut(member, program):
      return jax.tree.map(
        lambda a, own: a[member][tuple(map(slice, own.shape))],
        together,
        steps.abstract_state(program),
      )

    return [cut(*member) for member in enumerate(self._programs)]

  def draw(self, originals: np.ndarray, columns: int) -> None:
    """No pictures: a sweep shows its runs side by side."""


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


def _sizes(array: jax.ShapeDtypeStruct) -> np.ndarray:
  return np.array(array.shape or (1,), np.int32)


def _stack(members: Sequence[Any]) -> Any:
  """Arrays [num_runs, …] of a tree of each member."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


@functools.lru_cache(maxsize=8)
def _over_members(program, one_seed, num_runs):
  """Both loops of `vae.steps`, with a member on each of the first devices."""
  by_seed = None if one_seed else 0
  members = jax.local_devices()[:num_runs]
  pmap = functools.partial(jax.pmap, axis_name=devices.AXIS, devices=members)
  train_steps = pmap(
    functools.partial(steps.train_loop, program),
    # State, settings, key, stored images, batches, their number.
    in_axes=(0, 0, by_seed, None, by_seed, None),
    donate_argnums=0,
  )
  eval_steps = pmap(
    functools.partial(steps.eval_loop, program),
    # Variables, settings, key; all members see the same images.
    in_axes=(0, 0, by_seed, *[None] * 5),
  )
  return train_steps, eval_steps
