"""One run at a time in a workdir."""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import json
import os
import socket

from etils import epath

from vae.errors import UserError

_FILENAME = 'lock.json'


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Keeps other runs out of a workdir, which exists.

  The operating system takes the lock off whatever ends the process. On object
  stores, which have none, nothing is locked.

  Raises:
    UserError: if another run has it; names that run.
  """
  if '://' in str(workdir):
    yield
    return
  path = workdir / _FILENAME
  with open(path, 'a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'{workdir} is in use by {_holder(path)}; wait for its end, or name '
        'another --workdir.'
      ) from None
    file.truncate(0)
    now = datetime.datetime.now().astimezone()
    holder = {
      'host': socket.gethostname(),
      'process': os.getpid(),
      'since': now.isoformat(' ', 'seconds'),
    }
    file.write(json.dumps(holder) + '\n')
    file.flush()
    yield


def _holder(path: epath.Path) -> str:
  try:
    holder = json.loads(path.read_text())
    return (
      f'process {holder["process"]} on {holder["host"]}, since '
      f'{holder["since"]}'
    )
  except (OSError, ValueError, KeyError, TypeError):
    return 'another process'
