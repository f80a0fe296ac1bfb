"""The training step and the evaluation step, over all devices.

Both are pure functions, compiled and sharded with `jax.pmap`: the state is
replicated, the batch is split in order over the devices. Every random draw is
a function of (seed, step, position in the global batch) alone, and statistics
are those of the global batch, so that the number of devices changes nothing but
rounding. Numbers that a run chooses, and no shapes, are arguments of the
compiled program: runs that differ in nothing else share it.
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
  devices,
  models,
  numerics,
  objectives,
  optimizers,
  randomness,
  splits,
)
from vae.optimizers import Optimizer

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
  """All that changes while training, and so all that a checkpoint holds.

  Attributes:
    step: number of updates made, int32 scalar.
    params: the model's parameters.
    collections: its other Flax collections, such as BatchNorm's statistics.
    opt_state: the optimiser's state.
  """

  step: jax.Array
  params: Any
  collections: dict[str, Any]
  opt_state: Any

  @property
  def variables(self) -> dict[str, Any]:
    """All collections, for `model.apply`."""
    return {'params': self.params, **self.collections}


@dataclasses.dataclass(frozen=True)
class Program:
  """The part of a run that is compiled in.

  Attributes:
    model: with the `axis_name` of the pmap axis that shares a batch; None if a
      device has the whole batch.
    optimizer: without its learning rate.
    flip: whether each image is mirrored with probability ½.
    skip_nonfinite: whether a step whose loss or gradient is not finite is left
      out: it counts, for the learning rate's schedule too, and changes nothing
      else.
    num_train_examples: size of the training split.
  """

  model: nn.Module
  optimizer: Optimizer = Optimizer()
  flip: bool = False
  skip_nonfinite: bool = False
  num_train_examples: int = 1


@struct.dataclass
class Settings:
  """The part of a run that is an argument of the compiled program.

  Attributes:
    objective: to be minimised.
    learning_rate: of the first epoch, a scalar.
  """

  objective: Any
  learning_rate: float | jax.Array


def program_from_config(
  config, num_train_examples: int, axis_name: str | None = devices.AXIS
) -> Program:
  """The program of a complete config."""
  return Program(
    models.from_config(config, axis_name),
    optimizers.from_config(
      config, num_train_examples // config.train.batch_size
    ),
    config.train.flip,
    config.train.on_nonfinite == 'skip',
    num_train_examples,
  )


def settings_from_config(config) -> Settings:
  """The settings of a config, as numbers of the model's precision."""
  settings = Settings(
    objectives.from_config(config), config.optimizer.learning_rate
  )
  dtype = np.dtype(float_dtype(models.from_config(config))).type
  return jax.tree.map(dtype, settings)


@functools.lru_cache(maxsize=64)
def abstract_state(program: Program) -> TrainState:
  """Shapes and dtypes of a state, which a checkpoint is restored into."""
  with numerics.fixed(float_dtype(program.model)):
    variables = jax.eval_shape(
      _make_init(program.model), randomness.init_key(0)
    )
    return jax.eval_shape(
      lambda v: _first_state(program.optimizer, v), variables
    )


def create_state(program: Program, seed: int) -> TrainState:
  """The state before the first step, a function of the seed alone."""
  with numerics.fixed(float_dtype(program.model)):
    variables = _make_init(program.model)(randomness.init_key(seed))
    return devices.replicate(_first_state(program.optimizer, variables))


@functools.lru_cache(maxsize=64)
def _make_init(model: nn.Module) -> Callable[[jax.Array], dict[str, Any]]:
  images = jnp.zeros((1, *model.image_shape))
  # Run once, so on a CPU, where optimising it takes seconds, it is not.
  options = (
    {'xla_backend_optimization_level': 0}
    if jax.default_backend() == 'cpu'
    else None
  )
  return jax.jit(lambda key: model.init(key, images), compiler_options=options)


def _first_state(optimizer: Optimizer, variables) -> TrainState:
  collections = dict(variables)
  params = collections.pop('params')
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    collections=collections,
    # No optimiser's first state depends on its learning rate.
    opt_state=optimizer(0.0).init(params),
  )


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
  images: jax.Array,
) -> tuple[TrainState, Metrics]:
  """One update, on one device of the pmap axis `model.axis_name`.

  Args:
    program: the same on every device, as are the next three.
    state: before the update.
    settings: of the run.
    key: `randomness.train_key`.
    images: uint8 [per_device_batch, height, width, channels]; this device's
      part of the global batch.

  Returns:
    The new state and the metrics, means over the global batch, with the norm
    of their gradient before it is clipped; the same on every device. With
    `skip_nonfinite` also whether the step was `skipped`, 0 or 1.
  """
  model, optimizer = program.model, program.optimizer
  positions = randomness.global_positions(model.axis_name, len(images))
  flip_keys, noise_keys, z_keys = _keys(
    jax.random.fold_in(key, state.step), positions
  )
  images = to_unit_range(images, float_dtype(model))
  if program.flip:
    mirrored = randomness.uniform(flip_keys, ()) < 0.5
    images = jnp.where(
      mirrored[:, None, None, None], images[:, :, ::-1], images
    )
  batch = objectives.Batch(
    images=images,
    mask=jnp.ones(len(images), bool),
    keys=z_keys,
    noise_keys=noise_keys,
    epoch=state.step / optimizer.steps_per_epoch,
    train=True,
    num_train_examples=program.num_train_examples,
    axis_name=model.axis_name,
  )

  def loss_fn(params):
    values, collections = nn.apply(
      settings.objective.__call__, model, mutable=list(state.collections)
    )({'params': params, **state.collections}, batch)
    means = jax.tree.map(jnp.mean, values)
    return means['loss'], (means, collections)

  grads, (metrics, collections) = jax.grad(loss_fn, has_aux=True)(state.params)
  grads, metrics = devices.mean_over((grads, metrics), model.axis_name)
  metrics['grad_norm'] = optax.tree.norm(grads)
  updates, opt_state = optimizer(settings.learning_rate).update(
    grads, state.opt_state, state.params
  )
  new_state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    collections=collections,
    opt_state=opt_state,
  )
  if program.skip_nonfinite:
    is_finite = jnp.isfinite(metrics['loss'] + metrics['grad_norm'])
    metrics['skipped'] = 1 - is_finite.astype(metrics['loss'].dtype)
    skipped = dataclasses.replace(
      state,
      step=new_state.step,
      opt_state=optimizers.advance_schedule(state.opt_state, opt_state),
    )
    new_state = jax.tree.map(
      lambda new, old: jnp.where(is_finite, new, old), new_state, skipped
    )
  return new_state, metrics


def train_loop(
  program: Program,
  state: TrainState,
  settings: Settings,
  key: jax.Array,
  stored: jax.Array | None,
  batches: jax.Array,
  num_steps: jax.Array,
) -> tuple[TrainState, Metrics]:
  """Several updates, as `train_step` makes them.

  The loop runs `num_steps` steps, up to the size of its buffer: an epoch's
  shorter last chunk needs no second program, and how the steps are cut into
  dispatches cannot change their bits. (`lax.scan` lowers to the same loop, but
  with a fixed length.)

  Args:
    program: as for `train_step`, like the next three.
    state: before the first update.
    settings: as for `train_step`.
    key: as for `train_step`.
    stored: uint8 [num_examples, 8·k, 128] (`vae.splits`), or None.
    batches: [max_steps, per_device_batch, …], images or, with `stored`,
      indices of its images.
    num_steps: how many of the steps to run.

  Returns:
    The new state and the metrics of each step, [max_steps]; zero beyond
    `num_steps`.
  """

  def step(state, index):
    images = _images(program.model, stored, batches, index)
    return train_step(program, state, settings, key, images)

  def body(index, carry):
    state, values = step(carry[0], index)
    return state, _set(carry[1], index, values)

  shapes = jax.eval_shape(lambda: step(state, 0)[1])
  carry = (state, _buffers(shapes, len(batches)))
  return lax.fori_loop(0, num_steps, body, carry)


@functools.lru_cache(maxsize=8)
def make_train_steps(
  program: Program,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """`train_loop` over all devices, a function of its arguments from `state` on.

  `state` is donated; `batches` are [devices, max_steps, per_device_batch, …]
  (`splits.Chunk`), all else is the same on every device. The same program gives
  the same function, which is compiled once.
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
  batches: jax.Array,
  num_steps: jax.Array,
  start: jax.Array,
  num_examples: jax.Array,
) -> Metrics:
  """The evaluation of several batches, on one device as `train_loop`.

  Args:
    program: as for `train_step`.
    variables: parameters and other collections.
    settings: of the run.
    key: `randomness.eval_key`.
    stored: as for `train_loop`, like the next two.
    batches: [max_steps, per_device_batch, …].
    num_steps: how many of the batches to evaluate.
    start: position in the split of the first batch's first example.
    num_examples: size of the split; what lies beyond it is padding.

  Returns:
    The sums of the metrics over each batch's examples, [max_steps]; zero
    beyond `num_steps`. z is drawn as in training, by each example's position
    in the split.
  """
  model = program.model
  batch_size = batches.shape[1] * devices.axis_size(model.axis_name)

  def step(index):
    images = _images(model, stored, batches, index)
    positions = start + index * batch_size
    positions += randomness.global_positions(model.axis_name, len(images))
    _, noise_keys, z_keys = _keys(key, positions)
    batch = objectives.Batch(
      images=to_unit_range(images, float_dtype(model)),
      mask=positions < num_examples,
      keys=z_keys,
      noise_keys=noise_keys,
      epoch=jnp.inf,
      train=False,
      num_train_examples=program.num_train_examples,
      axis_name=model.axis_name,
    )
    values = nn.apply(settings.objective.__call__, model)(variables, batch)
    return jax.tree.map(lambda v: jnp.sum(jnp.where(batch.mask, v, 0)), values)

  def body(index, sums):
    return _set(sums, index, step(index))

  buffers = _buffers(jax.eval_shape(lambda: step(0)), len(batches))
  sums = lax.fori_loop(0, num_steps, body, buffers)
  return sums if model.axis_name is None else lax.psum(sums, model.axis_name)


@functools.lru_cache(maxsize=8)
def make_eval_steps(program: Program) -> Callable[..., Metrics]:
  """`eval_loop` over all devices, a function of `variables` and what follows.

  `batches` are [devices, max_steps, per_device_batch, …].
  """
  return jax.pmap(
    functools.partial(eval_loop, program),
    axis_name=devices.AXIS,
    in_axes=(None, None, None, None, 0, None, None, None),
    out_axes=None,
  )


def _images(
  model: nn.Module,
  stored: jax.Array | None,
  batches: jax.Array,
  index: jax.Array | int,
) -> jax.Array:
  """A batch of a chunk, or the stored images that it names."""
  batch = lax.dynamic_index_in_dim(batches, index, keepdims=False)
  if stored is None:
    return batch
  named = stored.at[batch].get(mode='promise_in_bounds')
  return splits.unpack_tiles(named, model.image_shape)


def _buffers(shapes: Any, length: int) -> Any:
  """Zeros [length, *shape] for each of `shapes`."""
  return jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), shapes)


def _set(buffers: Any, index: jax.Array, values: Any) -> Any:
  return jax.tree.map(lambda b, v: b.at[index].set(v), buffers, values)


@jax.jit
def snapshot(state: TrainState) -> TrainState:
  """A copy on the devices, that outlives the donation of the state."""
  return jax.tree.map(jnp.copy, state)


def _keys(key: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
  """Keys for each example's flip, input noise and z; [batch] each."""
  keys = randomness.split(randomness.example_keys(key, positions), 3)
  return keys[:, 0], keys[:, 1], keys[:, 2]
