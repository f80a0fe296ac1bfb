import asyncio
import errno
import gc
import math
import os
import pathlib
import shutil
import tempfile

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vae import checkpoint_writer
from vae import checkpoints
from vae import devices
from vae import training
from vae.checkpoint_writer import CheckpointWriter
from vae.errors import UserError

# Where one array cannot be read, Orbax closes the event loop that reads of
# others still report to, from threads of their own.
pytestmark = pytest.mark.filterwarnings(
  'ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning'
)


def state_at(step, size=3):
  params = {'w': jnp.full((size,), float(step))}
  return devices.replicate(
    training.TrainState(jnp.int32(step), params, {}, (jnp.zeros(size),))
  )


def save_all(workdir, losses, keep_best=2):
  """Saves a state for each step; a loss of None is a checkpoint without."""
  with CheckpointWriter(workdir, keep_best) as writer:
    for step, loss in losses.items():
      metrics = None if loss is None else {'val/loss': loss, 'val/kl': 1.0}
      writer.save(step, state_at(step), metrics, {'loss': [step / 3]})
    writer.finish()
  return checkpoints.Checkpoints(workdir)


@pytest.mark.parametrize(
  ('losses', 'kept'),
  [
    ({1: 5.0, 2: 3.0, 3: 4.0, 4: 9.0}, [2, 3, 4]),
    ({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}, [1, 2, 4, 5]),
    ({1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}, [3, 4]),
    ({1: 1.0, 2: None, 3: 2.0, 4: None, 5: None, 6: None}, [1, 3, 5, 6]),
    ({1: 3.0, 2: math.nan, 3: 1.0, 4: math.nan, 5: math.inf}, [1, 3, 4, 5]),
  ],
)
def test_keeps_the_two_best_and_the_last_two(tmp_path, losses, kept):
  saved = save_all(tmp_path, losses)
  assert saved.all_steps() == kept
  assert saved.latest_step() == checkpoints.latest_step(tmp_path) == max(losses)
  scored = {s: loss for s, loss in losses.items() if loss and loss < math.inf}
  assert saved.best_step() == min(scored, key=scored.get)


def test_what_was_saved_comes_back(tmp_path):
  saved = save_all(tmp_path, {1: 2.0, 2: 1.0})
  for step in (1, 2):
    restored, expected = saved.restore(state_at(0), step), state_at(step)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    for a, b in zip(
      jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True
    ):
      assert a.dtype == b.dtype
  last = saved.restore_last(state_at(0))
  assert last.state.step == 2 and last.untold == {'loss': [2 / 3]}
  assert last.metrics == {'val/loss': 1.0, 'val/kl': 1.0}


@pytest.mark.parametrize(
  'name',
  [
    'lr=[0.1]',
    'a[1]/sub',
    'a[!b]',
    '[a-z]',
    'a*',
    'a**',
    'a?',
    'a\\b',
    'all of !"#$%&\'()*+,-.:;<=>?@[\\]^`{|}~',
  ],
)
def test_any_name_of_a_workdir_will_do(tmp_path, name):
  """Also one that is a pattern, which would fit other folders."""
  workdir = tmp_path / name
  saved = save_all(workdir, {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0})
  assert saved.all_steps() == [2, 3, 4] and saved.best_step() == 2
  assert saved.restore_last(state_at(0)).state.params['w'].tolist() == [4, 4, 4]
  assert saved.restore(state_at(0), 2).params['w'].tolist() == [2, 2, 2]
  # And nothing lies elsewhere.
  assert [path.name for path in workdir.iterdir()] == ['checkpoints']
  for path in tmp_path.rglob('*'):
    assert path.is_relative_to(workdir) or workdir.is_relative_to(path)


def test_place_for_a_link_is_missed_and_no_damage_reported(
  tmp_path, monkeypatch
):
  workdir = tmp_path / 'lr=[0.1]'
  saved = save_all(workdir, {1: 1.0, 2: 2.0})
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'absent'))
  with pytest.raises(UserError, match='set TMPDIR'):
    saved.restore_last(state_at(0))
  monkeypatch.undo()
  assert saved.restore_last(state_at(0)).state.step == 2


def test_saving_takes_no_part_in_the_vote_when_to_stop(tmp_path, monkeypatch):
  """JAX counts how often it is asked, in each process; one asks for all."""
  asked = []
  monkeypatch.setattr(
    multihost_utils,
    'reached_preemption_sync_point',
    lambda step: asked.append(step) or False,
  )
  assert save_all(tmp_path, {7: 2.0, 8: None}).all_steps() == [7, 8]
  assert not asked


def test_nothing_saved_is_nothing_to_go_on_from(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path / 'nowhere')
  assert saved.latest_step() is None
  assert saved.restore_last(state_at(0)) is None


@pytest.mark.parametrize(
  ('asked', 'said'),
  [
    (lambda: state_at(0, size=4), r"\['w'\] has the shape \(3,\).*for \(4,\)"),
    (lambda: state_at(0).replace(batch_stats={'m': jnp.ones(2)}), 'the model'),
    (lambda: state_at(0).replace(params={}), 'in the checkpoint alone'),
    (lambda: state_at(0).replace(step=jnp.float32(0)), 'int32, and .* float32'),
  ],
)
def test_other_arrays_are_a_clear_error(tmp_path, asked, said):
  saved = save_all(tmp_path, {1: 2.0, 2: 1.0})
  for restore in (saved.restore_last, lambda s: saved.restore(s, 1)):
    with pytest.raises(UserError, match=said) as caught:
      restore(asked())
    assert 'do not go together' in str(caught.value)
  # It is no damage: nothing is moved away.
  assert saved.all_steps() == [1, 2]


def test_reading_changes_nothing_and_waits_for_nothing(tmp_path):
  save_all(tmp_path, {1: 2.0, 2: 3.0})
  # As a run leaves it that is writing just now.
  unfinished = tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp'
  unfinished.mkdir()
  before = sorted(tmp_path.rglob('*'))
  saved = checkpoints.open_to_read(tmp_path)
  assert saved.find('best') == 1
  assert saved.find('last') == saved.find(2) == saved.find('2') == 2
  assert saved.restore(state_at(0), 1).step == 1
  assert sorted(tmp_path.rglob('*')) == before


def test_a_checkpoint_that_is_not_there_is_a_clear_error(tmp_path):
  with pytest.raises(UserError, match='no complete checkpoint'):
    checkpoints.open_to_read(tmp_path)
  assert not list(tmp_path.iterdir())
  save_all(tmp_path, {1: 2.0, 2: 3.0})
  saved = checkpoints.open_to_read(tmp_path)
  for name in (3, '3', 'first'):
    with pytest.raises(UserError, match=f'no checkpoint {name}; .* 1, 2'):
      saved.find(name)


def test_without_validation_the_best_is_the_last(tmp_path):
  assert save_all(tmp_path, {5: None}).find('best') == 5


def test_what_a_killed_process_left_half_done_is_cleared_away(tmp_path):
  save_all(tmp_path, {1: 1.0})
  unfinished = tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp'
  (unfinished / 'default').mkdir(parents=True)
  assert save_all(tmp_path, {2: 1.0}).all_steps() == [1, 2]
  assert not unfinished.exists()


def test_metrics_of_a_later_validation_are_added(tmp_path):
  """As when a run is stopped at an epoch's end, and goes on."""
  save_all(tmp_path, {1: 2.0, 2: None})
  saved = save_all(tmp_path, {2: 1.0})
  assert saved.all_steps() == [1, 2] and saved.best_step() == 2
  restored = saved.restore_last(state_at(0))
  assert restored.metrics == {'val/loss': 1.0, 'val/kl': 1.0}
  # What is ranked already stays so.
  again = save_all(tmp_path, {2: 0.5}).restore_last(state_at(0))
  assert again.metrics == restored.metrics


def test_checkpoints_without_contents_are_read_as_they_are(tmp_path):
  """As they were written before there was a table of contents."""
  saved = save_all(tmp_path, {1: 1.0})
  shutil.rmtree(tmp_path / 'checkpoints' / '1' / 'contents')
  assert saved.restore(state_at(0), 1).params['w'].tolist() == [1, 1, 1]
  with pytest.raises(UserError, match='asks for'):
    saved.restore(state_at(0, size=4), 1)


def places(size):
  """Where a file of so many bytes is tried."""
  return sorted({0, size // 3, size // 2, size - 1} & set(range(size)))


def damages(folder):
  """Every file of a checkpoint in every way: what is done, and a function."""
  for path in sorted(p for p in folder.rglob('*') if p.is_file()):
    content, name = path.read_bytes(), path.relative_to(folder)
    yield f'{name} is missing', path, None
    for place in places(len(content)):
      yield f'{name} ends at {place}', path, content[:place]
      flipped = bytearray(content)
      flipped[place] ^= 0x10
      yield f'{name} flipped at {place}', path, bytes(flipped)


def test_a_damaged_last_checkpoint_is_noticed_and_skipped(
  tmp_path, capsys, record_property
):
  """Or its damage changes nothing: there are bytes that nobody reads."""
  save_all(tmp_path / 'sound', {1: 1.0, 2: 2.0})
  state = jax.device_get(state_at(2))
  tried = noticed = 0
  for what, path, content in damages(tmp_path / 'sound' / 'checkpoints' / '2'):
    workdir = tmp_path / 'damaged'
    shutil.copytree(tmp_path / 'sound', workdir)
    copy = workdir / path.relative_to(tmp_path / 'sound')
    copy.unlink() if content is None else copy.write_bytes(content)
    saved = checkpoints.Checkpoints(workdir)
    restored = saved.restore_last(state_at(0))
    out, err = capsys.readouterr()
    tried += 1
    if restored.state.step == 2:
      jax.tree.map(np.testing.assert_array_equal, restored.state, state), what
      assert restored.untold == {'loss': [2 / 3]}, what
      assert restored.metrics['val/loss'] == 2.0, what
      assert not err
    else:
      noticed += 1
      assert restored.state.params['w'].tolist() == [1, 1, 1], what
      assert err.count('\n') == 1 and 'step 2 is damaged' in err, what
      # Out of the way, so that step 2 can be saved again, but not lost.
      assert (workdir / 'damaged_checkpoints' / '2').exists()
      assert saved.all_steps() == [1]
      assert save_all(workdir, {2: 2.0}).all_steps() == [1, 2]
    shutil.rmtree(workdir)
  # Of the state, of the metrics and of the table of contents.
  assert noticed > 25
  record_property(
    'faults', ['damaged checkpoints', tried, tried, 'the damaged checkpoint']
  )


def test_damage_is_named_where_one_asks_for_that_checkpoint(tmp_path):
  saved = save_all(tmp_path, {1: 1.0, 2: 2.0})
  (tmp_path / 'checkpoints/1/default/manifest.ocdbt').write_bytes(b'')
  with pytest.raises(UserError, match='1 cannot be restored.*Others: 2') as e:
    saved.restore(state_at(0), 1)
  assert '\n' not in str(e.value)
  assert saved.restore(state_at(0), 2).step == 2


def test_where_all_are_damaged_nothing_is_moved(tmp_path):
  saved = save_all(tmp_path, {1: 1.0, 2: 2.0})
  for step in (1, 2):
    path = tmp_path / f'checkpoints/{step}/default/manifest.ocdbt'
    path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(UserError, match='no checkpoint in .* can be restored'):
    saved.restore_last(state_at(0))
  assert saved.all_steps() == [1, 2]


@pytest.mark.parametrize('name', ['metrics/metrics', 'default/d/*'])
def test_disk_that_cannot_be_read_is_no_damage(tmp_path, name):
  """Here an address of this process where there is no memory."""
  saved = save_all(tmp_path, {1: 1.0, 2: 2.0})
  path = max((tmp_path / 'checkpoints/2').glob(name))
  content = path.read_bytes()
  path.unlink()
  path.symlink_to('/proc/self/mem')
  with pytest.raises(UserError, match=f'{path} cannot be read .Input/output'):
    saved.restore_last(state_at(0))
  assert saved.all_steps() == [1, 2]
  path.unlink()
  path.write_bytes(content)
  assert saved.restore_last(state_at(0)).state.step == 2


def test_an_older_one_that_cannot_be_ranked_is_moved(tmp_path, capsys):
  """Its rank is unknown, so it can be neither kept nor deleted."""
  saved = save_all(tmp_path, {1: 1.0, 2: 2.0})
  (tmp_path / 'checkpoints/1/metrics/metrics').write_text('{')
  assert saved.restore_last(state_at(0)).state.step == 2
  assert 'step 1 is damaged' in capsys.readouterr().err
  assert save_all(tmp_path, {3: 3.0}).all_steps() == [2, 3]


class Disk:
  """Stands in for Orbax: fails as often as it is told, then writes."""

  def __init__(self, monkeypatch, failures):
    self.failures = failures
    write = CheckpointWriter._write

    def _write(writer, *job):
      if self.failures:
        self.failures -= 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      write(writer, *job)

    monkeypatch.setattr(CheckpointWriter, '_write', _write)
    monkeypatch.setattr(checkpoint_writer, '_SECONDS_TO_RETRY', 0.01)


def test_what_cannot_be_written_is_told_once_and_tried_again(
  tmp_path, monkeypatch
):
  Disk(monkeypatch, 3)
  said = []
  with CheckpointWriter(tmp_path, warn=said.append) as writer:
    writer.save(1, state_at(1))
    writer.finish(patience=60)
    writer.save(2, state_at(2))
  assert checkpoints.Checkpoints(tmp_path).all_steps() == [1, 2]
  warning, relief = said
  assert 'step 1 cannot be written' in warning and 'No space left' in warning
  assert 'step 1 could be written' in relief


def test_a_later_checkpoint_takes_the_place_of_one_that_cannot_be(
  tmp_path, monkeypatch
):
  disk = Disk(monkeypatch, 10**9)
  said = []
  with CheckpointWriter(tmp_path, warn=said.append) as writer:
    for step in (1, 2, 3):
      writer.save(step, state_at(step))
    with pytest.raises(
      UserError, match='step 3 could not be written.*No space'
    ):
      writer.finish(patience=0.1)
    disk.failures = 0
    writer.finish(patience=60)
  assert checkpoints.Checkpoints(tmp_path).all_steps() == [3]
  assert len(said) == 2


def no_merge(finalize, handler, folder):
  """As Orbax did in a folder named [...], and raised nothing."""


def cut_short(finalize, handler, folder):
  finalize(handler, folder)
  path = max((folder / 'd').iterdir(), key=lambda path: path.stat().length)
  path.write_bytes(path.read_bytes()[:-1])


def other_bits(finalize, handler, folder):
  finalize(handler, folder)
  for path in pathlib.Path(folder).rglob('d/*'):
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


@pytest.mark.parametrize('damage', [no_merge, cut_short, other_bits])
def test_an_unreadable_checkpoint_does_not_count(tmp_path, monkeypatch, damage):
  """It is reported and tried again, and all older ones are kept until then."""
  finalize = ocp.StandardCheckpointHandler.finalize
  monkeypatch.setattr(checkpoint_writer, '_SECONDS_TO_RETRY', 0.01)
  said = []
  with CheckpointWriter(tmp_path, keep_best=1, warn=said.append) as writer:
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
      writer.save(step, state_at(step), {'val/loss': loss})
    writer.finish()
    saved = checkpoints.Checkpoints(tmp_path)
    assert saved.all_steps() == [1, 2, 3]
    with monkeypatch.context() as broken:
      broken.setattr(
        ocp.StandardCheckpointHandler,
        'finalize',
        lambda handler, folder: damage(finalize, handler, folder),
      )
      writer.save(4, state_at(4), {'val/loss': 0.5})
      with pytest.raises(UserError, match='step 4 .*cannot be read back'):
        writer.finish(patience=0.1)
      assert saved.all_steps() == [1, 2, 3] and saved.best_step() == 1
      assert saved.restore_last(state_at(0)).state.step == 3
    writer.finish(patience=60)
  assert saved.all_steps() == [3, 4] and saved.best_step() == 4
  assert saved.restore_last(state_at(0)).state.step == 4
  warning, relief = said
  assert 'step 4' in warning and 'cannot be read back' in warning
  assert 'step 4 could be written' in relief


def test_waiting_for_a_disk_ends_when_told_to(tmp_path, monkeypatch):
  Disk(monkeypatch, 10**9)
  monkeypatch.setattr(checkpoint_writer, '_SECONDS_TO_ASK', 0.01)
  asked = []

  def stop():
    asked.append(True)
    return len(asked) == 3

  with CheckpointWriter(tmp_path, warn=lambda line: None) as writer:
    writer.save(1, state_at(1))
    with pytest.raises(UserError, match='step 1 could not be written'):
      writer.finish(patience=1e9, stop=stop)


def test_task_that_orbax_forgot_is_not_told_of(tmp_path, caplog):
  """Its disk was full, which is told in a line; asyncio has a traceback."""
  with CheckpointWriter(tmp_path):
    pass
  loop = asyncio.new_event_loop()

  def forget(filename):
    program = compile('async def write(): raise OSError', filename, 'exec')
    namespace = {}
    exec(program, namespace)
    task = loop.create_task(namespace['write']())
    loop.run_until_complete(asyncio.wait([task]))

  forget('/site-packages/orbax/checkpoint/handler.py')
  gc.collect()
  assert 'never retrieved' not in caplog.text
  forget('/home/user/my_own.py')
  gc.collect()
  loop.close()
  assert 'never retrieved' in caplog.text
