"""Free memory, and runs that do not fit into it."""

import contextlib
import pathlib

from etils import epath
import jax
import ml_collections
import psutil

from vae import devices, steps
from vae.errors import UserError

# The limits of containers and services on Linux, and the process's own group.
_CGROUPS = epath.Path('/sys/fs/cgroup')
_OWN_CGROUP = epath.Path('/proc/self/cgroup')

# Memory that a cgroup counts as used and the kernel frees on demand: mostly
# cached files.
_RECLAIMABLE = ('inactive_file', 'active_file', 'slab_reclaimable')


def free() -> int:
  """Free bytes of this machine, within the limits of the process's cgroups."""
  free_bytes, names = psutil.virtual_memory().available, ()
  with contextlib.suppress(OSError):
    path = _OWN_CGROUP.read_text().strip().rpartition('0::/')[2]
    names = pathlib.PurePosixPath(path).parts
  for end in range(len(names) + 1):
    group = _CGROUPS.joinpath(*names[:end])
    # There may be no such group here, or no limit: 'max' is not a number.
    with contextlib.suppress(OSError, ValueError):
      limit = int((group / 'memory.max').read_text())
      used = int((group / 'memory.current').read_text())
      words = (group / 'memory.stat').read_text().split()
      stat = dict(zip(words[::2], words[1::2], strict=True))
      used -= sum(int(stat.get(name, 0)) for name in _RECLAIMABLE)
      free_bytes = min(free_bytes, limit - used)
  return max(free_bytes, 0)


def check(config: ml_collections.ConfigDict, num_devices: int) -> None:
  """Refuses a run that cannot fit, by the shapes of its arrays alone.

  The least that is needed are the state and, at different times, a copy of it
  for a checkpoint and the reconstructions of a batch.

  Args:
    config: valid.
    num_devices: number of devices that share a batch.

  Raises:
    UserError: if that exceeds the free memory of a device.
  """
  size, channels = config.data.image_size, config.data.channels
  samples = config.objective.get('num_samples', 1)
  batch = -(-config.train.batch_size // num_devices) * samples * size**2
  itemsize = jax.numpy.dtype(config.model.get('dtype', 'float32')).itemsize
  state = _state(config)
  state_bytes = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
  )
  needed = state_bytes + max(state_bytes, batch * channels * itemsize)
  if needed > (available := _free_on_device(num_devices)):
    raise UserError(
      f'config.model has {steps.num_parameters(state):,} parameters, and with '
      f'config.train.batch_size={config.train.batch_size}, num_samples='
      f'{samples} and config.data.image_size={size} training needs at least '
      f'{_gigabytes(needed)}; each device has {_gigabytes(available)} free. '
      'Lower one of them.'
    )


def explain(
  error: BaseException, config: ml_collections.ConfigDict | None = None
) -> str | None:
  """A message for the user if memory ran out, else None.

  Args:
    error: an exception of any kind.
    config: of the run in training, if any.
  """
  reason = ' '.join(str(error).split())[:200]
  if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in reason:
    return None
  message = (
    f'out of memory ({reason or "MemoryError"}); each device has '
    f'{_gigabytes(_free_on_device(1))} free'
  )
  if config is None:
    return f'{message}. Lower the batch size or the number of images.'
  return (
    f'{message}, and the model {steps.num_parameters(_state(config)):,} '
    f'parameters. Lower config.train.batch_size={config.train.batch_size}, '
    f'config.eval.batch_size={config.eval.batch_size} or the sizes in '
    'config.model, or set config.data.cache=none.'
  )


def _state(config: ml_collections.ConfigDict) -> steps.TrainState:
  program = steps.program_from_config(config, config.train.batch_size)
  return steps.abstract_state(program)


def _free_on_device(num_devices: int) -> int:
  """Free bytes of each device; a CPU's devices share those of the host."""
  num_devices = min(num_devices, jax.local_device_count())
  return devices.free_memory() or free() // num_devices


def _gigabytes(num_bytes: float) -> str:
  return f'{num_bytes / 1e9:,.1f} GB'
