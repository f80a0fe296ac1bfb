import contextlib
import datetime
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time

import pytest

from runs import processes, workdirs
from vae import paths
from vae.errors import UserError

# Its processes are forks of one that has imported the libraries.
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['runs.workdirs', 'gcsfs'])


def hold(workdir, machine, environment, connection):
  """Holds a workdir until something comes through the connection."""
  os.environ.update(environment)
  workdirs._SECONDS_BETWEEN_TOUCHES = 0.3
  processes.this_machine = lambda: machine
  try:
    with workdirs.hold(paths.expand(workdir)):
      connection.send('held')
      connection.recv()
  except UserError as error:
    connection.send(type(error).__name__)


def start(workdir, machine=None):
  """Another process, and the connection to it."""
  ours, theirs = CONTEXT.Pipe()
  machine = machine or processes.this_machine()
  arguments = str(workdir), machine, dict(os.environ), theirs
  process = CONTEXT.Process(target=hold, args=arguments)
  process.start()
  theirs.close()
  return process, ours


@contextlib.contextmanager
def held(workdir, **kwargs):
  """Another process that holds the workdir, until the context ends."""
  process, connection = start(workdir, **kwargs)
  assert connection.recv() == 'held'
  try:
    yield process
  finally:
    with contextlib.suppress(OSError):
      connection.send('end')
    process.join()


def try_to_hold(workdir):
  with workdirs.hold(paths.expand(workdir)):
    return True


def kill(process):
  process.kill()
  process.join()


@pytest.fixture
def server(running):
  yield running
  running.set_faults()


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
  with held(workdir):
    pass
  assert try_to_hold(workdir)


@pytest.mark.parametrize('text', ['', '[]'])
def test_unreadable_note_neither_blocks_nor_lets_in(tmp_path, text):
  with held(tmp_path) as process:
    (tmp_path / 'lock.json').write_text(text)
    with pytest.raises(UserError, match='in use by another process'):
      try_to_hold(tmp_path)
    kill(process)
    assert try_to_hold(tmp_path)


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
  answers = [connection.recv() for _, connection in others]
  assert sorted(answers) == ['InUseError', 'InUseError', 'held']
  for process, connection in others:
    with contextlib.suppress(OSError):
      connection.send('end')
    process.join()


@pytest.mark.parametrize('is_readable', [True, False])
def test_run_on_another_machine_holds_while_it_touches_the_lock(
  remote, monkeypatch, is_readable
):
  monkeypatch.setattr(workdirs, '_SECONDS_UNTIL_DEAD', 1)
  with held(remote, machine='another') as process:
    time.sleep(1.5)
    with pytest.raises(UserError, match=f'in use by process {process.pid}'):
      try_to_hold(remote)
    kill(process)
    if not is_readable:
      (remote / 'lock.json').write_text('[')
      with pytest.raises(UserError, match='in use by another process'):
        try_to_hold(remote)
    # The bucket's clock has whole seconds.
    time.sleep(2.5)
    assert try_to_hold(remote)
  assert not (remote / 'lock.json').exists()


def test_run_that_slept_while_another_took_over_ends(remote, monkeypatch):
  monkeypatch.setattr(workdirs, '_SECONDS_UNTIL_DEAD', 1)
  with held(remote, machine='another') as process:
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2)
    with workdirs.hold(remote):
      os.kill(process.pid, signal.SIGCONT)
      process.join(timeout=60)
      assert process.exitcode == 2
      assert (remote / 'lock.json').exists()


def test_run_that_may_not_touch_its_lock_does_not_begin(server, remote):
  """Else others would take it over after a minute, and both write."""
  server.set_faults(denied_permissions=('storage.objects.update',))
  with pytest.raises(UserError, match=r'lock.json cannot .*objects\.update'):
    try_to_hold(remote)
