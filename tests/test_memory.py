from etils import epath
import jax
import pytest

from configs import celeba
from configs import default
from runs import memory
from vae import devices
from vae import footprint
from vae.errors import UserError


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('model.latent_dim', 10**9),
    ('model.latent_dim', 2**31 - 1),
    ('model.hidden_channels', (10**9,)),
    ('model.hidden_channels', (2**31 - 1,) * 6),
    ('model.decoder_channels', (10**9,) * 5),
    ('data.image_size', 2**15),
    ('train.batch_size', 10**9),
    ('eval.batch_size', 10**9),
    ('objective.num_samples', 10**9),
  ],
)
def test_what_no_machine_has_is_refused(key, value):
  config = default.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError) as caught:
    memory.check(config, num_devices=1)
  message = str(caught.value)
  assert f'config.{key}={value}' in message and 'GB free' in message
  assert '\n' not in message and len(message) < 500


def test_the_devices_memory_counts_where_they_tell(monkeypatch):
  config = celeba.get_config()
  state = footprint.state_bytes(config)
  step = footprint.training_bytes(config, 64)
  needed = state + max(state, step, footprint.drawing_bytes(config))
  config.eval.batch_size = 1
  monkeypatch.setattr(devices, 'free_memory', lambda: needed)
  memory.check(config, num_devices=1)
  monkeypatch.setattr(devices, 'free_memory', lambda: needed - 1)
  with pytest.raises(UserError, match='each device has'):
    memory.check(config, num_devices=1)
  # On two devices, each has half of the batch.
  config.train.batch_size = 1024
  needed = state + footprint.training_bytes(config, 512)
  monkeypatch.setattr(devices, 'free_memory', lambda: needed)
  memory.check(config, num_devices=2)
  with pytest.raises(UserError, match='config.train.batch_size=1024 on 1 dev'):
    memory.check(config, num_devices=1)


def test_a_hosts_devices_share_its_memory(monkeypatch):
  config = celeba.get_config()
  config.train.batch_size = 1024
  needed = footprint.state_bytes(config) + footprint.training_bytes(config, 512)
  monkeypatch.setattr(memory, 'free', lambda: 2 * needed)
  memory.check(config, num_devices=2)
  monkeypatch.setattr(jax, 'local_device_count', lambda: 4)
  with pytest.raises(UserError, match='this machine for each of its 4 devices'):
    memory.check(config, num_devices=4)
  # One that is used alone has all of it.
  alone = footprint.state_bytes(config) + footprint.training_bytes(config, 1024)
  monkeypatch.setattr(memory, 'free', lambda: alone)
  memory.check(config, num_devices=1)


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
  """A folder in the place of /sys/fs/cgroup; this process is in the root."""
  monkeypatch.setattr(memory, '_CGROUPS', epath.Path(tmp_path))
  monkeypatch.setattr(memory, '_OWN_CGROUP', epath.Path(tmp_path) / 'own')
  return tmp_path


def limit(cgroup, max_bytes, used, **stat):
  cgroup.mkdir(parents=True, exist_ok=True)
  (cgroup / 'runs.memory.max').write_text(f'{max_bytes}\n')
  (cgroup / 'runs.memory.current').write_text(f'{used}\n')
  rows = [f'{name} {num_bytes}\n' for name, num_bytes in stat.items()]
  (cgroup / 'runs.memory.stat').write_text(''.join(rows))


def test_a_containers_limit_counts(cgroups):
  assert memory.free() > 10**8
  limit(cgroups, 100_000_000, 40_000_000)
  assert memory.free() == 60_000_000
  (cgroups / 'runs.memory.stat').unlink()
  assert memory.free() == 60_000_000
  limit(cgroups, 'max', 40_000_000)
  assert memory.free() > 10**8
  # A limit may be lowered below what is used.
  limit(cgroups, 10_000_000, 40_000_000)
  assert memory.free() == 0


def test_the_files_that_a_container_has_read_are_no_used_memory(cgroups):
  stat = {'anon': 2, 'file': 95, 'active_file': 30, 'inactive_file': 60}
  stat |= {'shmem': 5, 'slab_reclaimable': 2, 'slab_unreclaimable': 1}
  stat = {name: millions * 1_000_000 for name, millions in stat.items()}
  limit(cgroups, 100_000_000, 100_000_000, **stat)
  # 8 MB stay: anonymous, shared, and what the kernel holds for itself.
  assert memory.free() == 92_000_000


@pytest.mark.parametrize('least', ['', 'a', 'a/b.slice'])
def test_the_narrowest_of_the_cgroups_around_a_process_counts(cgroups, least):
  (cgroups / 'own').write_text('4:memory:/other\n0::/a/b.slice\n')
  for name in ('', 'a', 'a/b.slice'):
    limit(cgroups / name, 90_000_000, 10_000_000, active_file=5_000_000)
  limit(cgroups / least, 50_000_000, 40_000_000, active_file=20_000_000)
  # Not around this process.
  limit(cgroups / 'other', 100, 99)
  assert memory.free() == 30_000_000


@pytest.mark.parametrize(
  'own', ['0::/not/mounted/here\n', '0::/../b\n', '\xff']
)
def test_the_root_counts_where_the_own_cgroup_is_not_seen(cgroups, own):
  (cgroups / 'own').write_text(own, encoding='latin-1')
  limit(cgroups, 100_000_000, 40_000_000)
  assert memory.free() == 60_000_000
