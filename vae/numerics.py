"""A run's numbers are a function of its config: JAX's switches, keys, draws.

The switches that environment variables and other libraries set are fixed while
a run is trained or measured, and those that cannot be fixed are recorded.

The seed of a run gives a key for each purpose. Training folds the step into its
key, and then, like evaluation, the position of each example in the global batch
or in its split. So neither the devices, nor the cut of a batch, nor a restart
changes a draw. Draws are float32, whatever the dtype of the model.
"""

from collections.abc import Iterator
import contextlib
import functools
from typing import Any

import flax
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# The random number generator of all keys.
_PRNG = 'threefry2x32'


@contextlib.contextmanager
def fixed(dtype: Any) -> Iterator[None]:
  """A context, for this thread, in which the switches have their defaults.

  The model's `dtype` counts: only float64 enables 64-bit numbers.
  """
  with (
    jax.enable_x64(jnp.dtype(dtype) == jnp.float64),
    jax.threefry_partitionable(True),
    jax.default_prng_impl(_PRNG),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
    # Flax derives the keys of the initial values by it.
    flax.config.temp_flip_flag('fix_rng_separator', False),
  ):
    yield


@contextlib.contextmanager
def precise(dtype: Any) -> Iterator[None]:
  """`fixed`, in which float32 numbers are multiplied as float32.

  By default a TPU rounds the factors of a float32 product to bfloat16, and a
  GPU to TF32. Training does so too; a trained model is measured without.
  """
  with fixed(dtype), jax.default_matmul_precision('highest'):
    yield


def environment() -> dict[str, str | None]:
  """JAX_DEFAULT_MATMUL_PRECISION, JAX's version and the platform.

  The last bits of a run depend on these.
  """
  precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  return {
    'matmul_precision': precision,
    'jax': jax.__version__,
    'platform': jax.devices()[0].device_kind,
  }


def _key(purpose: int, seed: int) -> jax.Array:
  # `jax.random.key(seed)` would add JAX_RANDOM_SEED_OFFSET.
  return jax.random.fold_in(wrap(jnp.asarray([0, seed], np.uint32)), purpose)


# Keys by the seed of a run: of its initial parameters, of training, of
# validation, of the samples that are drawn at each validation, of measuring the
# trained model, and of the importance-weighted bound.
init_key = functools.partial(_key, 0)
train_key = functools.partial(_key, 1)
eval_key = functools.partial(_key, 2)
sample_key = functools.partial(_key, 3)
measure_key = functools.partial(_key, 4)
bound_key = functools.partial(_key, 5)
# Of the black and white images of an evaluation, the same for all models.
binary_key = functools.partial(_key, 6, 0)


def wrap(words: jax.Array) -> jax.Array:
  """Keys from their numbers, uint32 [..., 2]."""
  return jax.random.wrap_key_data(words, impl=_PRNG)


def global_positions(axis_name: str | None, per_device: int) -> jax.Array:
  """Positions of this device's examples in the global batch, [per_device]."""
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


def bernoulli(keys: jax.Array, probabilities: jax.Array) -> jax.Array:
  """A draw of 0 or 1 for each probability [batch, …], by a key for each row.

  Of grey values it makes black and white images (Salakhutdinov & Murray 2008).
  """
  draws = uniform(keys, probabilities.shape[1:])
  return (draws < probabilities).astype(probabilities.dtype)
