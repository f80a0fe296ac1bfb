import jax
import pytest

from configs import celeba
from configs import default
import memory
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


def test_a_containers_limit_counts(tmp_path, monkeypatch):
  monkeypatch.setattr(memory, '_CGROUP', tmp_path)
  whole = memory.free()
  assert whole > 10**8
  (tmp_path / 'memory.max').write_text('100000000\n')
  (tmp_path / 'memory.current').write_text('40000000\n')
  assert memory.free() == 60_000_000
  (tmp_path / 'memory.max').write_text('max\n')
  assert memory.free() > 10**8
