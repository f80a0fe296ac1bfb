"""What memory there is, and whether a run can do with it."""

import contextlib
import math
import pathlib

from etils import epath
import jax
import ml_collections
import psutil

from vae import devices
from vae import footprint
from vae.errors import UserError

# Where Linux tells containers and services their limits, and a process which
# of them it is in.
_CGROUPS = epath.Path('/sys/fs/cgroup')
_OWN_CGROUP = epath.Path('/proc/self/cgroup')

# What a cgroup counts as used, and the kernel gives back when it is asked for
# more: the files that were read, above all.
_RECLAIMABLE = ('inactive_file', 'active_file', 'slab_reclaimable')


def free() -> int:
  """Bytes that this process may still take: of the machine, and its cgroups."""
  available = psutil.virtual_memory().available
  return max(0, min([available, *map(_left_in, _cgroups())]))


def _cgroups() -> list[epath.Path]:
  """The process's own, and all that this one lies in, up to the root."""
  names = ()
  with contextlib.suppress(OSError, ValueError):
    for line in _OWN_CGROUP.read_text().splitlines():
      if line.startswith('0::/'):
        names = pathlib.PurePosixPath(line.removeprefix('0::/')).parts
  return [_CGROUPS.joinpath(*names[:i]) for i in range(len(names) + 1)]


def _left_in(cgroup: epath.Path) -> float:
  """Bytes until a cgroup's limit; without one, or a cgroup, infinitely many."""
  try:
    limit = int((cgroup / 'runs.memory.max').read_text())
    used = int((cgroup / 'runs.memory.current').read_text())
  except (OSError, ValueError):  # 'max' is no number.
    return math.inf
  with contextlib.suppress(OSError, ValueError):
    lines = (cgroup / 'runs.memory.stat').read_text().splitlines()
    stat = dict(line.split(maxsplit=1) for line in lines)
    used -= sum(int(stat.get(name, 0)) for name in _RECLAIMABLE)
  return limit - used


def check(config: ml_collections.ConfigDict, num_devices: int) -> None:
  """Checks, before anything is made, that a run is not too large.

  What passes may still be, as the least that is needed is compared; what does
  not pass is hopeless.

  Args:
    config: valid by itself.
    num_devices: that share a batch.

  Raises:
    UserError: names the keys that make it too large, and the bytes.
  """
  available, where = _free_on_each_device(num_devices)

  def compare(num_bytes: int, what: str, advice: str) -> None:
    if num_bytes > available:
      raise UserError(
        f'{what} take at least {_gigabytes(num_bytes)} of memory, and {where} '
        f'has {_gigabytes(available)} free; {advice}.'
      )

  size, latent_dim = config.data.image_size, config.model.latent_dim
  shape = (
    f'config.model.latent_dim={latent_dim}, config.model.hidden_channels='
    f'{tuple(config.model.hidden_channels)}, config.model.decoder_channels='
    f'{tuple(config.model.decoder_channels)} and config.data.image_size={size}'
  )
  # With the copy that goes into a checkpoint.
  state = footprint.state_bytes(config)
  compare(
    2 * state,
    f'{shape} make {footprint.num_parameters(config):,} parameters, which '
    "with Adam's moments and a copy to be saved",
    'lower one of them',
  )
  compare(
    state + footprint.drawing_bytes(config),
    f'{shape} make pictures of which the {footprint.NUM_SAMPLES_DRAWN} of a '
    'validation',
    'lower one of the last three',
  )
  for key, num_bytes in (
    ('train', footprint.training_bytes),
    ('eval', footprint.evaluation_bytes),
  ):
    batch_size = config[key].batch_size
    # Batches of evaluation are rounded down, but for an image on each device.
    per_device = max(batch_size // num_devices, 1)
    compare(
      state + num_bytes(config, per_device),
      f'config.{key}.batch_size={batch_size} on {num_devices} devices and '
      f'config.objective.num_samples={config.objective.num_samples}, with '
      f'{shape},',
      'lower one of them',
    )


def _free_on_each_device(num_devices: int) -> tuple[float, str]:
  """Bytes, and what has them; the same in all processes."""
  available, where = devices.free_memory(), 'each device'
  if available is None:
    # A CPU's devices share the host's, those that are used.
    num_devices = min(num_devices, jax.local_device_count())
    available = free() // num_devices
    where = 'this machine'
    if num_devices > 1:
      where += f' for each of its {num_devices} devices'
  return devices.least_of_all(available), where


def _gigabytes(num_bytes: float) -> str:
  return f'{num_bytes / 1e9:,.1f} GB'
