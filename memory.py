"""What memory there is, and whether a run can do with it."""

from etils import epath
import jax
import ml_collections
import psutil

from vae import devices
from vae import footprint
from vae.errors import UserError

# Where Linux tells a container its limits.
_CGROUP = epath.Path('/sys/fs/cgroup')


def free() -> int:
  """Bytes that this process may still take: the machine's, or its cgroup's."""
  available = psutil.virtual_memory().available
  try:
    limit = int(_CGROUP.joinpath('memory.max').read_text())
    used = int(_CGROUP.joinpath('memory.current').read_text())
  except (OSError, ValueError):  # No cgroup, or 'max'.
    return available
  return min(available, limit - used)


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
    f'{tuple(config.model.hidden_channels)} and config.data.image_size={size}'
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
    'lower one of the last two',
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
