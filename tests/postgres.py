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

# Debian keeps the programs of each version in a folder that is not on PATH.
_DEBIAN = pathlib.Path('/usr/lib/postgresql')


@contextlib.contextmanager
def server() -> Iterator[str]:
  """The URL of a database on a server; skips if PostgreSQL is not installed."""
  versions = sorted(
    _DEBIAN.glob('*/bin'), key=lambda path: -float(path.parent.name)
  )
  places = os.pathsep.join([os.environ['PATH'], *map(str, versions)])
  initdb = shutil.which('initdb', path=places)
  if initdb is None:
    pytest.skip('PostgreSQL is not installed')
  programs = pathlib.Path(initdb).resolve().parent
  port, password = str(free_port()), secrets.token_urlsafe()
  # Not a folder of pytest's: those are closed to all but their owner.
  with tempfile.TemporaryDirectory(prefix='postgres-', dir='/tmp') as folder:
    # PostgreSQL refuses to run as root.
    user = {}
    if os.getuid() == 0:
      owner = pwd.getpwnam('postgres')
      os.chown(folder, owner.pw_uid, owner.pw_gid)
      user = {'user': owner.pw_uid, 'group': owner.pw_gid, 'extra_groups': []}
    # Instead of flags, and without what the user has set.
    environment = {
      'HOME': folder,
      'PATH': os.environ['PATH'],
      'PGDATA': f'{folder}/data',
      'PGHOST': '127.0.0.1',
      'PGPORT': port,
      'PGUSER': 'vae',
      'PGPASSWORD': password,
    }

    def call(program, *flags):
      result = subprocess.run(
        [programs / program, *flags],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=180,
        **user,
      )
      assert result.returncode == 0, result

    password_file = pathlib.Path(folder, 'password')
    password_file.write_text(password)
    password_file.chmod(0o644)  # The folder is its owner's alone.
    initial = ('--auth=scram-sha-256', '--encoding=UTF8', '--locale=C')
    call('initdb', '--username=vae', f'--pwfile={password_file}', *initial)
    settings = f'-p {port} -k {folder} -c listen_addresses=127.0.0.1 -F'
    call('pg_ctl', 'start', f'--options={settings}', f'--log={folder}/log')
    try:
      call('createdb', 'sweep')
      yield f'postgresql://vae:{password}@127.0.0.1:{port}/sweep'
    finally:
      call('pg_ctl', 'stop', '--mode=fast', '--timeout=120')
