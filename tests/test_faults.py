"""Runs that are killed, stopped and starved at random moments.

Each ends with the bits and metrics of an undisturbed run. `make test-faults`
runs these tests, which take minutes.
"""

import contextlib
import random
import shutil
import signal
import subprocess
import threading
import time

import jax
import numpy as np
import pytest

from tests import test_main
from vae.checkpoints import Checkpoints

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
  """A run, its flags, and the seconds that its training took."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  flags = *FLAGS, f'--config.data.dir={celeba_dir}'
  flags = *flags, '--config.train.num_epochs=600'
  process = test_main.start(*flags, f'--workdir={workdir}')
  wait_for(process)
  start = time.monotonic()
  out, err = process.communicate(timeout=900)
  assert process.returncode == 0 and 'Trained steps 1 to 3,000' in out, err
  return workdir, flags, time.monotonic() - start


@pytest.fixture(scope='module')
def undisturbed_pair(undisturbed, tmp_path_factory):
  """A run of two processes, its flags, and how many seconds to wait at most."""
  _, flags, seconds = undisturbed
  flags = (*flags, '--config.train.num_epochs=200')
  workdir = tmp_path_factory.mktemp('undisturbed_pair')
  finish_two(*flags, f'--workdir={workdir}')
  return workdir, flags, seconds / 12


@pytest.fixture
def table(record_property):
  """Adds a row to the table that the tests end with."""
  return lambda fault, tried, lost: record_property(
    'faults', [fault, tried, tried, lost]
  )


def wait_for(process, text='Training'):
  """Until training begins; with `images/s`, until steps are made."""
  while text not in (line := process.stdout.readline()):
    assert line, process.stderr.read()


def steps_done(workdir):
  return max(Checkpoints(workdir).all_steps(), default=0)


def finish(*flags):
  code, out, err = test_main.run(*flags)
  assert code == 0 and 'from step' in out, err


def finish_two(*flags):
  for process in test_main.start_two(*flags, devices=2):
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err


def joined(rows, whole):
  """Rows of which a stop has cut some in two, cut as in another run."""
  ends, found, parts, last = {row['step'] for row in whole}, [], [], 0
  for row in rows:
    if 'val/loss' not in row:
      parts.append((row['step'] - last, row))
      last = row['step']
      if last not in ends:
        continue
      total = sum(count for count, _ in parts)
      row = {
        key: sum(count * part[key] for count, part in parts) / total
        if key.startswith('train/')
        else value
        for key, value in row.items()
      }
      parts = []
    found.append(row)
  return found


def check_stopped(workdir, other):
  """The same bits, rows and best, but for where a stop ended a row."""
  states = test_main.final_state(workdir), test_main.final_state(other)
  jax.tree.map(np.testing.assert_array_equal, *states)
  whole, rows = test_main.metrics(other), test_main.metrics(workdir)
  rows = joined(rows, whole)
  assert len(rows) == len(whole)
  for row, expected in zip(rows, whole, strict=True):
    for key in expected.keys() - {'images_per_second'}:
      assert row[key] == pytest.approx(expected[key], rel=1e-12), row
  best = [Checkpoints(w).best_step() for w in (workdir, other)]
  assert best[0] == best[1]


def test_sigkill_at_random_moments(undisturbed, tmp_path, table):
  workdir, flags, seconds = undisturbed
  chance, kills, lost = random.Random(0), 25, []
  flags = *flags, f'--workdir={tmp_path}'
  for kill in range(kills):
    cache = f'--config.data.cache={CACHES[kill % 3]}'
    process = test_main.start(*flags, cache)
    if kill % 3 == 0:
      time.sleep(chance.uniform(0, 12))  # It starts, restores or trains.
    else:
      wait_for(process)
      time.sleep(chance.uniform(0, seconds / 12))
    process.kill()
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f'ended before: {out}{err}'
    rows = [row['step'] for row in test_main.metrics(tmp_path)]
    lost.append(max(rows, default=0) - steps_done(tmp_path))
  assert 0 < steps_done(tmp_path) < 3000
  finish(*flags)
  test_main.check_same(tmp_path, workdir)
  lost = f'at most {max(lost)} steps, made again; no bit'
  table('SIGKILL at random moments of one run', kills, lost)


@pytest.mark.parametrize(
  ('number', 'status', 'times'),
  [(signal.SIGTERM, 0, 10), (signal.SIGINT, 130, 5), (signal.SIGUSR1, 0, 5)],
)
def test_signal_at_random_moments(
  undisturbed, tmp_path, number, status, times, table
):
  workdir, flags, seconds = undisturbed
  chance, took = random.Random(1), []
  flags = *flags, f'--workdir={tmp_path}'
  for index in range(times):
    process = test_main.start(
      *flags, f'--config.data.cache={CACHES[index % 3]}'
    )
    wait_for(process, ('Training', 'images/s')[index % 2])
    time.sleep(chance.uniform(0, seconds / times))
    before = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    took.append(time.monotonic() - before)
    assert process.returncode == status and 'Traceback' not in err, err
  assert 0 < steps_done(tmp_path) < 3000
  finish(*flags)
  check_stopped(tmp_path, workdir)
  lost = f'nothing; ended within {max(took):.1f} s'
  table(f'{number.name} at random moments of one run', times, lost)


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


def test_full_disk(undisturbed, small_disk, table):
  """It is filled while the run trains, and emptied after the warning."""
  workdir, flags, seconds = undisturbed
  run, ballast = small_disk / 'run', small_disk / 'ballast'
  process = test_main.start(*flags, f'--workdir={run}')
  wait_for(process)
  # Threads read both pipes: the run would wait for a full one.
  lines, listeners = [], []
  for target in (lambda: lines.extend(process.stderr), process.stdout.read):
    listeners.append(threading.Thread(target=target, daemon=True))
    listeners[-1].start()

  def wait_until(text, times):
    deadline = time.monotonic() + 120
    while ''.join(lines).count(text) < times:
      assert time.monotonic() < deadline, lines
      time.sleep(0.05)

  fillings = 5
  for filling in range(1, fillings + 1):
    time.sleep(seconds / 30)
    with open(ballast, 'wb', buffering=0) as file:
      with contextlib.suppress(OSError):
        while True:
          file.write(b'\0' * 4096)
    wait_until('cannot be written into', filling)
    before = Checkpoints(run).all_steps()
    time.sleep(seconds / 60)
    after = Checkpoints(run).all_steps()
    # All are kept, unless a failed try left room for a later checkpoint.
    assert set(before) <= set(after) or max(after) > max(before)
    ballast.unlink()
    wait_until('could be written', filling)
  process.wait(timeout=900)
  for listener in listeners:
    listener.join()
  err = ''.join(lines)
  assert process.returncode == 0 and 'Traceback' not in err, err
  assert 'No space left' in err
  test_main.check_same(run, workdir)
  table('full disk while a run trains', fillings, 'nothing')


def test_kill_of_one_of_two_processes(undisturbed_pair, tmp_path, table):
  workdir, flags, seconds = undisturbed_pair
  chance, took, kills = random.Random(2), [], 6
  flags = *flags, f'--workdir={tmp_path}'
  for kill in range(kills):
    processes = test_main.start_two(*flags, devices=2)
    wait_for(processes[0], ('Training', 'images/s')[kill % 3 > 0])
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
  finish_two(*flags)
  test_main.check_same(tmp_path, workdir)
  lost = f'no bit; the other ended within {max(took):.1f} s'
  table('SIGKILL of one of two processes', kills, lost)


def test_signal_to_one_of_two_processes(undisturbed_pair, tmp_path, table):
  """Both stop at one step."""
  workdir, flags, seconds = undisturbed_pair
  chance, took, tries = random.Random(3), [], 6
  flags = *flags, f'--workdir={tmp_path}'
  for index in range(tries):
    processes = test_main.start_two(*flags, devices=2)
    wait_for(processes[0], 'images/s')
    time.sleep(chance.uniform(0, seconds))
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[index // 2]
    processes[index % 2].send_signal(number)
    before = time.monotonic()
    for place, process in enumerate(processes):
      out, err = process.communicate(timeout=120)
      interrupted = number == signal.SIGINT and place == index % 2
      assert process.returncode == (130 if interrupted else 0), err
      assert 'Traceback' not in err
      assert place or 'Stopped at step ' in out
    took.append(time.monotonic() - before)
  assert 0 < steps_done(tmp_path) < 1000
  finish_two(*flags)
  check_stopped(tmp_path, workdir)
  lost = f'nothing; both ended within {max(took):.1f} s'
  table('SIGTERM, SIGINT or SIGUSR1 to one of two processes', tries, lost)


def test_last_checkpoint_damaged_between_two_starts(
  undisturbed, tmp_path, table
):
  """Files missing, cut short and flipped; then the run is started again."""
  workdir, flags, _ = undisturbed
  names = [
    path.relative_to(workdir)
    for path in sorted(workdir.glob('checkpoints/3000/**/*'))
    if path.name in ('manifest.ocdbt', '_METADATA', 'metadata')
    or path.parent.name == 'd'
  ]
  tried = 0
  for name in names:
    content = (workdir / name).read_bytes()
    middle = len(content) // 2
    flipped = bytearray(content)
    flipped[middle] ^= 0x10
    for damaged in (None, content[:middle], bytes(flipped)):
      copy = tmp_path / 'run' / name
      # The last one's run continues, if its files have the same names.
      if tried % 4 == 0 or not copy.exists():
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        shutil.copytree(workdir, tmp_path / 'run')
      copy.unlink() if damaged is None else copy.write_bytes(damaged)
      code, out, err = test_main.run(*flags, f'--workdir={tmp_path}/run')
      assert code == 0 and 'Traceback' not in err, err
      assert 'is damaged' in err or 'this run is finished' in out
      test_main.check_same(tmp_path / 'run', workdir)
      tried += 1
  assert tried > 10
  lost = 'the steps since the one before, made again; no bit'
  table('damaged last checkpoint, and another start', tried, lost)
