"""Keys and draws: every random number is a function of the seed and a purpose.

The seed of a run gives a key for each purpose. Training folds the step into its
key, and then, like evaluation, the position of each example in the global batch
or in its split. So neither the devices, nor the cut of a batch, nor a restart
changes a draw. Draws are float32, whatever the dtype of the model, and made
within `numerics.fixed`.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vae import numerics


def init_key(seed: int) -> jax.Array:
  """The key of the initial parameters."""
  return _key(seed, 0)


def train_key(seed: int) -> jax.Array:
  """The key that training folds with step and position."""
  return _key(seed, 1)


def eval_key(seed: int) -> jax.Array:
  """The key that evaluation folds with each example's position in its split."""
  return _key(seed, 2)


def sample_key(seed: int) -> jax.Array:
  """The key of the samples that are drawn at each validation."""
  return _key(seed, 3)


def measure_key(seed: int) -> jax.Array:
  """The key that measuring a trained model folds with each position."""
  return _key(seed, 4)


def bound_key(seed: int) -> jax.Array:
  """The key of the importance-weighted bound, which has its own draws."""
  return _key(seed, 5)


def _key(seed: int, purpose: int) -> jax.Array:
  """A key that does not depend on JAX's switches.

  `jax.random.key(seed)` would add JAX_RANDOM_SEED_OFFSET.
  """
  words = jnp.asarray([0, seed], np.uint32)
  return jax.random.fold_in(wrap(words), purpose)


def wrap(words: jax.Array) -> jax.Array:
  """Keys from their numbers, uint32 [..., 2]."""
  return jax.random.wrap_key_data(words, impl=numerics.PRNG)


def global_positions(axis_name: str | None, per_device: int) -> jax.Array:
  """Positions of this device's examples in the global batch, [per_device].

  Args:
    axis_name: of the devices; None if one has the whole batch.
    per_device: number of examples of this device.
  """
  within = jnp.arange(per_device)
  if axis_name is None:
    return within
  return within + lax.axis_index(axis_name) * per_device


def example_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
  """A key for each example, by its position; [batch]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def split(keys: jax.Array, num: int) -> jax.Array:
  """Splits each key into `num`, [batch, num]."""
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
