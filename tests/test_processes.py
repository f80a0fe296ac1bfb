import os
import signal
import subprocess
import sys

import jax
import psutil
import pytest

from runs import processes

TERMINATING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
  """The handlers of a program that a terminal starts."""
  numbers = (*TERMINATING, signal.SIGINT)
  before = {number: signal.getsignal(number) for number in numbers}
  for number in TERMINATING:
    signal.signal(number, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('number', TERMINATING)
def test_signal_asks_training_to_stop(number):
  # Before training it ends the program.
  with pytest.raises(processes.TerminatedError), processes.StopSignals():
    signal.raise_signal(number)
  with processes.StopSignals() as stop:
    assert not stop()
    signal.raise_signal(number)
    assert stop() and stop.received == number
    # A scheduler may send several.
    signal.raise_signal(signal.SIGTERM)
    assert stop()
    with pytest.raises(processes.TerminatedError):
      stop.raise_if_received()
  assert signal.getsignal(number) == signal.SIG_DFL


def test_second_interrupt_ends_without_saving(monkeypatch, capfd):
  monkeypatch.setattr(os, '_exit', lambda code: (_ for _ in ()).throw(EOFError))
  with processes.StopSignals() as stop:
    stop()
    signal.raise_signal(signal.SIGINT)
    assert 'Ctrl-C again stops at once.' in capfd.readouterr().err
    with pytest.raises(EOFError):
      signal.raise_signal(signal.SIGINT)
  assert 'Stopped without saving.' in capfd.readouterr().err


def test_hangup_under_nohup_stays_ignored():
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with processes.StopSignals() as stop:
    signal.raise_signal(signal.SIGHUP)
    assert not stop() and stop.received is None
  assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGUSR1])
def test_one_of_several_processes_forwards_it_once(monkeypatch, number):
  """JAX's service catches SIGTERM alone; a handler stands in for it."""
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(
    processes.multihost_utils,
    'reached_preemption_sync_point',
    lambda step: False,
  )
  caught = []
  signal.signal(signal.SIGTERM, lambda *_: caught.append(os.getpid()))
  with processes.StopSignals() as stop:
    stop()
    signal.raise_signal(number)
    assert stop.received == number
    signal.raise_signal(signal.SIGUSR1)
  assert caught == [os.getpid()]


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
  """A folder in the place of /sys/fs/cgroup; this process is in the root."""
  monkeypatch.setattr(processes, '_CGROUPS', tmp_path)
  monkeypatch.setattr(processes, '_OWN_CGROUP', tmp_path / 'own')
  return tmp_path


def limit(cgroup, max_bytes, used, **stat):
  cgroup.mkdir(parents=True, exist_ok=True)
  (cgroup / 'memory.max').write_text(f'{max_bytes}\n')
  (cgroup / 'memory.current').write_text(f'{used}\n')
  rows = [f'{name} {num_bytes}\n' for name, num_bytes in stat.items()]
  (cgroup / 'memory.stat').write_text(''.join(rows))


def test_limit_of_a_container_counts_and_cached_files_are_free(cgroups):
  assert processes.free_memory() > 10**8
  limit(cgroups, 'max', 40_000_000)
  assert processes.free_memory() > 10**8
  # A limit may be lowered below what is used.
  limit(cgroups, 10_000_000, 40_000_000)
  assert processes.free_memory() == 0
  cached = dict(active_file=30_000_000, inactive_file=20_000_000)
  limit(cgroups, 10_000_000, 55_000_000, **cached, slab_reclaimable=2_000_000)
  assert processes.free_memory() == 7_000_000


@pytest.mark.parametrize('least', ['', 'a', 'a/b.slice'])
def test_narrowest_cgroup_around_the_process_counts(cgroups, least):
  (cgroups / 'own').write_text('4:memory:/other\n0::/a/b.slice\n')
  for name in ('', 'a', 'a/b.slice'):
    limit(cgroups / name, 90_000_000, 10_000_000)
  limit(cgroups / least, 50_000_000, 20_000_000)
  limit(cgroups / 'other', 100, 99)  # Not around this process.
  assert processes.free_memory() == 30_000_000


def test_process_is_alive_until_it_ends():
  assert processes.is_alive(processes.this_one())
  assert not processes.is_alive(processes.this_one() | {'started': 0.0})
  with subprocess.Popen([sys.executable, '-c', '']) as process:
    started = psutil.Process(process.pid).create_time()
    # Ended, but its parent has not yet taken note.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    child = {'pid': process.pid, 'started': started}
    assert not processes.is_alive(child)
  assert not processes.is_alive(child)
