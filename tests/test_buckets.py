"""Workdirs and data in a bucket; test_bucket_runs.py has whole runs.

All folders are named [...] and more, which patterns would match elsewhere.
"""

import asyncio
import os
import pathlib
import re
import subprocess
import sys
import time

from etils import epath
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from data import folder as folders
from data import SPLITS
from runs import metric_writer, workdirs
from tests.conftest import make_small_config, ROOT
from tests.test_checkpoints import state_at
from tests.test_folder import write_images
from vae import checkpoints, paths
from vae.checkpoints import Checkpoints, CheckpointWriter
from vae.errors import UserError


@pytest.fixture
def server(running, monkeypatch):
  """A server without faults; its clients retry without delay."""
  sleep = asyncio.sleep
  monkeypatch.setattr(
    'gcsfs.retry.asyncio.sleep', lambda seconds: sleep(seconds / 1000)
  )
  running.log.clear()
  yield running
  running.set_faults()


@pytest.fixture
def workdir(remote):
  return remote


def name_of(path):
  return str(path).removeprefix('gs://bucket/')


# Files.


def test_home_is_expanded_and_urls_stay_as_they_are(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  for given, expanded in (
    ('~', tmp_path),
    (pathlib.Path('~/runs/a'), tmp_path / 'runs/a'),
    ('runs/~', 'runs/~'),
    ('~no_such_user/a', '~no_such_user/a'),
  ):
    assert str(paths.expand(given)) == str(expanded)
  url = 'gs://bucket/~/a/../b'
  assert str(paths.expand(url)) == str(paths.absolute(url)) == url
  assert str(Checkpoints(url).directory) == f'{url}/checkpoints'
  with pytest.raises(UserError, match='s3://b/a is neither a local path nor'):
    paths.expand('s3://b/a')


def test_folder_of_a_bucket_is_like_a_local_one(server, workdir, tmp_path):
  for top in (workdir, epath.Path(tmp_path)):
    top.mkdir(parents=True, exist_ok=True)
    names = ['a/b/c.txt', 'a/d.txt', 'a[1]/f*', 'e', 'ä?/g']
    for name in names:
      (top / name).parent.mkdir(parents=True, exist_ok=True)
      paths.replace(top / name, name.encode())
    (top / 'a/empty').write_bytes(b'')
    assert paths.list_files(top) == sorted([*names, 'a/empty'])
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
  for index in range(130):  # More than a page of a listing.
    path = source / f'{index % 3}/{index}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(index))
  (source / 'large').write_bytes(os.urandom(12_000_000))  # Several requests.
  paths.copy(source, workdir)
  paths.copy(workdir, epath.Path(tmp_path) / 'target')
  compared = subprocess.run(
    ['diff', '-r', source, tmp_path / 'target'], capture_output=True
  )
  assert compared.returncode == 0, compared.stdout


@pytest.mark.parametrize(
  ('answer', 'kind', 'reason'),
  [
    (403, PermissionError, 'access denied: .* does not have .*access'),
    (401, PermissionError, 'no credentials for Google Cloud; run gcloud auth'),
    (503, OSError, 'the bucket answers .*503'),
    ('close', OSError, 'the bucket cannot be reached'),
  ],
)
def test_failures_are_os_errors_with_a_reason(
  server, workdir, answer, kind, reason
):
  """A file that cannot be looked for may exist."""
  path = workdir / 'file'
  path.write_text('x')
  server.set_faults(answers={'.': answer})
  for do in (
    path.read_bytes,
    lambda: path.write_text('x'),
    path.exists,
    path.is_dir,
    lambda: list(path.iterdir()),
    path.unlink,
    path.rmtree,
    lambda: paths.list_files(path),
  ):
    with pytest.raises(kind) as caught:
      do()
    assert type(caught.value) is kind and caught.value.errno
    assert re.search(reason, caught.value.strerror)
    assert '\n' not in caught.value.strerror


def test_failed_requests_are_retried(server, workdir):
  server.set_faults(unavailable=0.1, writes_per_second=100)
  for number in range(20):
    for _ in range(2):
      (workdir / 'a').write_text(str(number))
    assert (workdir / 'a').read_text() == str(number)
  assert {e.status for e in server.log if e.status >= 400} == {429, 503}


def test_missing_bucket_is_refused_and_not_made(server):
  with pytest.raises(UserError, match='written .there is no such bucket.; na'):
    workdirs.check_writable(paths.expand('gs://mistyped/run'), '--workdir')
  assert len(server.log) <= 3
  assert 'buckets.insert' not in {e.method for e in server.log}


# Checkpoints.


def test_damage_on_the_way_is_found_before_the_checkpoint_counts(
  server, workdir, monkeypatch
):
  copy, lines = paths.copy, []

  def damage(source, target):
    copy(source, target)
    if not paths.is_remote(source):
      server.write(f'{name_of(target)}/default/manifest.ocdbt', b'0' * 50)

  monkeypatch.setattr(paths, 'copy', damage)
  with CheckpointWriter(workdir, warn=lines.append) as writer:
    writer.save(1, state_at(1))
  assert Checkpoints(workdir).all_steps() == []
  (line,) = lines
  assert 'step 1 cannot be written' in line and 'cannot be read' in line


def test_failing_bucket_loses_no_checkpoint(server, workdir, monkeypatch):
  monkeypatch.setattr(checkpoints, '_SECONDS_TO_RETRY', 0.1)
  lines = []
  server.set_faults(answers={'objects.insert': 503})
  with CheckpointWriter(workdir, warn=lines.append) as writer:
    writer.save(1, state_at(1), {'val/loss': 1.0})
    with pytest.raises(UserError, match='the bucket answers .*503'):
      writer.finish(patience=0.2)
    server.set_faults()
    writer.finish(patience=60)
  saved = Checkpoints(workdir)
  assert saved.all_steps() == [1] and len(lines) == 2
  for pattern in 'objects.list', 'objects.get .*/1/contents':
    server.set_faults(answers={pattern: 503})
    with pytest.raises(UserError, match='cannot be read .*503'):
      saved.find('best')
    with pytest.raises(UserError, match='cannot be read .*503'):
      saved.restore_last(state_at(0))
  server.set_faults()
  assert saved.restore_last(state_at(0)).state['step'] == 1


# Metrics.


@pytest.fixture
def slow_mirror(monkeypatch):
  """Copies only when asked to."""
  monkeypatch.setattr(paths, '_SECONDS_BETWEEN_COPIES', 1e6)


def rows(workdir):
  return [row['step'] for row in metric_writer.read(workdir)]


def test_metrics_are_in_the_bucket_when_a_checkpoint_needs_them(
  server, slow_mirror, workdir
):
  writer = metric_writer.MetricWriter(workdir)
  for step in (1, 2):
    writer.write_scalars(step, {'train/loss': 1.5})
  wait = writer.flush()
  server.log.clear()
  writer.write_scalars(3, {'train/loss': 1.5})
  assert not server.log  # The loop waits for no request.
  wait()
  assert rows(workdir)[:2] == [1, 2]
  # Killed, and started again.
  again = metric_writer.MetricWriter(workdir)
  again.rewind(1, validated=True)
  assert rows(workdir) == [1]
  again.write_scalars(2, {'train/loss': 1.5})
  again.close()
  assert rows(workdir) == [1, 2]


def test_changes_of_a_folder_are_copied_in_few_requests(
  server, workdir, monkeypatch
):
  monkeypatch.setattr(paths, '_SECONDS_BETWEEN_COPIES', 0.1)
  mirror = paths.Mirror(workdir, print)
  (mirror.folder / '0123.partial').write_text('x')
  with (mirror.folder / 'metrics.jsonl').open('a') as file:
    for _ in range(100):
      file.write('x')
      file.flush()
      time.sleep(0.01)
  mirror.close()
  assert paths.list_files(workdir) == ['metrics.jsonl']
  assert (workdir / 'metrics.jsonl').read_text() == 'x' * 100
  assert 2 <= sum(e.method == 'objects.insert' for e in server.log) < 30


def test_refused_metrics_warn_and_are_kept(server, workdir, monkeypatch):
  monkeypatch.setattr(paths, '_SECONDS_BETWEEN_COPIES', 0.05)
  server.set_faults(answers={'objects.insert': 403})
  lines = []
  mirror = paths.Mirror(workdir, lines.append)
  (mirror.folder / 'metrics.jsonl').write_text('x')
  while not lines:
    time.sleep(0.01)
  with pytest.raises(OSError):
    mirror.close()
  assert len(lines) == 1 and 'cannot be written' in lines[0]
  assert (mirror.folder / 'metrics.jsonl').read_text() == 'x'


def test_tensorboard_of_a_bucket_has_the_points_of_a_local_one(
  server, slow_mirror, workdir, tmp_path, monkeypatch
):
  monkeypatch.setattr(metric_writer, '_SECONDS_OF_PIECE', 1.0)
  for folder in (workdir, epath.Path(tmp_path) / 'local'):
    folder.mkdir(exist_ok=True)
    writer = metric_writer.MetricWriter(folder)
    for step in range(1, 7):
      writer.write_scalars(step, {'train/loss': step / 8})
      if step % 3 == 0:
        picture = np.full((4, 4, 3), step, np.uint8)
        writer.write_images(step, {'samples': picture})
        time.sleep(1.1)  # As long as an epoch, at least.
    writer.close()
  paths.copy(workdir, epath.Path(tmp_path) / 'remote')
  found = []
  for name in ('local', 'remote'):
    folder = str(tmp_path / name)
    events = event_accumulator.EventAccumulator(folder)
    events.Reload()
    tags = events.Tags()['tensors']
    found.append(
      {t: [(e.step, e.tensor_proto) for e in events.Tensors(t)] for t in tags}
    )
  assert found[0] == found[1] and len(found[0]['train/loss']) == 6


# Data.


def test_images_of_a_bucket_are_those_of_a_folder(server, workdir, tmp_path):
  names = [f'train/{kind}/{i}.png' for kind in ('a', 'b') for i in range(9)]
  names += ['val/a/1.png', 'val/b/é [4].png', 'train/.hidden/3.png']
  local = epath.Path(tmp_path) / 'data'
  write_images(local, names)
  (local / 'train/notes.txt').write_text('x')
  paths.copy(local, workdir)
  server.write(f'{name_of(workdir)}/val/', b'')  # A folder, by a console.
  found = [folders.find(make_small_config(d).data) for d in (local, workdir)]
  for split in SPLITS:
    ours, theirs = (splits[split] for splits in found)
    everything = np.arange(ours.num_examples)
    assert ours.names_digest(everything) == theirs.names_digest(everything)
    np.testing.assert_array_equal(ours.labels().values, theirs.labels().values)
    read = [
      [c for _, c in s.read(everything, lambda x: x).as_numpy_iterator()]
      for s in (ours, theirs)
    ]
    assert read[0] == read[1]

  def fingerprints():
    paths.list_generations.cache_clear()  # As in another process.
    found = folders.find(make_small_config(workdir).data)
    return {split: found[split].fingerprint() for split in SPLITS}

  # They change when an object is written again.
  first = fingerprints()
  assert fingerprints() == first and len(set(first.values())) == 3
  path = workdir / 'val/a/1.png'
  path.write_bytes(path.read_bytes())
  second = fingerprints()
  assert [s for s in SPLITS if first[s] != second[s]] == ['validation']


def test_model_is_loaded_from_a_bucket_without_tensorflow(
  server, workdir, trained_run
):
  paths.copy(trained_run, workdir)
  program = (
    'import sys, train, vae\n'
    f'ours = vae.load({str(workdir)!r})\n'
    f'theirs = vae.load({str(trained_run)!r})\n'
    'assert (ours.sample(3) == theirs.sample(3)).all() and ours.step\n'
    "assert not {'tensorflow', 'clu', 'tensorboard'} & sys.modules.keys()"
  )
  output = subprocess.check_output(
    [sys.executable, '-c', program], cwd=ROOT, stderr=subprocess.STDOUT
  )
  assert output == b''
