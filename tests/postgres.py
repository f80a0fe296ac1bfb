"""A real PostgreSQL server, of the distribution's package, for one test."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import pwd
import secrets
import shutil
import subprocess
import tempfile

import pytest

from tests.ports import free_port

_USER = 'vae'
_DATABASE = 'sweep'

# Debian keeps the programs of each version in a folder that is not on PATH.
_DEBIAN = pathlib.Path('/usr/lib/postgresql')


class Server:
  """A server that can be stopped and started; `url` is that of a database."""

  def __init__(self, programs: pathlib.Path, folder: pathlib.Path):
    self.folder, self._programs = folder, programs
    self._data, self._log = folder / 'data', folder / 'log'
    port, password = free_port(), secrets.token_urlsafe()
    self.url = f'postgresql://{_USER}:{password}@127.0.0.1:{port}/{_DATABASE}'
    # Instead of flags, and without what the user has set.
    self._environment = {
      'HOME': str(folder),
      'PATH': os.environ['PATH'],
      'PGDATA': str(self._data),
      'PGHOST': '127.0.0.1',
      'PGPORT': str(port),
      'PGUSER': _USER,
      'PGPASSWORD': password,
    }
    # PostgreSQL refuses to run as root.
    self._owner = {}
    if os.getuid() == 0:
      owner = pwd.getpwnam('postgres')
      os.chown(folder, owner.pw_uid, owner.pw_gid)
      self._owner = {
        'user': owner.pw_uid,
        'group': owner.pw_gid,
        'extra_groups': [],
      }

  def create(self) -> None:
    """Makes its files, starts it, and creates an empty database."""
    password_file = self.folder / 'password'
    password_file.write_text(self._environment['PGPASSWORD'])
    password_file.chmod(0o644)  # The folder is its owner's alone.
    self._run(
      'initdb',
      f'--username={_USER}',
      f'--pwfile={password_file}',
      '--auth=scram-sha-256',
      '--encoding=UTF8',
      '--locale=C',
      '--no-sync',
    )
    with (self._data / 'postgresql.conf').open('a') as file:
      file.write(
        "listen_addresses = '127.0.0.1'\n"
        f'port = {self._environment["PGPORT"]}\n'
        f"unix_socket_directories = '{self.folder}'\n"
        'fsync = off\n'
      )
    self.start()
    self._run('createdb', _DATABASE)

  def start(self) -> None:
    """Waits until it answers."""
    self._run('pg_ctl', 'start', '--timeout=120', f'--log={self._log}')

  def stop(self) -> None:
    """Disconnects its clients and waits for its end, if it runs."""
    if self._call('pg_ctl', 'status').returncode == 0:
      self._run('pg_ctl', 'stop', '--mode=fast', '--timeout=120')

  def _call(self, program, *flags):
    return subprocess.run(
      [self._programs / program, *flags],
      cwd=self.folder,
      env=self._environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=180,
      **self._owner,
    )

  def _run(self, program, *flags):
    result = self._call(program, *flags)
    log = self._log.read_text() if self._log.exists() else ''
    assert result.returncode == 0, f'{program}:\n{result.stdout}\n{log}'


@contextlib.contextmanager
def server() -> Iterator[Server]:
  """Runs a server and removes it; skips if PostgreSQL is not installed."""
  versions = sorted(
    _DEBIAN.glob('*/bin'), key=lambda path: float(path.parent.name)
  )
  folders = [os.environ['PATH'], *map(str, reversed(versions))]
  initdb = shutil.which('initdb', path=os.pathsep.join(folders))
  if initdb is None:
    pytest.skip('PostgreSQL is not installed')
  # Not a folder of pytest's: those are closed to all but their owner.
  with tempfile.TemporaryDirectory(prefix='postgres-', dir='/tmp') as folder:
    programs = pathlib.Path(initdb).resolve().parent
    started = Server(programs, pathlib.Path(folder))
    try:
      started.create()
      yield started
    finally:
      started.stop()
