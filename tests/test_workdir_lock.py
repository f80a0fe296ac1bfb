import contextlib
import datetime
import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from runs import processes, workdir_lock
from tests.conftest import ROOT
from vae import paths
from vae.errors import UserError

HOLD = """
import sys
from runs import processes
from runs import workdir_lock
from vae import paths
workdir_lock._SECONDS_BETWEEN_TOUCHES = 0.3
processes.this_machine = lambda: sys.argv[2]
with workdir_lock.hold(paths.expand(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


def start(workdir, machine=None, before=''):
  command = [sys.executable, '-c', before + HOLD, str(workdir)]
  return subprocess.Popen(
    [*command, machine or processes.this_machine()],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@contextlib.contextmanager
def held(workdir, **kwargs):
  """Another process that holds the workdir."""
  with start(workdir, **kwargs) as process:
    assert process.stdout.readline() == 'held\n', process.stderr.read()
    try:
      yield process
    finally:
      process.kill()


def try_to_hold(workdir):
  with workdir_lock.hold(paths.expand(workdir)):
    return True


def kill(process):
  process.kill()
  process.wait()


@pytest.fixture
def server(running):
  yield running
  running.set_faults()


@pytest.fixture
def remote(server, tmp_path):
  return paths.expand(f'gs://bucket/{tmp_path.name}/lr=[0.1]?*')


@pytest.fixture(params=['disk', 'bucket'])
def workdir(request, tmp_path):
  if request.param == 'disk':
    return paths.expand(tmp_path)
  return request.getfixturevalue('remote')


def test_second_run_is_refused_until_the_first_has_ended(workdir):
  with held(workdir) as process:
    for _ in range(2):
      with pytest.raises(UserError) as caught:
        try_to_hold(workdir)
      message = str(caught.value)
      assert f'process {process.pid} on {socket.gethostname()}' in message
      assert f'since {datetime.date.today().year}' in message
      assert '\n' not in message
    kill(process)
    assert try_to_hold(workdir)
  with held(workdir) as process:
    process.communicate('')
    assert try_to_hold(workdir)


@pytest.mark.parametrize('text', ['', '[]', '{"host": 3}', '\0\0'])
def test_unreadable_note_neither_blocks_nor_lets_in(tmp_path, text):
  with held(tmp_path) as process:
    (tmp_path / 'lock.json').write_text(text)
    with pytest.raises(UserError, match='in use by another process'):
      try_to_hold(tmp_path)
    kill(process)
    assert try_to_hold(tmp_path)


def test_full_disk_takes_no_lock_away(tmp_path):
  limit = (
    'import resource, signal\n'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
    f'resource.setrlimit({resource.RLIMIT_FSIZE}, (0, -1))\n'
  )
  with held(tmp_path, before=limit):
    assert (tmp_path / 'lock.json').read_bytes() == b''
    with pytest.raises(UserError, match='in use by another process'):
      try_to_hold(tmp_path)


def test_file_that_cannot_be_locked_is_an_error(tmp_path, monkeypatch):
  (tmp_path / 'a' / 'lock.json').mkdir(parents=True)
  with pytest.raises(UserError, match='lock.json cannot be locked .Is a dir'):
    try_to_hold(tmp_path / 'a')

  def flock(*unused_args):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  # But a file system without locks has none.
  monkeypatch.setattr(fcntl, 'flock', flock)
  assert try_to_hold(tmp_path)


def test_one_of_many_takes_over_from_a_dead_process(server, remote):
  """Though requests are retried whose answers were lost."""
  with held(remote) as process:
    kill(process)
  server.set_faults(unavailable=0.1)
  others = [start(remote) for _ in range(3)]
  # The one that holds it waits for the end of its input.
  first_lines = [other.stdout.readline() for other in others]
  results = [other.communicate() for other in others]
  assert sorted(first_lines) == ['', '', 'held\n'], results
  assert sum('InUseError' in err for _, err in results) == 2, results


@pytest.mark.parametrize('is_readable', [True, False])
def test_run_on_another_machine_holds_while_it_touches_the_lock(
  remote, monkeypatch, is_readable
):
  monkeypatch.setattr(workdir_lock, '_SECONDS_UNTIL_DEAD', 2)
  with held(remote, machine='another') as process:
    time.sleep(3)
    with pytest.raises(UserError, match=f'in use by process {process.pid}'):
      try_to_hold(remote)
    kill(process)
    if not is_readable:
      (remote / 'lock.json').write_text('[')
      with pytest.raises(UserError, match='in use by another process'):
        try_to_hold(remote)
    time.sleep(3)
    assert try_to_hold(remote)
  assert not (remote / 'lock.json').exists()


def test_run_that_slept_while_another_took_over_ends(remote, monkeypatch):
  monkeypatch.setattr(workdir_lock, '_SECONDS_UNTIL_DEAD', 1)
  with held(remote, machine='another') as process:
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    with workdir_lock.hold(remote):
      process.send_signal(signal.SIGCONT)
      assert process.wait(timeout=60) == 2
      assert f'another run took {remote} over' in process.stderr.read()
      assert (remote / 'lock.json').exists()


def test_run_that_may_not_touch_its_lock_does_not_begin(server, remote):
  """Else others would take it over after a minute, and both write."""
  server.set_faults(denied_permissions=('storage.objects.update',))
  with pytest.raises(UserError, match=r'lock.json cannot .*objects\.update'):
    try_to_hold(remote)
