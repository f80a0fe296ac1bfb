import errno
import math
import os
import pathlib
import shutil
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from runs import processes
from vae import checkpoint_files, checkpoints, paths
from vae.checkpoints import Checkpoints, CheckpointWriter
from vae.errors import UserError

# If one array cannot be read, Orbax closes the event loop that the threads of
# the other arrays still report to.
pytestmark = pytest.mark.filterwarnings(
  'ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning'
)


def state_at(step, size=3):
  return {
    'step': jnp.int32(step),
    'params': {'w': jnp.full((size,), float(step))},
    'mean': jnp.full((2, 2), step, jnp.bfloat16),
  }


def save_all(workdir, losses, keep_best=2):
  """Saves a state for each step, without validation if its loss is None."""
  with CheckpointWriter(workdir, keep_best) as writer:
    for step, loss in losses.items():
      metrics = None if loss is None else {'val/loss': loss, 'val/kl': 1.0}
      writer.save(step, state_at(step), metrics)
    writer.finish()
  return Checkpoints(workdir)


def assert_same(state, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
    *(state, jax.device_get(expected)),
  )


@pytest.mark.parametrize(
  ('losses', 'kept'),
  [
    ({1: 5.0, 2: 3.0, 3: 4.0, 4: 9.0}, [2, 3, 4]),
    ({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}, [1, 2, 4, 5]),
    ({1: 1.0, 2: None, 3: 2.0, 4: None, 5: None, 6: None}, [1, 3, 5, 6]),
    ({1: 3.0, 2: math.nan, 3: 1.0, 4: math.nan, 5: math.inf}, [1, 3, 4, 5]),
  ],
)
def test_two_best_and_last_two_are_kept(workdir, losses, kept):
  saved = save_all(workdir, losses)
  assert saved.all_steps() == kept
  scored = {s: loss for s, loss in losses.items() if loss and loss < math.inf}
  assert saved.best_step() == saved.find('best') == min(scored, key=scored.get)


@pytest.mark.parametrize(
  'name',
  ['run', 'a[1]/sub', '[a-z]', 'a**', 'a\\b', '!"#$%&\'()+:;<=>?@^`{|}~'],
)
def test_saved_states_are_restored_in_workdirs_of_any_name(tmp_path, name):
  """Also if the name is a pattern that other folders match."""
  workdir = tmp_path / name
  saved = save_all(workdir, {1: 3.0, 2: 1.0, 3: None})
  assert saved.all_steps() == [1, 2, 3]
  for step in (1, 2, 3):
    assert_same(saved.restore(state_at(0), step), state_at(step))
  last = saved.restore_last(state_at(0))
  assert_same(last.state, state_at(3))
  assert last.metrics == {}
  assert [path.name for path in workdir.iterdir()] == ['checkpoints']
  for path in tmp_path.rglob('*'):  # Nothing lies elsewhere.
    assert path.is_relative_to(workdir) or workdir.is_relative_to(path)


def test_missing_temporary_folder_is_no_damage(tmp_path, monkeypatch):
  workdir = tmp_path / 'lr=[0.1]'
  saved = save_all(workdir, {1: 1.0, 2: 2.0})
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'absent'))
  with pytest.raises(UserError, match='set TMPDIR'):
    saved.restore_last(state_at(0))
  assert saved.all_steps() == [1, 2]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'params': {'w': np.ones(4)}}, r"\['w'\] is float32\[3\] .*float64\[4\]"),
    ({'added': np.ones(2)}, r"\['added'\] is missing in the checkpoint"),
    ({'params': {}}, r"\['w'\] is float32\[3\] in .* and missing in the model"),
  ],
)
def test_other_arrays_are_an_error_and_no_damage(tmp_path, changes, message):
  saved = save_all(tmp_path, {1: 2.0, 2: 1.0})
  for restore in (saved.restore_last, lambda s: saved.restore(s, 1)):
    with pytest.raises(UserError, match=message):
      restore(state_at(0) | changes)
  assert saved.all_steps() == [1, 2]


def test_reading_ignores_and_keeps_unfinished_checkpoints(tmp_path):
  """Another process may be writing them."""
  save_all(tmp_path, {1: 2.0, 2: 3.0, 3: 4.0})
  (tmp_path / 'checkpoints' / '3.unfinished').touch()
  before = sorted(tmp_path.rglob('*'))
  saved = Checkpoints(tmp_path)
  assert saved.find('best') == 1
  assert saved.find('last') == saved.find(2) == saved.find('2') == 2
  assert_same(saved.restore(state_at(0), 1), state_at(1))
  assert_same(saved.restore_last(state_at(0)).state, state_at(2))
  assert sorted(tmp_path.rglob('*')) == before


def test_unfinished_checkpoints_are_deleted_by_the_next_writer(workdir):
  saved = save_all(workdir, {1: 1.0, 2: 2.0})
  (saved.folder(2) / 'contents/metadata').unlink()
  (saved.directory / '2.unfinished').write_bytes(b'')
  (saved.directory / '7.unfinished').write_bytes(b'')
  assert save_all(workdir, {3: 1.0}).all_steps() == [1, 3]
  assert {p.name for p in saved.directory.iterdir()} == {'1', '3'}


def test_missing_checkpoint_is_an_error(tmp_path):
  saved = Checkpoints(tmp_path / 'nowhere')
  assert saved.restore_last(state_at(0)) is None and saved.all_steps() == []
  with pytest.raises(UserError, match='holds no complete checkpoint'):
    saved.find('best')
  saved = save_all(tmp_path, {1: None, 2: None})
  assert saved.find('best') == 2  # Without validation, the last is best.
  for name in (3, '3', 'first'):
    with pytest.raises(UserError, match=f'no checkpoint {name}; .* 1, 2'):
      saved.find(name)


def test_metrics_of_a_later_validation_are_added(tmp_path):
  """As when a run is stopped at an epoch's end, and continues."""
  save_all(tmp_path, {1: 2.0, 2: None})
  saved = save_all(tmp_path, {2: 1.0})
  assert saved.all_steps() == [1, 2] and saved.best_step() == 2
  assert saved.restore_last(state_at(0)).metrics['val/loss'] == 1.0
  save_all(tmp_path, {2: 0.5})  # A ranked checkpoint keeps its rank.
  assert saved.restore_last(state_at(0)).metrics['val/loss'] == 1.0


def damages(folder):
  """Each file of a checkpoint missing, cut short and flipped in places."""
  for path in sorted(p for p in folder.rglob('*') if p.is_file()):
    content, name = path.read_bytes(), path.relative_to(folder)
    yield f'{name} is missing', path, None
    size = len(content)
    for place in sorted({0, size // 3, size // 2, size - 1} & set(range(size))):
      yield f'{name} ends at {place}', path, content[:place]
      flipped = bytearray(content)
      flipped[place] ^= 0x10
      yield f'{name} flipped at {place}', path, bytes(flipped)


def test_damaged_last_checkpoint_is_set_aside(tmp_path, capsys):
  """Or the damage changes nothing: some bytes are never read."""
  save_all(tmp_path / 'sound', {1: 1.0, 2: 2.0})
  with processes.StopSignals():
    pass  # It must leave Orbax's tracebacks hidden.
  noticed = 0
  for what, path, content in damages(tmp_path / 'sound' / 'checkpoints' / '2'):
    workdir = tmp_path / 'damaged'
    shutil.copytree(tmp_path / 'sound', workdir)
    copy = workdir / path.relative_to(tmp_path / 'sound')
    copy.unlink() if content is None else copy.write_bytes(content)
    saved = Checkpoints(workdir)
    restored = saved.restore_last(state_at(0))
    _, err = capsys.readouterr()
    if restored.state['step'] == 2:
      assert_same(restored.state, state_at(2))
      assert restored.metrics['val/loss'] == 2.0 and not err, what
    else:
      noticed += 1
      assert_same(restored.state, state_at(1))
      assert err.count('\n') == 1 and 'step 2 is damaged' in err, what
      (aside,) = (workdir / 'damaged_checkpoints').iterdir()
      assert aside.name.startswith('2_') and saved.all_steps() == [1]
    shutil.rmtree(workdir)
  assert noticed > 25


def test_step_of_a_damaged_checkpoint_is_saved_again(workdir):
  saved = save_all(workdir, {1: 1.0, 2: 2.0})
  for name in ('default/manifest.ocdbt', checkpoint_files.CONTENTS):
    (saved.folder(2) / name).unlink()
    assert saved.restore_last(state_at(0)).state['step'] == 1
    save_all(workdir, {2: 2.0})
  assert len(list((workdir / 'damaged_checkpoints').iterdir())) == 2
  assert_same(saved.restore_last(state_at(0)).state, state_at(2))


def test_older_checkpoint_that_is_damaged_is_not_deleted(workdir, capsys):
  """Its arrays may be sound."""
  saved = save_all(workdir, {1: 1.0, 2: 2.0, 3: 3.0})
  (saved.folder(1) / checkpoint_files.CONTENTS).write_bytes(b'[]')
  assert saved.restore_last(state_at(0)).state['step'] == 3
  assert 'the checkpoint of step 1 is damaged' in capsys.readouterr().err
  (aside,) = (workdir / 'damaged_checkpoints').iterdir()
  assert (aside / 'default').exists() and saved.all_steps() == [2, 3]


def test_damaged_checkpoints_are_named_and_stay_if_all_are_damaged(workdir):
  saved = save_all(workdir, {1: 1.0, 2: 2.0})
  files = [saved.folder(1) / n for n in paths.list_files(saved.folder(1))]
  path = max(files, key=lambda path: len(path.read_bytes()))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))
  with pytest.raises(UserError, match='1 cannot be restored.*Others: 2') as e:
    saved.restore(state_at(0), 1)
  assert '\n' not in str(e.value)
  (saved.folder(2) / checkpoint_files.CONTENTS).write_bytes(b'[]')
  with pytest.raises(UserError, match='no checkpoint in .* can be restored'):
    saved.restore_last(state_at(0))
  assert saved.all_steps() == [1, 2]


@pytest.mark.parametrize('name', [checkpoint_files.CONTENTS, 'default/d/*'])
def test_failing_disk_is_no_damage(tmp_path, name):
  """Here an address of this process without memory."""
  saved = save_all(tmp_path, {1: 1.0, 2: 2.0})
  path = max(pathlib.Path(saved.folder(2)).glob(name))
  path.unlink()
  path.symlink_to('/proc/self/mem')
  with pytest.raises(UserError, match=f'{path} cannot be read .Input/output'):
    saved.restore_last(state_at(0))
  assert saved.all_steps() == [1, 2]


@pytest.fixture
def disk(monkeypatch):
  """A disk that is full for the next `failures` writes of a checkpoint."""

  disk, write = types.SimpleNamespace(failures=0), checkpoint_files.write

  def _write(*args):
    disk.failures -= 1
    if disk.failures >= 0:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(*args)

  monkeypatch.setattr(checkpoint_files, 'write', _write)
  monkeypatch.setattr(checkpoints, '_SECONDS_TO_RETRY', 0.01)
  monkeypatch.setattr(checkpoints, '_SECONDS_TO_ASK', 0.01)
  return disk


def test_failed_write_is_warned_of_once_and_retried(tmp_path, disk):
  disk.failures, lines = 3, []
  with CheckpointWriter(tmp_path, warn=lines.append) as writer:
    writer.save(1, state_at(1))
    writer.finish(patience=60)
  assert Checkpoints(tmp_path).all_steps() == [1]
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['1']
  warning, relief = lines
  assert 'step 1 cannot be written' in warning and 'No space left' in warning
  assert 'step 1 could be written' in relief


def test_later_checkpoint_replaces_one_that_cannot_be_written(tmp_path, disk):
  disk.failures, lines = 10**9, []
  with CheckpointWriter(tmp_path, warn=lines.append) as writer:
    for step in (1, 2, 3):
      writer.save(step, state_at(step))
    with pytest.raises(UserError, match='step 3 could not be .*No space'):
      writer.finish(patience=0.1)
    asked = []
    with pytest.raises(UserError, match='step 3 could not be written'):
      writer.finish(1e9, stop=lambda: asked.append(1) or len(asked) == 3)
    disk.failures = 0
    writer.finish(patience=60)
  assert Checkpoints(tmp_path).all_steps() == [3] and len(lines) == 2


def no_merge(finalize, handler, folder):
  """As Orbax did in a folder named [...], without an error."""


def other_bits(finalize, handler, folder):
  finalize(handler, folder)
  for path in pathlib.Path(folder).rglob('d/*'):
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


@pytest.mark.parametrize('damage', [no_merge, other_bits])
def test_checkpoint_that_cannot_be_read_back_does_not_count(
  tmp_path, monkeypatch, damage
):
  """It is retried, and all older ones are kept until then."""
  finalize = ocp.StandardCheckpointHandler.finalize
  monkeypatch.setattr(checkpoints, '_SECONDS_TO_RETRY', 0.01)
  lines = []
  saved = save_all(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0}, keep_best=1)
  with CheckpointWriter(tmp_path, keep_best=1, warn=lines.append) as writer:
    with monkeypatch.context() as broken:
      broken.setattr(
        ocp.StandardCheckpointHandler,
        'finalize',
        lambda handler, folder: damage(finalize, handler, folder),
      )
      writer.save(4, state_at(4), {'val/loss': 0.5})
      with pytest.raises(UserError, match='step 4 could not be written'):
        writer.finish(patience=0.1)
      assert saved.all_steps() == [1, 2, 3] and saved.best_step() == 1
    writer.finish(patience=60)
  assert saved.all_steps() == [3, 4] and saved.best_step() == 4
  assert_same(saved.restore_last(state_at(0)).state, state_at(4))
  assert len(lines) == 2
