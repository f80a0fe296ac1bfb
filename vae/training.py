"""The training step and the evaluation step, over all devices.

Both are pure functions, compiled and sharded with `jax.pmap`: the state is
replicated, the batch is split in order over the devices. Every random draw is
a function of (seed, step, position in the global batch) alone, and BatchNorm
sees the global batch, so that the number of devices changes nothing but
rounding. What a run chooses as a number, and not as a shape, is an argument of
the compiled program: runs that differ in nothing else share it.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from vae import devices
from vae import numerics
from vae import objective as objectives
from vae import optimizers
from vae import randomness
from vae import splits
from vae.model import VAE
from vae.objective import Objective
from vae.optimizers import OptimizerFactory

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
  """All that changes while training, and so all that a checkpoint holds.

  Attributes:
    step: number of updates made, int32 scalar.
    params: the model's parameters.
    batch_stats: BatchNorm's running statistics.
    opt_state: the optimiser's state.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` wants."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


@struct.dataclass
class Settings:
  """What a run chooses, beyond the program that it shares with others.

  Attributes:
    objective: what to minimise.
    learning_rate: of the first epoch; a number, or [] of the model's floats.
    latent_mask: [latent_dim], 1 for the dimensions that draw noise, 0 for
      those that are padding (`vae.population`); None where none is.
  """

  objective: Objective
  learning_rate: float | jax.Array
  latent_mask: jax.Array | None = None


def settings_from_config(config, model: VAE) -> Settings:
  """The settings of a config, in the precision that its model computes in."""
  objective = objectives.from_config(config)
  number = np.dtype(float_dtype(model)).type
  return Settings(
    objective.replace(beta=number(objective.beta)),
    number(config.optimizer.learning_rate),
  )


@functools.lru_cache(maxsize=64)
def abstract_state(model: VAE, optimizer: OptimizerFactory) -> TrainState:
  """Shapes and dtypes of a state, which a checkpoint is restored into."""
  with numerics.fixed(model.dtype):
    variables = _make_init(model).eval_shape(randomness.init_key(0))
    return jax.eval_shape(lambda v: _first_state(optimizer, v), variables)


def create_state(
  model: VAE, optimizer: OptimizerFactory, seed: int
) -> TrainState:
  """The state before the first step, a function of the seed alone."""
  with numerics.fixed(model.dtype):
    variables = _make_init(model)(randomness.init_key(seed))
    return devices.replicate(_first_state(optimizer, variables))


@functools.lru_cache(maxsize=64)
def _make_init(model: VAE) -> Callable[[jax.Array], dict[str, Any]]:
  images = jnp.zeros((1, *model.image_shape))
  # Run once, so on a CPU, where optimising it takes seconds, it is not.
  options = (
    {'xla_backend_optimization_level': 0}
    if jax.default_backend() == 'cpu'
    else None
  )
  return jax.jit(lambda key: model.init(key, images), compiler_options=options)


def _first_state(optimizer: OptimizerFactory, variables) -> TrainState:
  params = variables['params']
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    # No optimiser's first state depends on its learning rate.
    opt_state=optimizer(0.0).init(params),
  )


def num_parameters(state: TrainState) -> int:
  """Of the model."""
  return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def to_unit_range(images: jax.Array, dtype: Any) -> jax.Array:
  """uint8 images as numbers in [0, 1]."""
  return images.astype(dtype) / 255


def train_step(
  model: VAE,
  optimizer: OptimizerFactory,
  flip: bool,
  skip_nonfinite: bool,
  state: TrainState,
  settings: Settings,
  key: jax.Array,
  images: jax.Array,
) -> tuple[TrainState, Metrics]:
  """One update, on one device of the pmap axis `model.axis_name`.

  Args:
    model: where it has no `axis_name`, the device has the whole batch.
    optimizer: that `state.opt_state` belongs to.
    flip: whether each image is mirrored with probability ½.
    skip_nonfinite: whether a step whose loss or gradient is not finite is left
      out: it counts, for the learning rate's schedule too, and changes nothing
      else.
    state: the same on every device.
    settings: likewise.
    key: `randomness.train_key`, the same on every device.
    images: uint8 [per_device_batch, height, width, channels]; this device's
      part of the global batch.

  Returns:
    The new state and the metrics, means over the global batch, with the norm
    of their gradient before it is clipped; the same on every device. With
    `skip_nonfinite` also whether the step was `skipped`, 0 or 1.
  """
  objective = settings.objective
  positions = randomness.global_positions(model.axis_name, len(images))
  flip_keys, noise_keys, z_keys = _keys(
    jax.random.fold_in(key, state.step), positions
  )

  images = to_unit_range(images, float_dtype(model))
  if flip:
    mirrored = randomness.uniform(flip_keys, ()) < 0.5
    images = jnp.where(
      mirrored[:, None, None, None], images[:, :, ::-1], images
    )
  inputs = images
  if objective.input_noise:
    noise = randomness.normal(noise_keys, images.shape[1:])
    inputs = images + objective.input_noise * noise
  epsilon = _epsilon(z_keys, model, settings)

  def loss_fn(params):
    variables = {'params': params, 'batch_stats': state.batch_stats}
    terms, updates = nn.apply(objectives.terms, model, mutable='batch_stats')(
      variables, objective, images, inputs, epsilon, train=True
    )
    means = jax.tree.map(jnp.mean, terms)
    return means['loss'], (means, updates.get('batch_stats', {}))

  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  grads, metrics = devices.mean_over((grads, metrics), model.axis_name)
  metrics['grad_norm'] = optax.tree.norm(grads)
  updates, opt_state = optimizer(settings.learning_rate).update(
    grads, state.opt_state, state.params
  )
  new_state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  if skip_nonfinite:
    is_finite = jnp.isfinite(metrics['loss'] + metrics['grad_norm'])
    metrics['skipped'] = 1 - is_finite.astype(metrics['loss'].dtype)
    skipped = state.replace(
      step=new_state.step,
      opt_state=optimizers.advance_schedule(state.opt_state, opt_state),
    )
    new_state = jax.tree.map(
      lambda new, old: jnp.where(is_finite, new, old), new_state, skipped
    )
  return new_state, metrics


def train_loop(
  model: VAE,
  optimizer: OptimizerFactory,
  flip: bool,
  skip_nonfinite: bool,
  state: TrainState,
  settings: Settings,
  key: jax.Array,
  stored: jax.Array | None,
  batches: jax.Array,
  num_steps: jax.Array,
) -> tuple[TrainState, Metrics]:
  """Several updates, as `train_step` makes them.

  The loop runs as many steps as it is told, up to what its buffer holds: an
  epoch's shorter last chunk needs no second program, and how the steps are
  cut into dispatches cannot change their bits. (`lax.scan` lowers to the same
  loop, but with a fixed length.)

  Args:
    model: as of `train_step`.
    optimizer: likewise.
    flip: likewise.
    skip_nonfinite: likewise.
    state: likewise.
    settings: likewise.
    key: likewise.
    stored: uint8 [num_examples, 8·k, 128] (`vae.tiles`), or None.
    batches: [max_steps, per_device_batch, …], images or, with `stored`,
      indices of its images.
    num_steps: how many of the steps to run.

  Returns:
    The new state and the metrics of each step, [max_steps]; zero beyond
    `num_steps`.
  """

  def step(state, index):
    images = _images(model, stored, batches, index)
    return train_step(
      model, optimizer, flip, skip_nonfinite, state, settings, key, images
    )

  def body(index, carry):
    state, metrics = carry
    state, values = step(state, index)
    return state, _set(metrics, index, values)

  shapes = jax.eval_shape(lambda: step(state, 0)[1])
  carry = (state, _buffers(shapes, len(batches)))
  return lax.fori_loop(0, num_steps, body, carry)


@functools.lru_cache(maxsize=8)
def make_train_steps(
  model: VAE,
  optimizer: OptimizerFactory,
  flip: bool,
  skip_nonfinite: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Compiles several training steps into one dispatch over all devices.

  Args:
    model: with `axis_name=AXIS`.
    optimizer: as of `train_step`.
    flip: likewise.
    skip_nonfinite: likewise.

  Returns:
    `train_loop`, a function of its arguments from `state` on: `state` is
    donated; `batches` are [devices, max_steps, per_device_batch, …]
    (`splits.Chunk`), all else is the same on every device. Asked again, it is
    the same function, and not compiled again.
  """
  return jax.pmap(
    functools.partial(train_loop, model, optimizer, flip, skip_nonfinite),
    axis_name=model.axis_name,
    in_axes=(None, None, None, None, 0, None),
    out_axes=None,
    donate_argnums=0,
  )


def eval_loop(
  model: VAE,
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
    model: as of `train_step`.
    variables: parameters and statistics.
    settings: likewise.
    key: `randomness.eval_key`.
    stored: as of `train_loop`.
    batches: likewise.
    num_steps: likewise.
    start: position in the split of the first batch's first example.
    num_examples: size of the split; what lies beyond it is padding.

  Returns:
    The sums of the metrics over each batch's examples, [max_steps]; zero
    beyond `num_steps`. z is drawn as in training, by each example's position
    in the split.
  """
  axis_name = model.axis_name
  batch_size = batches.shape[1] * devices.axis_size(axis_name)

  def step(index):
    images = _images(model, stored, batches, index)
    positions = start + index * batch_size
    positions += randomness.global_positions(axis_name, len(images))
    *_, z_keys = _keys(key, positions)
    images = to_unit_range(images, float_dtype(model))
    epsilon = _epsilon(z_keys, model, settings)
    terms = nn.apply(objectives.terms, model)(
      variables, settings.objective, images, images, epsilon, train=False
    )
    counts = positions < num_examples
    return jax.tree.map(lambda t: jnp.sum(jnp.where(counts, t, 0)), terms)

  def body(index, sums):
    return _set(sums, index, step(index))

  buffers = _buffers(jax.eval_shape(lambda: step(0)), len(batches))
  sums = lax.fori_loop(0, num_steps, body, buffers)
  return sums if axis_name is None else lax.psum(sums, axis_name)


@functools.lru_cache(maxsize=8)
def make_eval_steps(model: VAE) -> Callable[..., Metrics]:
  """Compiles the evaluation of several batches over all devices.

  Returns:
    `eval_loop`, a function of its arguments from `variables` on; `batches`
    are [devices, max_steps, per_device_batch, …]. Asked again, it is the same
    function.
  """
  return jax.pmap(
    functools.partial(eval_loop, model),
    axis_name=model.axis_name,
    in_axes=(None, None, None, None, 0, None, None, None),
    out_axes=None,
  )


def _images(
  model: VAE,
  stored: jax.Array | None,
  batches: jax.Array,
  index: jax.Array | int,
) -> jax.Array:
  """A batch of those of a chunk, or the stored images that it names."""
  batch = lax.dynamic_index_in_dim(batches, index, keepdims=False)
  if stored is None:
    return batch
  named = stored.at[batch].get(mode='promise_in_bounds')
  return splits.unpack_tiles(named, model.image_shape)


def _buffers(shapes: Any, length: int) -> Any:
  """Zeros of `shapes`, so many times."""
  return jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), shapes)


def _set(buffers: Any, index: jax.Array, values: Any) -> Any:
  return jax.tree.map(lambda b, v: b.at[index].set(v), buffers, values)


@jax.jit
def snapshot(state: TrainState) -> TrainState:
  """A copy on the devices, that outlives the donation of the state."""
  return jax.tree.map(jnp.copy, state)


def float_dtype(model: VAE) -> Any:
  """Of images and losses: float32, or float64 where the model computes so."""
  return jnp.promote_types(model.dtype, jnp.float32)


def _keys(key: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
  """Of each example, for its flip, its input noise and its z; [batch] each."""
  keys = randomness.split(randomness.example_keys(key, positions), 3)
  return keys[:, 0], keys[:, 1], keys[:, 2]


def _epsilon(
  keys: jax.Array, model: VAE, settings: Settings
) -> jax.Array | None:
  """Noise of the reparameterization, [num_samples, batch, latent_dim].

  The first dimensions' noise does not depend on how many there are: JAX draws
  an array in the order in which its elements lie.
  """
  if not settings.objective.sample_posterior:
    return None
  num_samples = settings.objective.num_samples
  draws = randomness.normal(keys, (model.latent_dim, num_samples))
  if settings.latent_mask is not None:
    draws *= settings.latent_mask[:, None]
  return jnp.moveaxis(draws, -1, 0)
