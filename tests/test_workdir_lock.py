import datetime
import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys

from etils import epath
import pytest

from runs import workdir_lock
from tests.conftest import ROOT
from vae.errors import UserError

HOLD = """
import sys
from etils import epath
from runs import workdir_lock
with workdir_lock.hold(epath.Path(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that has the workdir."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, tmp_path],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


def try_to_hold(workdir):
  with workdir_lock.hold(epath.Path(workdir)):
    return True


def test_second_run_is_refused_by_the_name_of_the_first(holder, tmp_path):
  with pytest.raises(UserError) as caught:
    try_to_hold(tmp_path)
  message = str(caught.value)
  assert f'process {holder.pid} on {socket.gethostname()}' in message
  assert f'since {datetime.date.today().year}' in message
  assert '\n' not in message
  # And again, by the same name.
  with pytest.raises(UserError, match=f'process {holder.pid}'):
    try_to_hold(tmp_path)


@pytest.mark.parametrize('end', [signal.SIGKILL, None])
def test_lock_goes_with_its_process(holder, tmp_path, end):
  if end is None:
    holder.communicate('')
  else:
    holder.send_signal(end)
    holder.wait()
  assert (tmp_path / 'lock.json').exists()
  assert try_to_hold(tmp_path)
  assert f'"pid": {os.getpid()}' in (tmp_path / 'lock.json').read_text()


@pytest.mark.parametrize('text', ['', '{', '[]', '{"host": 3}', '\0\0'])
def test_a_note_that_cannot_be_read_neither_blocks_nor_lets_in(
  holder, tmp_path, text
):
  (tmp_path / 'lock.json').write_text(text)
  with pytest.raises(UserError, match='in use by another process'):
    try_to_hold(tmp_path)
  holder.communicate('')
  assert try_to_hold(tmp_path)


def test_full_disk_takes_no_lock_away(tmp_path):
  """Only what is noted in it is lost."""
  limit = resource.RLIMIT_FSIZE
  program = (
    'import resource, signal\n'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
    f'resource.setrlimit({limit}, (0, resource.RLIM_INFINITY))\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', program + HOLD, tmp_path],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'held\n'
    assert (tmp_path / 'lock.json').read_bytes() == b''
    with pytest.raises(UserError, match='in use by another process'):
      try_to_hold(tmp_path)
    process.communicate()
  assert process.returncode == 0


def test_what_cannot_be_locked_is_told_in_a_line(tmp_path):
  (tmp_path / 'lock.json').mkdir()
  with pytest.raises(UserError, match='lock.json cannot be locked .Is a dir'):
    try_to_hold(tmp_path)


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_has_none(tmp_path, monkeypatch, number):
  def flock(*unused_args):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', flock)
  assert try_to_hold(tmp_path)
