"""Every random draw, as a function of the seed and of what it is for.

A run's seed gives a key for each purpose. Training folds the step into its
key; then, as in evaluation, the position of each example in the global batch,
or in its split, is folded in. So neither the devices, nor how a batch is cut,
nor a restart change a draw. Draws are float32, whatever the model computes in.
"""

import jax
from jax import lax
import jax.numpy as jnp


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


def global_positions(axis_name: str | None, per_device: int) -> jax.Array:
  """Of this device's examples in the global batch, [per_device].

  Args:
    axis_name: of the devices; None where one has the whole batch.
    per_device: how many examples this device has.
  """
  within = jnp.arange(per_device)
  if axis_name is None:
    return within
  return within + lax.axis_index(axis_name) * per_device


def example_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
  """A key for each example, by its position; [batch]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def split(keys: jax.Array, num: int) -> jax.Array:
  """So many keys of each, [batch, num]."""
  return jax.vmap(lambda key: jax.random.split(key, num))(keys)


def fold_in(keys: jax.Array, data: jax.Array | int) -> jax.Array:
  """The same number folded into each key, [batch]."""
  return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A draw of N(0, I) for each key, [batch, *shape]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def uniform(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A draw of U[0, 1) for each key, [batch, *shape]."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys)
