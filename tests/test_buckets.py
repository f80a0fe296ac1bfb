"""Workdirs and data in a bucket, against a server that speaks its protocol.

test_bucket_runs.py has whole runs.
"""

import asyncio
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

from etils import epath
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from data import cartoon_faces
from data import folder as folders
from data.encoded import SPLITS
from runs import metric_writer
from runs import processes
from runs import workdir_lock
from runs import workdirs
from tests import bucket_server
from tests.conftest import make_small_config
from tests.conftest import ROOT
from tests.test_checkpoints import save_all
from tests.test_checkpoints import state_at
from tests.test_folder import write_images
import vae
from vae import atomic_files
from vae import checkpoints
from vae import mirror
from vae import paths
from vae.checkpoint_writer import CheckpointWriter
from vae.errors import UserError


@pytest.fixture(scope='module')
def running():
  """A server, to which all clients of this process are sent."""
  with (
    bucket_server.serve() as server,
    bucket_server.clients_sent_to(server),
  ):
    yield server


@pytest.fixture
def server(running):
  running.clear_log()
  yield running
  running.set_faults()


@pytest.fixture(params=['run', 'lr=[0.1]?*/run'])
def workdir(request, tmp_path):
  """A folder in the bucket that no other test has."""
  return paths.expand(f'gs://bucket/{tmp_path.name}/{request.param}')


@pytest.fixture
def hasty(monkeypatch):
  """Clients do not sleep before they repeat a request."""
  sleep = asyncio.sleep
  monkeypatch.setattr(
    'gcsfs.retry.asyncio.sleep', lambda seconds: sleep(seconds / 1000)
  )


# Paths.


def test_urls_stay_as_they_are():
  url = 'gs://bucket/~/a/../b'
  assert str(paths.expand(url)) == str(paths.absolute(url)) == url
  assert str(checkpoints.Checkpoints(url).directory) == f'{url}/checkpoints'
  with pytest.raises(UserError, match='s3://b/a is neither a local path nor'):
    paths.expand('s3://b/a')


def test_missing_client_is_told_at_once(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='gs://b/run needs gcsfs: pip install'):
    vae.load('gs://b/run')


def test_folder_of_a_bucket_is_like_a_local_one(server, workdir, tmp_path):
  for top in (workdir, epath.Path(tmp_path)):
    top.mkdir(parents=True, exist_ok=True)
    for name in ('a/b/c.txt', 'a/d.txt', 'e', 'a[1]/f*', 'ä?/g'):
      (top / name).parent.mkdir(parents=True, exist_ok=True)
      atomic_files.replace(top / name, name.encode())
    (top / 'a').joinpath('empty').write_bytes(b'')
    assert paths.list_files(top) == sorted(
      ['a/b/c.txt', 'a/d.txt', 'e', 'a[1]/f*', 'ä?/g', 'a/empty']
    )
    assert sorted(p.name for p in top.iterdir()) == ['a', 'a[1]', 'e', 'ä?']
    assert (top / 'a').is_dir() and not (top / 'e').is_dir()
    assert not (top / 'a/x').exists() and (top / 'a/d.txt').exists()
    assert (top / 'ä?/g').read_text() == 'ä?/g'
    assert (top / 'a/empty').read_bytes() == b''
    paths.move(top / 'a', top / 'z')
    (top / 'a[1]').rmtree()
    (top / 'e').unlink()
    assert paths.list_files(top) == sorted(
      ['z/b/c.txt', 'z/d.txt', 'z/empty', 'ä?/g']
    )
    for missing in (top / 'e').read_bytes, (top / 'a').rmtree:
      with pytest.raises(FileNotFoundError):
        missing()


def test_folders_are_copied_both_ways(server, workdir, tmp_path):
  source = epath.Path(tmp_path) / 'source'
  for index in range(20):
    path = source / f'{index % 3}/{index}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(index * 1000))
  large = os.urandom(12_000_000)  # Sent in several requests.
  (source / 'large').write_bytes(large)
  paths.copy(source, workdir)
  assert server.read('bucket', str(workdir / 'large')[12:]) == large
  paths.copy(workdir, epath.Path(tmp_path) / 'target')
  compared = subprocess.run(
    ['diff', '-r', source, tmp_path / 'target'], capture_output=True
  )
  assert compared.returncode == 0, compared.stdout


# Errors.


@pytest.mark.parametrize(
  ('answer', 'kind', 'said'),
  [
    (403, PermissionError, 'access denied: .* does not have .*access'),
    (401, PermissionError, 'no credentials for Google Cloud; run gcloud auth'),
    (429, OSError, 'the bucket answers .*429'),
    (503, OSError, 'the bucket answers .*503'),
    ('close', OSError, 'the bucket cannot be reached'),
  ],
)
@pytest.mark.parametrize(
  'do',
  [
    lambda path: path.read_bytes(),
    lambda path: path.write_text('x'),
    lambda path: path.exists(),
    lambda path: path.is_dir(),
    lambda path: list(path.iterdir()),
    lambda path: path.unlink(),
    lambda path: path.rmtree(),
    paths.list_files,
  ],
)
def test_failures_are_os_errors_with_a_reason(
  server, hasty, tmp_path, answer, kind, said, do
):
  """Also to whether something is there: it may be."""
  path = paths.expand(f'gs://bucket/{tmp_path.name}')
  path.write_text('x')
  server.set_faults(answers={'.': answer})
  with pytest.raises(kind) as caught:
    do(path)
  assert type(caught.value) is kind
  assert caught.value.errno and '\n' not in caught.value.strerror
  assert re.search(said, caught.value.strerror)


@pytest.mark.parametrize(
  'faults', [{'unavailable': 0.4}, {'writes_per_second': 1}]
)
def test_requests_are_repeated(server, workdir, faults):
  server.set_faults(**faults)
  for number in range(4):
    (workdir / 'a').write_text(str(number))
    assert (workdir / 'a').read_text() == str(number)
  failed = [entry for entry in server.log() if entry.status >= 400]
  assert failed and {entry.status for entry in failed} <= {503, 429}


@pytest.mark.parametrize('url', ['gs://mistyped/run', 'gs://mistyped'])
def test_missing_bucket_is_told_at_once_and_not_made(server, url):
  start = time.monotonic()
  with pytest.raises(UserError, match='written .there is no such bucket.; na'):
    workdirs.check_writable(paths.expand(url), '--workdir')
  assert len(server.log()) <= 3 and time.monotonic() - start < 20
  assert 'storage.buckets.create' not in server.permissions()


# Checkpoints.


def test_checkpoint_that_is_marked_unfinished_is_none(server, workdir):
  saved = save_all(workdir, {1: 1.0, 2: 2.0})
  assert saved.all_steps() == [1, 2]
  # As of a process that was killed while it wrote, or deleted.
  saved.begin(2)
  saved = checkpoints.Checkpoints(workdir)
  assert saved.all_steps() == [1] and saved.latest_step() == 1
  saved = save_all(workdir, {3: 3.0, 4: 4.0, 5: 5.0})
  assert saved.all_steps() == [1, 3, 4, 5]
  assert sorted(p.name for p in saved.directory.iterdir()) == list('1345')
  restored = saved.restore_last(state_at(0))
  assert restored.state.step == 5 and restored.untold == {'loss': [5 / 3]}
  np.testing.assert_array_equal(restored.state.params['w'], [5, 5, 5])


def test_run_is_copied_by_hand_to_a_bucket_and_back(server, workdir, tmp_path):
  """Also checkpoints without a table of contents, as they were once."""
  local = epath.Path(tmp_path) / 'run'
  save_all(local, {1: 1.0, 2: 2.0, 3: 3.0})
  (local / 'checkpoints/1/contents').rmtree()
  for source, target in ((local, workdir), (workdir, local.parent / 'back')):
    paths.copy(source, target)
    saved = checkpoints.Checkpoints(target)
    saved.clear_unfinished()
    assert saved.all_steps() == [1, 2, 3]
    for step in (1, 2, 3):
      np.testing.assert_array_equal(
        saved.restore(state_at(0), step).params['w'], [step] * 3
      )


def test_damaged_checkpoint_is_moved_aside(server, workdir, capsys):
  save_all(workdir, {1: 1.0, 2: 2.0, 3: 3.0})
  top = str(workdir).removeprefix('gs://bucket/')
  sizes = server.sizes('bucket')
  name = max(
    (n for n in sizes if n.startswith(f'{top}/checkpoints/3/default/')),
    key=sizes.get,
  )
  data = bytearray(server.read('bucket', name))
  data[len(data) // 2] ^= 1
  server.write('bucket', name, bytes(data))
  server.delete('bucket', f'{top}/checkpoints/2/default/manifest.ocdbt')
  saved = checkpoints.Checkpoints(workdir)
  assert saved.restore_last(state_at(0)).state.step == 1
  assert saved.all_steps() == [1]
  assert {p.name for p in (workdir / 'damaged_checkpoints').iterdir()} == {
    *('2', '3')
  }
  assert 'damaged_checkpoints/3; the run goes on' in capsys.readouterr().err


def test_damage_on_the_way_is_noticed_before_the_checkpoint_counts(
  server, workdir, monkeypatch
):
  copy, lines = paths.copy, []

  def damage(source, target):
    copy(source, target)
    if not paths.is_remote(source):
      name = str(target).removeprefix('gs://bucket/')
      server.write('bucket', f'{name}/default/manifest.ocdbt', b'0' * 50)

  monkeypatch.setattr(paths, 'copy', damage)
  with CheckpointWriter(workdir, warn=lines.append) as writer:
    writer.save(1, state_at(1))
  assert checkpoints.Checkpoints(workdir).all_steps() == []
  (line,) = lines
  assert 'what was written cannot be read back' in line


def test_bucket_that_fails_for_a_while_loses_no_checkpoint(
  server, hasty, workdir, monkeypatch
):
  monkeypatch.setattr('vae.checkpoint_writer._SECONDS_TO_RETRY', 0.1)
  lines = []
  server.set_faults(answers={'objects.insert': 503})
  with CheckpointWriter(workdir, warn=lines.append) as writer:
    writer.save(1, state_at(1), {'val/loss': 1.0})
    with pytest.raises(UserError, match='the bucket answers .*503'):
      writer.finish(patience=0.2)
    server.set_faults()
    writer.finish(patience=60)
  assert checkpoints.Checkpoints(workdir).all_steps() == [1]
  assert len(lines) == 2 and 'could be written' in lines[1]


def test_outage_does_not_make_a_checkpoint_incomplete(server, hasty, workdir):
  saved = save_all(workdir, {1: 1.0})
  server.set_faults(answers={'objects.list': 503})
  with pytest.raises(UserError, match='checkpoints cannot be read .*503'):
    saved.all_steps()
  server.set_faults()
  assert saved.restore_last(state_at(0)).state.step == 1


def test_best_checkpoint_is_no_other_while_it_cannot_be_read(
  server, hasty, workdir
):
  saved = save_all(workdir, {1: 1.0, 2: 2.0})
  server.set_faults(answers={'objects.get .*/1/metrics': 503})
  with pytest.raises(UserError, match='metrics cannot be read .*503'):
    saved.find('best')
  server.set_faults()
  assert saved.find('best') == 1


# Metrics.


@pytest.fixture
def slow_mirror(monkeypatch):
  """Copies only when asked to."""
  monkeypatch.setattr(mirror, '_SECONDS_BETWEEN_COPIES', 1e6)


def rows(workdir):
  return [row['step'] for row in metric_writer.read(workdir)]


def test_metrics_are_in_the_bucket_when_a_checkpoint_needs_them(
  server, slow_mirror, workdir
):
  writer = metric_writer.MetricWriter(workdir)
  for step in (1, 2):
    writer.write_scalars(step, {'train/loss': 1.5})
  wait = writer.flush()
  server.clear_log()
  writer.write_scalars(3, {'train/loss': 1.5})
  assert not server.log()  # The loop waits for no request.
  wait()
  assert rows(workdir)[:2] == [1, 2]
  # Killed, and started again.
  again = metric_writer.MetricWriter(workdir)
  again.rewind(1, validated=True)
  assert rows(workdir) == [1]
  again.write_scalars(2, {'train/loss': 1.5})
  again.close()
  assert rows(workdir) == [1, 2]


def test_unfinished_files_are_not_copied(server, slow_mirror, workdir):
  copier = mirror.Mirror(workdir, print)
  for name in ('a', '0123.partial'):
    (copier.folder / name).write_text('x')
  copier.close()
  assert paths.list_files(workdir) == ['a']


def test_many_lines_are_few_requests(server, workdir, monkeypatch):
  monkeypatch.setattr(mirror, '_SECONDS_BETWEEN_COPIES', 0.2)
  writer = metric_writer.MetricWriter(workdir)
  for step in range(300):
    writer.write_scalars(step, {'train/loss': 1.5})
  writer.close()
  writes = [e for e in server.log() if e.object.endswith('metrics.jsonl')]
  assert len([e for e in writes if e.method == 'objects.insert']) < 30
  assert rows(workdir) == list(range(300))


def test_pictures_of_a_run_are_copied(server, workdir):
  writer = metric_writer.MetricWriter(workdir)
  (writer.folder / 'samples').mkdir()
  (writer.folder / 'samples/epoch_0001.png').write_bytes(b'x')
  server.set_faults(answers={'objects.insert.*metrics.jsonl': 403})
  writer.write_scalars(1, {'train/loss': 1.5})
  writer.close()  # Access to the metrics alone is denied.
  assert (workdir / 'samples/epoch_0001.png').read_bytes() == b'x'


def test_tensorboard_of_a_bucket_has_the_points_of_a_local_one(
  server, slow_mirror, workdir, tmp_path
):
  for folder in (workdir, epath.Path(tmp_path) / 'local'):
    folder.mkdir(exist_ok=True)
    writer = metric_writer.MetricWriter(folder)
    for step in range(1, 10):
      writer.write_scalars(step, {'train/loss': step / 8})
      if step % 3 == 0:
        picture = np.full((4, 4, 3), step, np.uint8)
        writer.write_images(step, {'samples': picture})
        time.sleep(2.5)  # As long as an epoch, at least.
    writer.close()
  paths.copy(workdir, epath.Path(tmp_path) / 'remote')
  found = []
  for name in ('local', 'remote'):
    folder = str(tmp_path / name / 'tensorboard')
    events = event_accumulator.EventAccumulator(folder)
    events.Reload()
    found.append(
      {
        tag: [(e.step, e.tensor_proto) for e in events.Tensors(tag)]
        for tag in events.Tags()['tensors']
      }
    )
  assert found[0] == found[1] and len(found[0]['train/loss']) == 9
  # So that none is copied over and over.
  assert len(list((workdir / 'tensorboard').iterdir())) >= 2


@pytest.mark.parametrize('answer', [403, 503])
def test_refused_metrics_warn_and_training_goes_on(
  server, hasty, workdir, monkeypatch, capsys, answer
):
  monkeypatch.setattr(mirror, '_SECONDS_BETWEEN_COPIES', 0.05)
  writer = metric_writer.MetricWriter(workdir)
  server.set_faults(answers={'objects.insert.*metrics.jsonl': answer})
  writer.write_scalars(1, {'train/loss': 1.5})
  wait = writer.flush()
  # Access that is denied must not cost a checkpoint too.
  expected = (
    pytest.raises(OSError) if answer == 503 else contextlib.nullcontext()
  )
  with expected:
    wait()
  time.sleep(0.5)
  writer.close()
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 2, err
  assert 'cannot be written' in err[0] and 'training goes on' in err[0]
  # Nothing is lost: the lines are where the last warning says.
  folder = epath.Path(err[1].rpartition(' from ')[2].rstrip('.'))
  assert rows(folder) == [1]


# The lock.

HOLD = """
import sys
from runs import processes
from vae import paths
from runs import workdir_lock
workdir_lock._SECONDS_BETWEEN_TOUCHES = 0.3
processes.this_machine = lambda: sys.argv[2]
with workdir_lock.hold(paths.expand(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


@contextlib.contextmanager
def holder(workdir, machine):
  """Another process that has the workdir."""
  with subprocess.Popen(
    [sys.executable, '-c', HOLD, str(workdir), machine],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'held\n', process.stderr.read()
    try:
      yield process
    finally:
      process.kill()


def try_to_hold(workdir):
  with workdir_lock.hold(workdir):
    return True


def test_second_run_is_refused_until_the_first_is_killed(server, workdir):
  with holder(workdir, processes.this_machine()) as process:
    with pytest.raises(UserError, match=f'in use by process {process.pid} on'):
      try_to_hold(workdir)
    process.kill()
    process.wait()
    assert try_to_hold(workdir)
  assert not (workdir / 'lock.json').exists()


def test_one_of_many_gets_what_a_dead_process_left(server, workdir):
  """Though requests are repeated whose answers were lost."""
  with holder(workdir, processes.this_machine()) as process:
    process.kill()
  server.set_faults(unavailable=0.1)
  others = [
    subprocess.Popen(
      [sys.executable, '-c', HOLD, str(workdir), processes.this_machine()],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(4)
  ]
  # The one that holds it waits for the end of its input.
  first_lines = [other.stdout.readline() for other in others]
  results = [other.communicate() for other in others]
  assert sorted(first_lines) == ['', '', '', 'held\n'], results
  assert sum('InUseError' in err for _, err in results) == 3, results


@pytest.mark.parametrize('end', ['none', 'killed', 'unreadable'])
def test_run_on_another_machine_counts_as_long_as_it_touches_the_lock(
  server, workdir, monkeypatch, capsys, end
):
  monkeypatch.setattr(workdir_lock, '_SECONDS_UNTIL_DEAD', 2)
  monkeypatch.setattr(workdir_lock, '_SECONDS_BETWEEN_LOOKS', 0.1)
  with holder(workdir, 'another') as process:
    if end == 'none':
      with pytest.raises(UserError, match=f'in use by process {process.pid}'):
        try_to_hold(workdir)
      return
    process.kill()
    process.wait()
    if end == 'unreadable':
      (workdir / 'lock.json').write_text('[')
    assert try_to_hold(workdir)
  who = 'another process' if end == 'unreadable' else f'process {process.pid}'
  assert f'locked by {who}' in capsys.readouterr().out


def test_lock_of_a_run_that_died_long_ago_is_not_waited_for(
  server, workdir, monkeypatch, capsys
):
  monkeypatch.setattr(workdir_lock, '_SECONDS_UNTIL_DEAD', 2)
  with holder(workdir, 'another') as process:
    process.kill()
    process.wait()
  time.sleep(4)
  monkeypatch.setattr(workdir_lock.time, 'sleep', lambda seconds: 1 / 0)
  assert try_to_hold(workdir)
  assert 'waiting' not in capsys.readouterr().out


def test_run_that_slept_while_another_took_over_ends(
  server, workdir, monkeypatch
):
  monkeypatch.setattr(workdir_lock, '_SECONDS_UNTIL_DEAD', 2)
  with holder(workdir, 'another') as process:
    process.send_signal(signal.SIGSTOP)
    with workdir_lock.hold(workdir):
      process.send_signal(signal.SIGCONT)
      assert process.wait(timeout=60) == 2
      assert f'another run took {workdir} over' in process.stderr.read()
    assert not (workdir / 'lock.json').exists()


def test_run_that_may_not_touch_its_lock_does_not_begin(server, workdir):
  """Else others take it over after a minute, and both write."""
  server.set_faults(denied_permissions=('storage.objects.update',))
  with pytest.raises(UserError, match=r'lock.json cannot .*objects\.update'):
    try_to_hold(workdir)


# Data.


def test_folder_of_images_in_a_bucket_is_the_local_one(
  server, workdir, tmp_path
):
  names = [f'train/{kind}/{i}.png' for kind in ('a', 'b') for i in range(9)]
  names += ['val/a/1.png', 'val/b/é [4].png']
  names += ['.hidden/2.png', 'train/.hidden/3.png']
  local = epath.Path(tmp_path) / 'data'
  write_images(local, names)
  (local / 'train/notes.txt').write_text('x')
  paths.copy(local, workdir)
  # As a bucket's console makes a folder.
  server.write('bucket', f'{str(workdir)[12:]}/val/', b'')
  found = [folders.find(make_small_config(d).data) for d in (local, workdir)]
  for split in SPLITS:
    ours, theirs = (splits[split] for splits in found)
    everything = np.arange(ours.num_examples)
    assert ours.names_digest(everything) == theirs.names_digest(everything)
    np.testing.assert_array_equal(ours.labels().values, theirs.labels().values)
    assert [ours.content(i) for i in everything] == [
      theirs.content(i) for i in everything
    ]
    read = [
      [c for _, c in s.read(everything, lambda x: x).as_numpy_iterator()]
      for s in (ours, theirs)
    ]
    assert read[0] == read[1]


def test_decoded_images_are_kept_until_an_object_is_written_again(
  server, workdir, tmp_path
):
  names = [f'{i}.png' for i in range(30)]
  local = epath.Path(tmp_path) / 'data'
  write_images(local, names)
  paths.copy(local, workdir)

  def fingerprints():
    paths.list_generations.cache_clear()  # As in another process.
    found = folders.find(make_small_config(workdir).data)
    return {split: found[split].fingerprint() for split in SPLITS}

  first = fingerprints()
  assert fingerprints() == first and len(set(first.values())) == 3
  split = folders.find(make_small_config(workdir).data)['test']
  path = epath.Path(split.name(0))
  path.write_bytes(path.read_bytes())
  second = fingerprints()
  assert [s for s in SPLITS if first[s] != second[s]] == ['test']


def test_cartoon_faces_are_rendered_into_a_bucket(
  server, workdir, monkeypatch, capsys
):
  monkeypatch.setattr(cartoon_faces, '_SPLIT_SIZES', dict.fromkeys(SPLITS, 3))
  with pytest.raises(UserError, match='there is no such bucket'):
    cartoon_faces.find(make_small_config('gs://mistyped/data').data)
  assert 'Preparing' not in capsys.readouterr().out
  for _ in range(2):  # The second time they are there.
    found = cartoon_faces.find(make_small_config(workdir).data)
  assert capsys.readouterr().out.count('Preparing') == 1
  assert found['test'].content(2).startswith(b'\xff\xd8')
  assert found['train'].num_examples == 3


# Which clients there are.


def test_model_is_loaded_from_a_bucket_without_tensorflow(
  server, workdir, trained_run
):
  paths.copy(trained_run, workdir)
  program = (
    'import sys, vae\n'
    f'ours = vae.load({str(workdir)!r})\n'
    f'theirs = vae.load({str(trained_run)!r})\n'
    'assert (ours.sample(3) == theirs.sample(3)).all() and ours.step\n'
    "assert not {'tensorflow', 'clu'} & sys.modules.keys()"
  )
  subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True)
