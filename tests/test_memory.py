from etils import epath
import jax
import pytest

from configs import celeba, default
from runs import memory
from vae import devices
from vae.errors import UserError


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('model.latent_dim', 10**9),
    ('model.hidden_channels', (10**9,)),
    ('train.batch_size', 10**9),
    ('objective.num_samples', 10**9),
  ],
)
def test_hopeless_run_is_refused_with_its_sizes(key, value):
  config = default.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError) as caught:
    memory.check(config, num_devices=1)
  message = str(caught.value)
  assert ' parameters, ' in message and ' GB free. ' in message
  assert key.startswith('model') or f'{key.split(".")[1]}={value}' in message


# Parameters and their two moments, and BatchNorm's means and variances, are
# float32, and the step and the two counts of the optimizer int32. The
# reconstructions of a batch are float32 numbers.
STATE = 4 * (3 * 3_937_635 + 2 * (32 + 64 + 128 + 256 + 512) + 3)
STATE += 4 * 2 * (256 + 128 + 64 + 32 + 32)
IMAGE = 4 * 64 * 64 * 3


@pytest.mark.parametrize(
  ('batch_size', 'num_devices', 'needed'),
  [
    (64, 1, 2 * STATE),
    (8192, 1, STATE + 8192 * IMAGE),
    (8192, 2, STATE + 4096 * IMAGE),
  ],
)
def test_state_and_a_batch_must_fit_each_device(
  monkeypatch, batch_size, num_devices, needed
):
  config = celeba.get_config()
  config.train.batch_size = batch_size
  monkeypatch.setattr(devices, 'free_memory', lambda: needed)
  memory.check(config, num_devices)
  monkeypatch.setattr(devices, 'free_memory', lambda: needed - 1)
  with pytest.raises(UserError, match=f'3,937,635 .*batch_size={batch_size},'):
    memory.check(config, num_devices)
  # The devices of a CPU share the host's memory.
  monkeypatch.setattr(devices, 'free_memory', lambda: None)
  monkeypatch.setattr(jax, 'local_device_count', lambda: 4)
  monkeypatch.setattr(memory, 'free', lambda: num_devices * needed)
  memory.check(config, num_devices)
  monkeypatch.setattr(memory, 'free', lambda: num_devices * needed - 1)
  with pytest.raises(UserError):
    memory.check(config, num_devices)


def test_exhausted_memory_names_the_sizes():
  config = celeba.get_config()
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.block_until_ready(jax.jit(lambda: jax.numpy.ones(2**50))())
  message = memory.explain(caught.value, config)
  assert message.startswith('out of memory (RESOURCE_EXHAUSTED') and (
    '3,937,635 parameters. Lower config.train.batch_size=64' in message
  )
  assert '\n' not in message
  assert 'out of memory' in memory.explain(MemoryError())
  assert memory.explain(ValueError('x'), config) is None


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
  """A folder in the place of /sys/fs/cgroup; this process is in the root."""
  monkeypatch.setattr(memory, '_CGROUPS', epath.Path(tmp_path))
  monkeypatch.setattr(memory, '_OWN_CGROUP', epath.Path(tmp_path) / 'own')
  return tmp_path


def limit(cgroup, max_bytes, used, **stat):
  cgroup.mkdir(parents=True, exist_ok=True)
  (cgroup / 'memory.max').write_text(f'{max_bytes}\n')
  (cgroup / 'memory.current').write_text(f'{used}\n')
  rows = [f'{name} {num_bytes}\n' for name, num_bytes in stat.items()]
  (cgroup / 'memory.stat').write_text(''.join(rows))


def test_limit_of_a_container_counts(cgroups):
  assert memory.free() > 10**8
  limit(cgroups, 100_000_000, 40_000_000)
  assert memory.free() == 60_000_000
  limit(cgroups, 'max', 40_000_000)
  assert memory.free() > 10**8
  # A limit may be lowered below what is used.
  limit(cgroups, 10_000_000, 40_000_000)
  assert memory.free() == 0


def test_cached_files_of_a_container_count_as_free(cgroups):
  stat = {'anon': 2, 'file': 95, 'active_file': 30, 'inactive_file': 60}
  stat |= {'shmem': 5, 'slab_reclaimable': 2, 'slab_unreclaimable': 1}
  stat = {name: millions * 1_000_000 for name, millions in stat.items()}
  limit(cgroups, 100_000_000, 100_000_000, **stat)
  # 8 MB stay: anonymous, shared, and what the kernel holds for itself.
  assert memory.free() == 92_000_000


@pytest.mark.parametrize('least', ['', 'a', 'a/b.slice'])
def test_narrowest_cgroup_around_the_process_counts(cgroups, least):
  (cgroups / 'own').write_text('4:memory:/other\n0::/a/b.slice\n')
  for name in ('', 'a', 'a/b.slice'):
    limit(cgroups / name, 90_000_000, 10_000_000, active_file=5_000_000)
  limit(cgroups / least, 50_000_000, 40_000_000, active_file=20_000_000)
  limit(cgroups / 'other', 100, 99)  # Not around this process.
  assert memory.free() == 30_000_000
