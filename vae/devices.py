"""This process's devices, and how a batch is laid over them."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
from jax.experimental import multihost_utils
import numpy as np

from vae.errors import UserError

# The name of the axis of all devices in the pmapped functions.
AXIS = 'devices'


@dataclasses.dataclass(frozen=True)
class Topology:
  """How a global batch is laid over processes and their devices, in order."""

  local_devices: int = 1
  process_index: int = 0
  process_count: int = 1

  def local_part(self, batches: np.ndarray) -> np.ndarray:
    """This process's part of [n, batch_size, …] global batches."""
    parts = batches.reshape(
      len(batches), self.process_count, -1, *batches.shape[2:]
    )
    return parts[:, self.process_index]


def check() -> None:
  """Raises UserError if JAX finds no device, of JAX_PLATFORMS if it is set."""
  try:
    jax.devices()
  # JAX asserts if there is neither CUDA nor ROCm.
  except (RuntimeError, AssertionError) as error:
    reason = ' '.join(str(error).split())[:300]
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    where = f' for JAX_PLATFORMS={platforms}' if platforms else ''
    raise UserError(
      f'JAX finds no device{where} ({reason}). Choose another JAX_PLATFORMS, '
      'such as cpu, or install JAX for the device: pip install -r '
      'requirements.txt "jax[cuda13]" (or "jax[tpu]").'
    ) from error


def replicate(tree: Any) -> Any:
  """Places `tree` on this process's devices, as the pmapped steps return it."""
  return jax.device_put(tree, _sharding(jax.local_devices()))


def shard(tree: Any) -> Any:
  """Places arrays [num_devices, …], one row on each of the first devices."""
  return jax.tree.map(
    lambda a: jax.device_put(a, _sharding(jax.local_devices()[: len(a)], AXIS)),
    tree,
  )


def _sharding(among: Sequence, *axes: str) -> jax.sharding.Sharding:
  mesh = jax.sharding.Mesh(np.array(among), (AXIS,))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def mean_over(tree: Any, axis_name: str | None) -> Any:
  """Means over the devices of a pmap axis; the tree itself of one device."""
  # XLA would copy it.
  return tree if axis_size(axis_name) == 1 else lax.pmean(tree, axis_name)


def sum_over(tree: Any, axis_name: str | None) -> Any:
  """Sums over the devices of a pmap axis; the tree itself of one device."""
  return tree if axis_size(axis_name) == 1 else lax.psum(tree, axis_name)


def axis_size(axis_name: str | None) -> int:
  """The number of devices of a pmap axis; 1 without one."""
  return 1 if axis_name is None else lax.axis_size(axis_name)


def as_first_process(tree: Any) -> Any:
  """Broadcasts a tree of host arrays from the first process to all.

  As bytes: the devices add the values of all processes, and adding 0 to
  negative zero would lose its sign.
  """
  if jax.process_count() == 1:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  leaves = [np.asarray(leaf) for leaf in leaves]
  received = multihost_utils.broadcast_one_to_all(
    [np.frombuffer(leaf.tobytes(), np.uint8) for leaf in leaves]
  )
  return jax.tree.unflatten(
    structure,
    [
      np.frombuffer(bits.tobytes(), leaf.dtype).reshape(leaf.shape)
      for bits, leaf in zip(received, leaves, strict=True)
    ],
  )


def least_of_all(number: float) -> float:
  """The minimum over all processes, in all of them; waits for the devices."""
  if jax.process_count() == 1:
    return number
  return float(np.min(multihost_utils.process_allgather(np.float32(number))))


def free_memory() -> int | None:
  """Free bytes of the fullest local device; None if JAX does not know.

  A CPU's memory is the host's, which JAX does not know.
  """
  free = []
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if 'bytes_limit' not in stats:
      return None
    free.append(stats['bytes_limit'] - stats.get('bytes_in_use', 0))
  return min(free)
