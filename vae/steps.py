"""The training step and the evaluation step, over all devices.

Both are pure functions, compiled and sharded with `jax.pmap`: the state is
replicated, the batch is split in order over the devices. Every random draw is
a function of (seed, step, position in the global batch) alone, and statistics
are those of the global batch, so that the number of devices changes nothing but
rounding. Numbers of a run that change no shapes are arguments of the program.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from vae import (
  conditioning,
  devices,
  models,
  numerics,
  objectives,
  optimizers,
  padding,
  splits,
)
from vae.optimizers import Optimizer

Metrics = dict[str, jax.Array]

AVERAGED = 'averaged'  # The collection of the parameters' moving average.


@struct.dataclass
class TrainState:
  """All that changes while training, and so all that a checkpoint holds."""

  step: jax.Array  # Number of updates made, an int32 scalar.
  params: Any
  # The model's other Flax collections, such as BatchNorm's statistics.
  collections: dict[str, Any]
  opt_state: Any

  @property
  def variables(self) -> dict[str, Any]:
    """All collections, for `model.apply`, with averaged parameters if any."""
    others = dict(self.collections)
    params = others.pop(AVERAGED, self.params)
    return {'params': params, **others}


@dataclasses.dataclass(frozen=True)
class Program:
  """The part of a run that is compiled in.

  Attributes:
    model: its `axis_name` is the pmap axis that shares a batch, or None.
    optimizer: without its learning rate.
    flip: whether each image is mirrored with probability ½.
    skip_nonfinite: whether a step whose loss or gradient is not finite counts,
      for the learning rate's schedule too, and changes nothing else.
    num_train_examples: size of the training split.
    critic: the objective's own network, and the shape of its input, if any.
    average_decay: of the parameters' moving average, by which the model is
      validated and used; 0 for none.
    binarize: whether each pixel is drawn black or white in each step.
  """

  model: nn.Module
  optimizer: Optimizer = Optimizer()
  flip: bool = False
  skip_nonfinite: bool = False
  num_train_examples: int = 1
  critic: tuple[nn.Module, tuple[int, ...]] | None = None
  average_decay: float = 0.0
  binarize: bool = False


@struct.dataclass
class Settings:
  """The part of a run that is an argument of the compiled program."""

  objective: Any
  learning_rate: float | jax.Array  # Of the first epoch.


def program_from_config(
  config, num_train_examples: int, axis_name: str | None = devices.AXIS
) -> Program:
  """The program of a complete config."""
  steps_per_epoch = num_train_examples // config.train.batch_size
  model = models.from_config(config, axis_name)
  return Program(
    model,
    optimizers.from_config(config, steps_per_epoch),
    config.train.flip,
    config.train.on_nonfinite == 'skip',
    num_train_examples,
    objectives.critic(config, model),
    config.optimizer.average_decay,
    config.data.binarize == 'dynamic',
  )


def settings_from_config(config) -> Settings:
  """The settings of a config, as numbers of the model's precision."""
  objective = objectives.from_config(config)
  settings = Settings(objective, config.optimizer.learning_rate)
  dtype = np.dtype(float_dtype(models.from_config(config))).type
  return jax.tree.map(dtype, settings)


@functools.lru_cache(maxsize=64)
def abstract_state(program: Program) -> TrainState:
  """Shapes and dtypes of a state, which a checkpoint is restored into."""
  with numerics.fixed(float_dtype(program.model)):
    return jax.eval_shape(_make_first_state(program), numerics.init_key(0))


def create_state(program: Program, seed: int) -> TrainState:
  """The state before the first step, a function of the seed alone."""
  with numerics.fixed(float_dtype(program.model)):
    first_state = _make_first_state(program)
    return devices.replicate(first_state(numerics.init_key(seed)))


@functools.lru_cache(maxsize=64)
def _make_first_state(program: Program) -> Callable[[jax.Array], TrainState]:
  def first_state(key):
    model = program.model
    collections = dict(model.init(key, jnp.zeros((1, *model.image_shape))))
    params = collections.pop('params')
    if program.critic is not None:
      network, shape = program.critic
      own = network.init(jax.random.fold_in(key, 1), jnp.zeros((1, *shape)))
      params = {**params, 'critic': own['params']}
    if program.average_decay:
      collections[AVERAGED] = params
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      collections=collections,
      # No optimiser's first state depends on its learning rate.
      opt_state=program.optimizer(0.0).init(params),
    )

  # Optimising what runs once takes seconds.
  on_cpu = {'xla_backend_optimization_level': 0}
  is_cpu = jax.default_backend() == 'cpu'
  return jax.jit(first_state, compiler_options=on_cpu if is_cpu else {})


def num_parameters(state: TrainState) -> int:
  """Number of the model's parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def to_unit_range(images: jax.Array, dtype: Any) -> jax.Array:
  """uint8 images as numbers in [0, 1]."""
  return images.astype(dtype) / 255


def float_dtype(model: nn.Module) -> Any:
  """The dtype of images and losses: float32, or float64 for such a model."""
  return jnp.promote_types(getattr(model, 'dtype', 'float32'), jnp.float32)


def train_step(
  program: Program,
  state: TrainState,
  settings: Settings,
  key: jax.Array,
  examples: splits.Examples,
) -> tuple[TrainState, Metrics]:
  """One update, on one device of the pmap axis `model.axis_name`.

  The arguments are the same on every device, but for `examples`, its part of
  the global batch, uint8 [per_device_batch, height, width, channels].

  Returns:
    The new state and the metrics, means over the global batch, with the norm
    of their gradient before it is clipped; the same on every device. With
    `skip_nonfinite` also whether the step was `skipped`, 0 or 1.
  """
  model, optimizer = program.model, program.optimizer
  images, labels = examples
  positions = numerics.global_positions(model.axis_name, len(images))
  batch = _make_batch(
    *(program, jax.random.fold_in(key, state.step), positions, images),
    mask=jnp.ones(len(images), bool),
    epoch=state.step / optimizer.steps_per_epoch,
    train=True,
  )

  def loss_fn(params):
    mutable = [name for name in state.collections if name != AVERAGED]
    apply = nn.apply(settings.objective.__call__, model, mutable=mutable)
    # The parameters themselves are trained, not their average.
    given = conditioning.given({**state.variables, 'params': params}, labels)
    values, collections = apply(given, batch)
    objectives.check_values(settings.objective, values, len(images))
    means = jax.tree.map(jnp.mean, values)
    return means['loss'], (means, collections)

  grads, (metrics, collections) = jax.grad(loss_fn, has_aux=True)(state.params)
  grads, metrics = devices.mean_over((grads, metrics), model.axis_name)
  grads = padding.cut(grads, state.collections)
  metrics['grad_norm'] = optax.tree.norm(grads)
  updates, opt_state = optimizer(settings.learning_rate).update(
    grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  if program.average_decay:
    collections[AVERAGED] = optimizers.moved_average(
      program.average_decay, state.collections[AVERAGED], params, state.step
    )
  new_state = TrainState(state.step + 1, params, collections, opt_state)
  if program.skip_nonfinite:
    new_state = _skip_nonfinite(state, new_state, metrics)
  return new_state, metrics


def _make_batch(
  program: Program, key, positions, images, *, mask, epoch, train: bool
) -> objectives.Batch:
  """The uint8 images as the objective sees them, flipped in training."""
  keys = numerics.split(numerics.example_keys(key, positions), 4)
  flip_keys, noise_keys, z_keys, pixel_keys = jnp.moveaxis(keys, 1, 0)
  images = to_unit_range(images, float_dtype(program.model))
  if train and program.flip:
    mirrored = numerics.uniform(flip_keys, ()) < 0.5
    images = jnp.where(
      mirrored[:, None, None, None], images[:, :, ::-1], images
    )
  if program.binarize:
    images = numerics.bernoulli(pixel_keys, images)
  return objectives.Batch(
    images=images,
    mask=mask,
    keys=z_keys,
    noise_keys=noise_keys,
    epoch=epoch,
    train=train,
    num_train_examples=program.num_train_examples,
    axis_name=program.model.axis_name,
  )


def _skip_nonfinite(
  state: TrainState, new_state: TrainState, metrics: Metrics
) -> TrainState:
  """The new state, or the old with its counts advanced; adds `skipped`."""
  is_finite = jnp.isfinite(metrics['loss'] + metrics['grad_norm'])
  metrics['skipped'] = 1 - is_finite.astype(metrics['loss'].dtype)
  skipped = dataclasses.replace(
    state,
    step=new_state.step,
    opt_state=optimizers.advance_schedule(state.opt_state, new_state.opt_state),
  )
  choose = functools.partial(jnp.where, is_finite)
  return jax.tree.map(choose, new_state, skipped)


def train_loop(
  program: Program,
  state: TrainState,
  settings: Settings,
  key: jax.Array,
  stored: jax.Array | None,
  batches: splits.Examples,
  num_steps: jax.Array,
) -> tuple[TrainState, Metrics]:
  """The updates of a chunk of batches, as `train_step` makes them.

  `batches` [max_steps, per_device_batch, …] have images or, with `stored`
  images [num_examples, 8·k, 128] (`vae.splits`), their indices.

  Returns:
    The new state and the metrics of each step, [max_steps]; zero beyond
    `num_steps`.
  """

  def step(state, index):
    examples = _examples(program.model, stored, batches, index)
    return train_step(program, state, settings, key, examples)

  return _loop(step, state, len(batches.images), num_steps)


@functools.lru_cache(maxsize=8)
def make_train_steps(
  program: Program,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """`train_loop` over all devices, a function of its arguments from `state` on.

  `state` is donated; `batches` are [devices, max_steps, per_device_batch, …]
  (`splits.Chunk`), all else is the same on every device.
  """
  return jax.pmap(
    functools.partial(train_loop, program),
    axis_name=devices.AXIS,
    in_axes=(None, None, None, None, 0, None),
    out_axes=None,
    donate_argnums=0,
  )


def eval_loop(
  program: Program,
  variables: Any,
  settings: Settings,
  key: jax.Array,
  stored: jax.Array | None,
  batches: splits.Examples,
  num_steps: jax.Array,
  start: jax.Array,
  num_examples: jax.Array,
) -> Metrics:
  """The evaluation of a chunk of batches, on one device as `train_loop`.

  The first example has the position `start` in the split, which has
  `num_examples`; beyond them is padding. Draws are by the position, from
  `numerics.eval_key`. Returns the sums of the metrics over each batch's
  examples, [max_steps]; zero beyond `num_steps`.
  """
  model = program.model
  batch_size = batches.images.shape[1] * devices.axis_size(model.axis_name)

  def step(_, index):
    images, labels = _examples(model, stored, batches, index)
    positions = start + index * batch_size
    positions += numerics.global_positions(model.axis_name, len(images))
    mask = positions < num_examples
    batch = _make_batch(
      program, key, positions, images, mask=mask, epoch=jnp.inf, train=False
    )
    apply = nn.apply(settings.objective.__call__, model)
    values = apply(conditioning.given(variables, labels), batch)
    return None, jax.tree.map(lambda v: jnp.sum(jnp.where(mask, v, 0)), values)

  _, sums = _loop(step, None, len(batches.images), num_steps)
  return devices.sum_over(sums, model.axis_name)


@functools.lru_cache(maxsize=8)
def make_eval_steps(program: Program) -> jax.stages.Wrapped:
  """`eval_loop` over all devices, as `make_train_steps`; donates nothing."""
  return jax.pmap(
    functools.partial(eval_loop, program),
    axis_name=devices.AXIS,
    in_axes=(None, None, None, None, 0, None, None, None),
    out_axes=None,
  )


def _loop(step: Callable, state: Any, max_steps: int, num_steps: jax.Array):
  """Makes `num_steps` steps: (state, index) → (state, values).

  The values are in buffers of `max_steps`: an epoch's shorter last chunk needs
  no second program, and how the steps are cut into dispatches cannot change
  their bits. (`lax.scan` lowers to the same loop, but with a fixed length.)
  """
  shapes = jax.eval_shape(lambda: step(state, 0)[1])
  buffers = jax.tree.map(
    lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), shapes
  )

  def body(index, carry):
    state, values = step(carry[0], index)
    buffers = jax.tree.map(lambda b, v: b.at[index].set(v), carry[1], values)
    return state, buffers

  return lax.fori_loop(0, num_steps, body, (state, buffers))


def _examples(model: nn.Module, stored, batches, index) -> splits.Examples:
  """A batch of a chunk, with the stored images that it names."""
  pick = lambda rows: lax.dynamic_index_in_dim(rows, index, keepdims=False)
  batch = jax.tree.map(pick, batches)
  if stored is None:
    return batch
  named = stored.at[batch.images].get(mode='promise_in_bounds')
  return batch._replace(images=splits.unpack_tiles(named, model.image_shape))


@jax.jit
def snapshot(state: TrainState) -> TrainState:
  """A copy on the devices, that outlives the donation of the state."""
  return jax.tree.map(jnp.copy, state)
