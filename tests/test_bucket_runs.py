"""Whole runs in processes of their own, with workdir and data in a bucket."""

import csv
import json
import re
import signal
import time

import pytest

from tests.celeba_builder import CelebA
from tests.preloaded import run
from tests.test_main import check_same, finish, metrics, SMALL, start, start_two
from vae import paths
from vae.checkpoints import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('users_programs')]

# roles/storage.objectUser.
PERMISSIONS = {
  f'storage.objects.{action}'
  for action in ('create', 'delete', 'get', 'list', 'update')
}


@pytest.fixture
def server(running):
  """It denies everything but objects, and fails now and then."""
  running.log.clear()
  running.set_faults(
    denied_permissions=('storage.buckets.*',),
    unavailable=0.01,
    writes_per_second=1,
    latency_ms=5,
  )
  yield running
  running.set_faults()
  assert {p for e in running.log for p in e.permissions} <= PERMISSIONS


@pytest.fixture(scope='module')
def data(running, celeba_dir):
  """The images of `celeba_dir` in the bucket."""
  paths.copy(paths.expand(celeba_dir), paths.expand('gs://bucket/celeba'))
  return 'gs://bucket/celeba'


@pytest.fixture(scope='module')
def local(celeba_dir, tmp_path_factory):
  """An undisturbed run on a disk, and its flags without the data's folder."""
  workdir = tmp_path_factory.mktemp('run')
  flags = (
    *SMALL,
    '--config.train.num_epochs=120',
    '--config.eval.every_epochs=20',
  )
  code, _, err = run(
    *flags, f'--config.data.dir={celeba_dir}', f'--workdir={workdir}'
  )
  assert code == 0, err
  return paths.expand(workdir), flags


@pytest.fixture
def workdir(tmp_path):
  return paths.expand(f'gs://bucket/runs/{tmp_path.name}')


@pytest.fixture
def flags(local, data, workdir):
  return *local[1], f'--config.data.dir={data}', f'--workdir={workdir}'


def fetched(workdir, tmp_path):
  """The checkpoints of a copy on the disk."""
  paths.copy(workdir, paths.expand(tmp_path) / 'fetched')
  return Checkpoints(tmp_path / 'fetched')


def test_killed_run_ends_in_the_bits_of_a_local_one(
  server, local, workdir, flags, tmp_path
):
  saved, step = Checkpoints(workdir), 0
  for _ in range(2):
    process = start(*flags, '--config.checkpoint.every_minutes=1e-9')
    while max(saved.all_steps(), default=0) <= step:
      assert process.poll() is None, process.communicate()
      time.sleep(0.2)
    step = saved.all_steps()[-1]
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  assert 0 < step < 600
  code, out, err = run(*flags)
  assert code == 0 and 'from step' in out, err
  assert fetched(workdir, tmp_path).all_steps()[-1] == 600
  check_same(tmp_path / 'fetched', local[0])


def test_signal_stops_a_run_that_no_other_joins(server, workdir, flags):
  flags = (*flags, '--config.train.num_epochs=100000')
  process = start(*flags)
  while 'step' not in process.stdout.readline():
    assert process.poll() is None
  code, _, err = run(*flags)
  assert code == 2 and err.count('\n') == 1
  assert f'{workdir} is in use by process {process.pid} on ' in err
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0 and 'Traceback' not in err, err
  step = Checkpoints(workdir).all_steps()[-1]
  assert f'{step:,}, which is saved' in out
  assert not (workdir / 'lock.json').exists()
  assert step - 2 < max(row['step'] for row in metrics(workdir)) <= step


def test_second_interrupt_ends_a_run_whose_bucket_hangs(
  running, workdir, flags
):
  flags = (*flags, '--config.train.num_epochs=100000')
  process = start(*flags)
  while 'val:' not in process.stdout.readline():
    assert process.poll() is None
  running.set_faults(answers={'.': 'hang'})
  try:
    process.send_signal(signal.SIGINT)
    lines = process.stderr.readline() + process.stderr.readline()
    assert 'Ctrl-C again' in lines
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
  finally:
    running.set_faults()
  process.communicate()
  # The bucket keeps its checkpoints, and keeps no other run out.
  step = max(Checkpoints(workdir).all_steps(), default=0)
  code, out, err = run(*flags, f'--config.train.num_epochs={step // 5 + 1}')
  assert code == 0 and (f'from step {step:,}' in out or not step), err


def test_two_processes_write_one_run(server, workdir, flags):
  processes = start_two(*flags, '--config.train.num_epochs=20')
  outputs = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  assert Checkpoints(workdir).all_steps()[-1] == 100
  assert metrics(workdir)[-1]['step'] == 100


def test_two_workers_share_a_sweep(server, workdir, flags, tmp_path):
  flags = (
    *flags,
    '--config.train.num_epochs=20',
    '--beta=0.05,20',
    '--latent_dim=2,3',
    f'--storage={tmp_path}/sweep.db',
  )
  workers = [start(*flags, script='sweep.py') for _ in range(2)]
  results = [finish(worker) for worker in workers]
  assert [code for code, *_ in results] == [0, 0], results
  table = (workdir / 'results.csv').read_text()
  rows = list(csv.DictReader(table.splitlines()))
  assert [row['state'] for row in rows] == ['complete'] * 4
  for row in rows:
    point = Checkpoints(workdir / 'points' / row['point'])
    assert point.all_steps()[-1] == 100
  # No point was trained by both.
  trained = [set(re.findall(r'into (\S+)\.', out)) for _, out, _ in results]
  assert len(trained[0] | trained[1]) == 4 and not trained[0] & trained[1]


def test_results_of_a_run_in_a_bucket_are_those_of_a_local_one(
  server, data, local, workdir, celeba_dir, inception_file
):
  """The run is copied there; data, labels and weights lie there too."""
  paths.copy(local[0], workdir)
  weights = workdir / 'weights.tgz'
  weights.write_bytes(inception_file.read_bytes())
  found = []
  for folder, images, network in (
    (workdir, data, weights),
    (local[0], celeba_dir, inception_file),
  ):
    code, _, err = run(
      f'--workdir={folder}',
      f'--data_dir={images}',
      f'--inception_weights={network}',
      '--importance_samples=4',
      script='evaluate.py',
    )
    assert code == 0, err
    code, _, err = run('sample', f'--workdir={folder}', script='generate.py')
    assert code == 0, err
    names = [
      name
      for name in paths.list_files(folder)
      if name.startswith(('evaluation/', 'generated/'))
    ]
    (path,) = (name for name in names if name.endswith('metrics.json'))
    results = json.loads((folder / path).read_text())
    assert results.pop('workdir') == str(folder) and results.pop('date')
    pictures = {
      name.rpartition('/')[2]: (folder / name).read_bytes()
      for name in names
      if name.endswith('.png')
    }
    found.append((pictures, results))
  assert found[0] == found[1] and len(found[0][0]) > 5
  assert {'fid_samples', 'mig'} <= found[0][1]['metrics'].keys()


def test_tfds_data_in_a_bucket_is_the_local_data(
  server, celeba_dir, local, workdir, tmp_path
):
  CelebA.folder = celeba_dir
  CelebA(data_dir=tmp_path / 'tfds').download_and_prepare()
  prepared = paths.expand(tmp_path) / 'tfds'
  paths.copy(prepared, workdir / 'tfds')
  folders = paths.expand(tmp_path) / 'run', workdir / 'run'
  for data_dir, folder in zip(
    (prepared, workdir / 'tfds'), folders, strict=True
  ):
    code, _, err = run(
      *local[1],
      '--config.train.num_epochs=4',
      f'--config.data.dir={data_dir}',
      f'--workdir={folder}',
    )
    assert code == 0, err
  paths.copy(folders[1], paths.expand(tmp_path) / 'fetched')
  check_same(tmp_path / 'fetched', folders[0])
  # TensorFlow's client reads records, and gcsfs all else.
  records = {e.client for e in server.log if 'tfrecord' in e.object}
  others = {e.client for e in server.log if '/run/' in e.object}
  assert records - others and others, (records, others)
