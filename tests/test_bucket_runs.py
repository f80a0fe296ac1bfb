"""Whole runs whose workdir and data are in a bucket, in processes of their own.

The bucket is a server on the loopback interface; the clients are real.
"""

import csv
import json
import re
import signal
import time

import pytest

from tests import bucket_server
from tests.celeba_builder import CelebA
from tests.ports import free_port
from tests.preloaded import run
from tests.test_main import check_same
from tests.test_main import final_state
from tests.test_main import finish
from tests.test_main import metrics
from tests.test_main import SMALL
from tests.test_main import start
from vae import checkpoints
from vae import paths

# What roles/storage.objectUser has.
PERMISSIONS = {
  f'storage.objects.{action}'
  for action in ('create', 'delete', 'get', 'list', 'update')
}


@pytest.fixture(scope='module')
def running():
  with (
    bucket_server.serve_in_process() as server,
    bucket_server.clients_sent_to(server),
  ):
    yield server


@pytest.fixture
def server(running):
  """One that denies whatever is no object, and fails now and then."""
  running.clear_log()
  running.set_faults(
    denied_permissions=('storage.buckets.*',),
    unavailable=0.01,
    writes_per_second=1,
    latency_ms=5,
  )
  yield running
  running.set_faults()
  assert running.permissions() <= PERMISSIONS


@pytest.fixture(scope='module')
def data(running, celeba_dir):
  """The images of `celeba_dir` in the bucket."""
  paths.copy(paths.expand(celeba_dir), paths.expand('gs://bucket/celeba'))
  return 'gs://bucket/celeba'


@pytest.fixture(scope='module')
def local(celeba_dir, tmp_path_factory):
  """An undisturbed run on a disk, and its flags but for the data's folder."""
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


def wait_for_checkpoint(process, workdir, after):
  """Until the bucket holds one of a later step, which is returned."""
  saved = checkpoints.Checkpoints(workdir)
  while (step := saved.latest_step() or 0) <= after:
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)
  return step


def test_killed_run_ends_in_the_bits_of_a_local_one(
  server, data, local, workdir
):
  undisturbed, flags = local
  flags = (*flags, f'--config.data.dir={data}', f'--workdir={workdir}')
  step = 0
  for _ in range(3):
    process = start(*flags, '--config.checkpoint.every_minutes=1e-9')
    step = wait_for_checkpoint(process, workdir, after=step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  assert 0 < step < 600
  code, out, err = run(*flags)
  assert code == 0 and 'goes on from step' in out, err
  assert final_state(workdir)[0] == 600
  check_same(workdir, undisturbed)


def test_results_of_a_run_in_a_bucket_are_those_of_a_local_one(
  server, data, local, workdir, celeba_dir, inception_file
):
  """Copied there, so that no bit of it differs; labels and weights too."""
  undisturbed, _ = local
  paths.copy(undisturbed, workdir)
  weights = workdir / 'weights.tgz'
  weights.write_bytes(inception_file.read_bytes())
  found = []
  for folder, images, network in (
    (workdir, data, weights),
    (undisturbed, celeba_dir, inception_file),
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
    pictures = {
      re.sub('data_dir=[0-9a-f]+', '', name): (folder / name).read_bytes()
      for name in names
      if name.endswith('.png')
    }
    assert any(name.endswith('report.html') for name in names)
    (path,) = (name for name in names if name.endswith('metrics.json'))
    results = json.loads((folder / path).read_text())
    assert results.pop('workdir') == str(folder) and results.pop('date')
    assert {'fid_samples', 'mig'} <= results['metrics'].keys()
    found.append((pictures, results))
  assert found[0] == found[1] and len(found[0][0]) > 5


def test_signal_stops_a_run_that_no_other_joins(server, data, local, workdir):
  _, flags = local
  flags = (*flags, f'--config.data.dir={data}', f'--workdir={workdir}')
  long = (*flags, '--config.train.num_epochs=100000')
  process = start(*long)
  while 'step' not in process.stdout.readline():
    assert process.poll() is None
  code, _, err = run(*long)
  assert code == 2 and err.count('\n') == 1
  assert f'{workdir} is in use by process {process.pid} on ' in err
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  assert 'Stopped at step' in out and 'Traceback' not in err
  step = checkpoints.latest_step(workdir)
  assert f'{step:,}, which is saved' in out
  assert not (workdir / 'lock.json').exists()
  steps = [row['step'] for row in metrics(workdir)]
  assert step - 2 < max(steps) <= step


def test_second_interrupt_ends_a_run_whose_bucket_hangs(
  running, data, local, workdir
):
  _, flags = local
  flags = (
    *flags,
    f'--config.data.dir={data}',
    f'--workdir={workdir}',
    '--config.train.num_epochs=100000',
  )
  process = start(*flags)
  while 'val:' not in process.stdout.readline():
    assert process.poll() is None
  running.set_faults(answers={'.': 'hang'})
  try:
    process.send_signal(signal.SIGINT)
    assert 'Ctrl-C again stops at once' in process.stderr.readline() + (
      process.stderr.readline()
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
  finally:
    running.set_faults()
  process.communicate()
  # What was in the bucket is there, and no other run is kept out.
  step = checkpoints.latest_step(workdir) or 0
  code, out, err = run(*flags, f'--config.train.num_epochs={step // 5 + 1}')
  assert code == 0, err
  assert f'goes on from step {step:,}' in out or not step


def test_two_processes_write_one_run(server, data, local, workdir):
  _, flags = local
  flags = (*flags, '--config.train.num_epochs=20', f'--config.data.dir={data}')
  address = f'127.0.0.1:{free_port()}'
  processes = [
    start(
      *flags,
      f'--workdir={workdir}',
      '--distributed',
      f'--coordinator_address={address}',
      '--num_processes=2',
      f'--process_id={process_id}',
    )
    for process_id in range(2)
  ]
  outputs = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  assert final_state(workdir)[0] == 100
  assert [r['step'] for r in metrics(workdir)][-1] == 100
  written = {
    entry.object: entry.client
    for entry in server.log()
    if entry.method == 'objects.insert' and str(workdir)[12:] in entry.object
  }
  assert len(written) > 10


def test_two_workers_share_a_sweep(server, data, local, workdir, tmp_path):
  _, flags = local
  flags = (
    *flags,
    '--config.train.num_epochs=20',
    f'--config.data.dir={data}',
    '--beta=0.05,20',
    '--latent_dim=2,3',
    f'--workdir={workdir}',
  )
  code, _, err = run(*flags, script='sweep.py')
  assert code == 2 and 'give --storage too' in err
  flags = (*flags, f'--storage={tmp_path}/sweep.db')
  workers = [start(*flags, script='sweep.py') for _ in range(2)]
  results = [finish(worker) for worker in workers]
  assert [code for code, *_ in results] == [0, 0], results
  table = (workdir / 'results.csv').read_text()
  rows = list(csv.DictReader(table.splitlines()))
  assert [row['state'] for row in rows] == ['complete'] * 4
  for row in rows:
    assert final_state(workdir / 'points' / row['point'])[0] == 100
  # Both took part, and no point was trained by both.
  trained = [set(re.findall(r'into (\S+)\.', out)) for _, out, _ in results]
  assert all(trained) and not set.intersection(*trained)
  assert len(set.union(*trained)) == 4
  assert 'All 4 points are complete' in (workdir / 'report.html').read_text()


def test_tfds_data_in_a_bucket_is_the_local_data(
  server, celeba_dir, local, workdir, tmp_path
):
  _, flags = local
  CelebA.folder = celeba_dir
  CelebA(data_dir=tmp_path / 'tfds').download_and_prepare()
  prepared = paths.expand(tmp_path) / 'tfds'
  paths.copy(prepared, workdir / 'tfds')
  folders = paths.expand(tmp_path) / 'run', workdir / 'run'
  places = prepared, workdir / 'tfds'
  for data_dir, folder in zip(places, folders, strict=True):
    code, _, err = run(
      *flags,
      '--config.train.num_epochs=20',
      f'--config.data.dir={data_dir}',
      f'--workdir={folder}',
    )
    assert code == 0, err
  check_same(*folders)
  # TensorFlow's client reads records, and gcsfs all else.
  records = {e.client for e in server.log() if 'tfrecord' in e.object}
  others = {e.client for e in server.log() if '/run/' in e.object}
  assert records - others and others, (records, others)


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (('--workdir=gs://mistyped/run',), 'there is no such bucket'),
    (('--config.data.dir=gs://mistyped/celeba',), 'no such folder'),
  ],
)
def test_missing_bucket_is_one_line(server, data, local, tmp_path, flags, said):
  start_time = time.monotonic()
  given = (f'--config.data.dir={data}', f'--workdir={tmp_path}', *flags)
  code, _, err = run(*local[1], *given)
  assert code == 2 and err.count('\n') == 1 and said in err, err
  assert time.monotonic() - start_time < 60
  assert len(server.log()) < 10
