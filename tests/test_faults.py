"""A real run that is killed, stopped and starved, over and over.

At its end it must have the bits, and have told the metrics, of a run that
nothing disturbed. `make test-faults` runs these; they take minutes.
"""

import contextlib
import random
import shutil
import signal
import subprocess
import threading
import time

import pytest

from tests import test_main
from tests.ports import free_port
from vae import checkpoints

pytestmark = pytest.mark.faults

CACHES = ('none', 'host', 'device')

FLAGS = (
  '--config=configs/celeba.py',
  '--config.data.image_size=32',
  '--config.data.decoded_dir=',
  '--config.model.hidden_channels=(8,16,32)',
  '--config.model.latent_dim=3',
  '--config.train.batch_size=8',
  # Steps of a dispatch, of a row and of an epoch (5) have nothing in common.
  '--config.train.steps_per_dispatch=2',
  '--config.train.log_every_steps=3',
  '--config.eval.every_epochs=50',
  '--config.checkpoint.every_minutes=0.01',
)


@pytest.fixture(scope='module')
def undisturbed(celeba_dir, tmp_path_factory):
  """A run, its flags and how many seconds of training it took."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  flags = (
    *FLAGS,
    f'--config.data.dir={celeba_dir}',
    '--config.train.num_epochs=600',
  )
  process = test_main.start(*flags, f'--workdir={workdir}')
  wait_for_training(process)
  start = time.monotonic()
  out, err = process.communicate(timeout=900)
  assert process.returncode == 0 and 'Trained steps 1 to 3,000' in out, err
  return workdir, flags, time.monotonic() - start


def wait_for_training(process, line_with='Training'):
  """Until it begins; with `images/s` until steps are made."""
  while line_with not in (line := process.stdout.readline()):
    assert line, process.stderr.read()


def steps_done(workdir):
  return checkpoints.latest_step(workdir) or 0


def test_sigkill_at_random_moments(undisturbed, tmp_path, record_property):
  workdir, flags, seconds = undisturbed
  chance, kills, lost = random.Random(0), 25, []
  for kill in range(kills):
    cache = f'--config.data.cache={CACHES[kill % 3]}'
    process = test_main.start(*flags, cache, f'--workdir={tmp_path}')
    if kill % 3 == 0:
      # While it starts, restores, or trains, as it comes.
      time.sleep(chance.uniform(0, 12))
    else:
      wait_for_training(process)
      time.sleep(chance.uniform(0, seconds / 12))
    process.kill()
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f'ended before: {out}{err}'
    rows = [row['step'] for row in test_main.metrics_of_a_killed_run(tmp_path)]
    lost.append(max(rows, default=0) - steps_done(tmp_path))
  assert 0 < steps_done(tmp_path) < 3000
  code, out, err = test_main.run(*flags, f'--workdir={tmp_path}')
  assert code == 0 and 'goes on from step' in out, err
  test_main.check_same(tmp_path, workdir)
  record_property(
    'faults',
    [
      'SIGKILL at random moments of one run',
      kills,
      kills,
      f'at most {max(lost)} steps, made again; no bit',
    ],
  )


@pytest.mark.parametrize(
  ('number', 'status', 'times'),
  [(signal.SIGTERM, 0, 10), (signal.SIGINT, 130, 5), (signal.SIGUSR1, 0, 5)],
)
def test_signals_that_ask_to_stop(
  undisturbed, tmp_path, number, status, times, record_property
):
  workdir, flags, seconds = undisturbed
  chance, took = random.Random(1), []
  for time_ in range(times):
    cache = f'--config.data.cache={CACHES[time_ % 3]}'
    process = test_main.start(*flags, cache, f'--workdir={tmp_path}')
    wait_for_training(process, ('Training', 'images/s')[time_ % 2])
    time.sleep(chance.uniform(0, seconds / times))
    before = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    took.append(time.monotonic() - before)
    assert process.returncode == status, err
    assert 'Traceback' not in err
  assert 0 < steps_done(tmp_path) < 3000
  code, _, err = test_main.run(*flags, f'--workdir={tmp_path}')
  assert code == 0, err
  test_main.check_same(tmp_path, workdir)
  record_property(
    'faults',
    [
      f'{number.name} at random moments of one run',
      times,
      times,
      f'nothing; ended within {max(took):.1f} s',
    ],
  )


@pytest.fixture
def small_disk(tmp_path):
  """A file system of its own, of 16 MB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', str(folder)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('only root may mount a file system')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def test_full_disk(undisturbed, small_disk, record_property):
  """It is filled while the run trains, and emptied when the run complains."""
  workdir, flags, seconds = undisturbed
  run, ballast = small_disk / 'run', small_disk / 'ballast'
  process = test_main.start(*flags, f'--workdir={run}')
  wait_for_training(process)
  # Read as they come, by threads: who has a full pipe waits.
  said, listeners = [], []
  for target in (lambda: said.extend(process.stderr), process.stdout.read):
    listeners.append(threading.Thread(target=target, daemon=True))
    listeners[-1].start()

  def wait_until_said(what, times):
    deadline = time.monotonic() + 120
    while ''.join(said).count(what) < times:
      assert time.monotonic() < deadline, said
      time.sleep(0.05)

  fillings = 5
  for filling in range(1, fillings + 1):
    time.sleep(seconds / 30)
    with open(ballast, 'wb', buffering=0) as file:
      with contextlib.suppress(OSError):
        while True:
          file.write(b'\0' * 4096)
    wait_until_said('cannot be written into', filling)
    before = checkpoints.Checkpoints(run).all_steps()
    time.sleep(seconds / 60)
    after = checkpoints.Checkpoints(run).all_steps()
    # None is deleted, unless what a failed try let go of had room for a later.
    assert set(before) <= set(after) or max(after) > max(before)
    ballast.unlink()
    wait_until_said('could be written', filling)
  process.wait(timeout=900)
  for listener in listeners:
    listener.join()
  said = ''.join(said)
  assert process.returncode == 0, said
  assert 'Traceback' not in said and 'No space left' in said
  test_main.check_same(run, workdir)
  record_property(
    'faults',
    ['full disk while a run trains', fillings, fillings, 'nothing'],
  )


def start_two(*flags):
  address = f'127.0.0.1:{free_port()}'
  return [
    test_main.start(
      *flags,
      '--distributed',
      f'--coordinator_address={address}',
      '--num_processes=2',
      f'--process_id={index}',
      devices=2,
    )
    for index in range(2)
  ]


@pytest.fixture(scope='module')
def undisturbed_pair(undisturbed, tmp_path_factory):
  """A run of two processes, its flags and how many seconds to wait at most."""
  _, flags, seconds = undisturbed
  flags = (*flags, '--config.train.num_epochs=200')
  workdir = tmp_path_factory.mktemp('undisturbed_pair')
  finish_two(*flags, f'--workdir={workdir}')
  return workdir, flags, seconds / 12


def finish_two(*flags):
  for process in start_two(*flags):
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err


def test_two_processes_of_which_one_is_killed(
  undisturbed_pair, tmp_path, record_property
):
  workdir, flags, seconds = undisturbed_pair
  chance, took, kills = random.Random(2), [], 6
  for kill in range(kills):
    processes = start_two(*flags, f'--workdir={tmp_path}')
    wait_for_training(processes[0], ('Training', 'images/s')[kill % 3 > 0])
    time.sleep(chance.uniform(0, seconds))
    processes[kill % 2].kill()
    before = time.monotonic()
    other = processes[1 - kill % 2]
    _, err = other.communicate(timeout=120)
    took.append(time.monotonic() - before)
    processes[kill % 2].communicate()
    # JAX's own service aborts a process if it is the first to notice.
    assert other.returncode in (2, -signal.SIGABRT), err
    if other.returncode == 2:
      assert 'error: the processes of this run can no longer work' in err
      assert err.strip().endswith('they go on from the last checkpoint.')
  assert 0 < steps_done(tmp_path) < 1000
  finish_two(*flags, f'--workdir={tmp_path}')
  test_main.check_same(tmp_path, workdir)
  record_property(
    'faults',
    [
      'SIGKILL of one of two processes',
      kills,
      kills,
      f'no bit; the other ended within {max(took):.1f} s',
    ],
  )


def test_two_processes_of_which_one_is_asked_to_stop(
  undisturbed_pair, tmp_path, record_property
):
  """While the first saves every now and then; both stop at one step."""
  workdir, flags, seconds = undisturbed_pair
  chance, took, tries = random.Random(3), [], 6
  for time_ in range(tries):
    processes = start_two(*flags, f'--workdir={tmp_path}')
    wait_for_training(processes[0], 'images/s')
    time.sleep(chance.uniform(0, seconds))
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[time_ // 2]
    processes[time_ % 2].send_signal(number)
    before = time.monotonic()
    for index, process in enumerate(processes):
      out, err = process.communicate(timeout=120)
      interrupted = number == signal.SIGINT and index == time_ % 2
      assert process.returncode == (130 if interrupted else 0), err
      assert 'Traceback' not in err
      if not index:
        assert 'Stopped at step ' in out
    took.append(time.monotonic() - before)
  assert 0 < steps_done(tmp_path) < 1000
  finish_two(*flags, f'--workdir={tmp_path}')
  test_main.check_same(tmp_path, workdir)
  record_property(
    'faults',
    [
      'SIGTERM, SIGINT or SIGUSR1 to one of two processes',
      tries,
      tries,
      f'nothing; both ended within {max(took):.1f} s',
    ],
  )


def test_last_checkpoint_damaged_between_two_starts(
  undisturbed, tmp_path, record_property
):
  """Each class of damage to each file, then another start of the run."""
  workdir, flags, _ = undisturbed
  tried = 0
  folder = max((workdir / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  files = [p.relative_to(folder) for p in folder.rglob('*') if p.is_file()]
  chosen = [
    f
    for f in sorted(files)
    if f.name in ('manifest.ocdbt', '_METADATA', 'metrics', 'metadata')
    or f.parent.name == 'd'
  ]
  shutil.copytree(workdir, tmp_path / 'run')
  for name in chosen:
    path = folder / name
    content = path.read_bytes()
    for damaged in (
      None,
      content[: len(content) // 2],
      content[: len(content) // 2]
      + bytes([content[len(content) // 2] ^ 0x10])
      + content[len(content) // 2 + 1 :],
    ):
      if tried % 4 == 0:
        # As it was; the others go on from what the one before left.
        shutil.rmtree(tmp_path / 'run')
        shutil.copytree(workdir, tmp_path / 'run')
      copy = tmp_path / 'run' / 'checkpoints' / folder.name / name
      if not copy.exists():
        continue
      copy.unlink() if damaged is None else copy.write_bytes(damaged)
      code, out, err = test_main.run(*flags, f'--workdir={tmp_path}/run')
      assert code == 0 and 'Traceback' not in err, err
      assert 'is damaged' in err or 'this run is finished' in out
      test_main.check_same(tmp_path / 'run', workdir)
      tried += 1
  assert tried > 10
  record_property(
    'faults',
    [
      'damaged last checkpoint, and another start',
      tried,
      tried,
      'the steps since the one before, made again; no bit',
    ],
  )
