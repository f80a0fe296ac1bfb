"""The training step and the evaluation step, over all devices.

Both are pure functions, compiled and sharded with `jax.pmap`: the state is
replicated, the batch is split in order over the devices. Every random draw is
a function of (seed, step, position in the global batch) alone, and BatchNorm
sees the global batch, so that the number of devices changes nothing but
rounding.
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
from vae import objective as objectives
from vae.devices import AXIS
from vae.model import VAE
from vae.objective import Objective

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


def learning_rate_schedule(config, steps_per_epoch: int) -> optax.Schedule:
  """`learning_rate · decay_per_epoch ** epoch`, constant within an epoch."""
  return optax.exponential_decay(
    config.optimizer.learning_rate,
    transition_steps=steps_per_epoch,
    decay_rate=config.optimizer.decay_per_epoch,
    staircase=True,
  )


def learning_rates(config, num_epochs: int) -> np.ndarray:
  """What the schedule says for each epoch, [num_epochs]."""
  schedule = learning_rate_schedule(config, steps_per_epoch=1)
  return np.asarray(jax.vmap(schedule)(np.arange(num_epochs)))


def make_optimizer(
  config, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Adam, with weight decay as an L2 penalty in the gradient.

  The article's optimiser decays so (Kingma & Ba 2015 with L2), not decoupled
  from the gradient as AdamW does.
  """
  return optax.chain(
    optax.add_decayed_weights(config.optimizer.weight_decay),
    optax.adam(schedule),
  )


def abstract_state(
  model: VAE, optimizer: optax.GradientTransformation
) -> TrainState:
  """Shapes and dtypes of a state, which a checkpoint is restored into."""
  images = jnp.zeros((1, *model.image_shape))
  return jax.eval_shape(
    lambda: _first_state(optimizer, model.init(jax.random.key(0), images))
  )


def create_state(
  model: VAE, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """The state before the first step, a function of the seed alone."""
  images = jnp.zeros((1, *model.image_shape))
  # Run once, so on a CPU, where optimising it takes seconds, it is not.
  options = (
    {'xla_backend_optimization_level': 0}
    if jax.default_backend() == 'cpu'
    else None
  )
  init = jax.jit(model.init, compiler_options=options)
  state = _first_state(optimizer, init(init_key(seed), images))
  return devices.replicate(state)


def _first_state(
  optimizer: optax.GradientTransformation, variables
) -> TrainState:
  params = variables['params']
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    opt_state=optimizer.init(params),
  )


def init_key(seed: int) -> jax.Array:
  """The key of the initial parameters."""
  return jax.random.fold_in(jax.random.key(seed), 0)


def train_key(seed: int) -> jax.Array:
  """The key that training folds with step and position."""
  return jax.random.fold_in(jax.random.key(seed), 1)


def eval_key(seed: int) -> jax.Array:
  """The key that evaluation folds with each example's position in its split."""
  return jax.random.fold_in(jax.random.key(seed), 2)


def sample_key(seed: int) -> jax.Array:
  """The key of the samples that are drawn at each validation."""
  return jax.random.fold_in(jax.random.key(seed), 3)


def measure_key(seed: int) -> jax.Array:
  """The key that measuring a trained model folds with each position."""
  return jax.random.fold_in(jax.random.key(seed), 4)


def bound_key(seed: int) -> jax.Array:
  """The same for the importance-weighted bound, whose draws are others."""
  return jax.random.fold_in(jax.random.key(seed), 5)


def to_unit_range(images: jax.Array, dtype: Any) -> jax.Array:
  """uint8 images as numbers in [0, 1]."""
  return images.astype(dtype) / 255


def train_step(
  model: VAE,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  flip: bool,
  state: TrainState,
  key: jax.Array,
  images: jax.Array,
) -> tuple[TrainState, Metrics]:
  """One update, on one device of the pmap axis `AXIS`.

  Args:
    model: with `axis_name=AXIS`.
    objective: what to minimise.
    optimizer: that `state.opt_state` belongs to.
    flip: whether each image is mirrored with probability ½.
    state: the same on every device.
    key: `train_key`, the same on every device.
    images: uint8 [per_device_batch, height, width, channels]; this device's
      part of the global batch.

  Returns:
    The new state and the metrics, means over the global batch; the same on
    every device.
  """
  per_device = images.shape[0]
  positions = lax.axis_index(AXIS) * per_device + jnp.arange(per_device)
  keys = _example_keys(jax.random.fold_in(key, state.step), positions)
  flip_keys, noise_keys, z_keys = keys[:, 0], keys[:, 1], keys[:, 2]

  images = to_unit_range(images, float_dtype(model))
  if flip:
    mirrored = jax.vmap(jax.random.bernoulli)(flip_keys)
    images = jnp.where(
      mirrored[:, None, None, None], images[:, :, ::-1], images
    )
  inputs = images
  if objective.input_noise:
    noise = _normal(noise_keys, images.shape[1:])
    inputs = images + objective.input_noise * noise
  epsilon = _epsilon(z_keys, model, objective)

  def loss_fn(params):
    variables = {'params': params, 'batch_stats': state.batch_stats}
    terms, updates = nn.apply(objectives.terms, model, mutable='batch_stats')(
      variables, objective, images, inputs, epsilon, train=True
    )
    means = jax.tree.map(jnp.mean, terms)
    return means['loss'], (means, updates.get('batch_stats', {}))

  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  grads, metrics = lax.pmean((grads, metrics), AXIS)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  return state, metrics


def make_train_steps(
  model: VAE,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  flip: bool,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Compiles several training steps into one dispatch over all devices.

  The loop runs as many steps as it is told, up to what its buffer holds: an
  epoch's shorter last chunk needs no second program, and how the steps are
  cut into dispatches cannot change their bits. (`lax.scan` lowers to the same
  loop, but with a fixed length.)

  Returns:
    A function of
      state: donated;
      key: `train_key`;
      stored: uint8 [num_examples, height, width, channels] on every device,
        or None;
      batches: [devices, max_steps, per_device_batch, …], images or, with
        `stored`, indices of its images (`splits.Chunk`);
      num_steps: how many of the steps to run;
    that returns the new state and the metrics of each step, [max_steps]; zero
    beyond `num_steps`.
  """
  step = functools.partial(train_step, model, objective, optimizer, flip)

  def steps(state, key, stored, batches, num_steps):
    def body(i, carry):
      state, metrics = carry
      state, values = step(state, key, _images(stored, batches, i))
      return state, _set(metrics, i, values)

    shapes = jax.eval_shape(
      lambda: step(state, key, _images(stored, batches, 0))[1]
    )
    carry = (state, _buffers(shapes, len(batches)))
    return lax.fori_loop(0, num_steps, body, carry)

  return jax.pmap(
    steps,
    axis_name=AXIS,
    in_axes=(None, None, None, 0, None),
    out_axes=None,
    donate_argnums=0,
  )


def make_eval_steps(model: VAE, objective: Objective) -> Callable[..., Metrics]:
  """Compiles the evaluation of several batches over all devices.

  Returns:
    A function of
      variables: parameters and statistics;
      key: `eval_key`;
      stored, batches, num_steps: as of `make_train_steps`;
      start: position in the split of the first batch's first example;
      num_examples: size of the split; what lies beyond it is padding;
    that returns the sums of the metrics over each batch's examples,
    [max_steps]; zero beyond `num_steps`. z is drawn as in training, by each
    example's position in the split.
  """

  def step(variables, key, images, start, num_examples):
    per_device = images.shape[0]
    positions = start + lax.axis_index(AXIS) * per_device
    positions += jnp.arange(per_device)
    z_keys = _example_keys(key, positions)[:, 2]
    images = to_unit_range(images, float_dtype(model))
    epsilon = _epsilon(z_keys, model, objective)
    terms = nn.apply(objectives.terms, model)(
      variables, objective, images, images, epsilon, train=False
    )
    counts = positions < num_examples
    return jax.tree.map(lambda t: jnp.sum(jnp.where(counts, t, 0)), terms)

  def steps(variables, key, stored, batches, num_steps, start, num_examples):
    batch_size = batches.shape[1] * lax.axis_size(AXIS)

    def body(i, sums):
      images = _images(stored, batches, i)
      first = start + i * batch_size
      return _set(sums, i, step(variables, key, images, first, num_examples))

    shapes = jax.eval_shape(
      lambda: step(variables, key, _images(stored, batches, 0), 0, 0)
    )
    sums = lax.fori_loop(0, num_steps, body, _buffers(shapes, len(batches)))
    return lax.psum(sums, AXIS)

  return jax.pmap(
    steps,
    axis_name=AXIS,
    in_axes=(None, None, None, 0, None, None, None),
    out_axes=None,
  )


def _images(
  stored: jax.Array | None, batches: jax.Array, index: jax.Array | int
) -> jax.Array:
  """A batch of those of a chunk, or the stored images that it names."""
  batch = lax.dynamic_index_in_dim(batches, index, keepdims=False)
  if stored is None:
    return batch
  return stored.at[batch].get(mode='promise_in_bounds')


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


def _example_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
  """Three keys for each example (flip, input noise, z), [batch, 3]."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
  return jax.vmap(lambda k: jax.random.split(k, 3))(keys)


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A N(0, I) draw of `shape` for each key; always float32 draws."""
  return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def _epsilon(
  keys: jax.Array, model: VAE, objective: Objective
) -> jax.Array | None:
  """Noise of the reparameterization, [num_samples, batch, latent_dim]."""
  if not objective.sample_posterior:
    return None
  draws = _normal(keys, (objective.num_samples, model.latent_dim))
  return jnp.swapaxes(draws, 0, 1)
