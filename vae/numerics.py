"""Ambient switches of JAX and Flax that change the numbers of the same code.

A run is a function of its config. So the switches that environment variables
and other libraries set are fixed while a run is trained or measured, and those
that cannot be fixed are recorded (`environment`).
"""

from collections.abc import Iterator
import contextlib
from typing import Any

import flax
import jax
import jax.numpy as jnp

# The random number generator of all keys.
PRNG = 'threefry2x32'


@contextlib.contextmanager
def fixed(dtype: Any) -> Iterator[None]:
  """A context, for this thread, in which the switches have their defaults.

  Args:
    dtype: of the model; only float64 enables 64-bit numbers.
  """
  with (
    jax.enable_x64(jnp.dtype(dtype) == jnp.float64),
    jax.threefry_partitionable(True),
    jax.default_prng_impl(PRNG),
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

  Args:
    dtype: as for `fixed`.
  """
  with fixed(dtype), jax.default_matmul_precision('highest'):
    yield


def environment() -> dict[str, str | None]:
  """The environment that the last bits of a run depend on.

  Returns:
    `matmul_precision`, JAX_DEFAULT_MATMUL_PRECISION; and `jax` and `platform`,
    the version and the devices.
  """
  precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  return {
    'matmul_precision': precision,
    'jax': jax.__version__,
    'platform': jax.devices()[0].device_kind,
  }
