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
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(open(path, 'ab', buffering=0))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'{workdir} is in use by {_holder(path)}; wait for its end, or name '
        'another --workdir.'
      ) from None
    except OSError as error:
      raise UserError(
        f'{path} cannot be locked ({error.strerror or error}); name another '
        '--workdir.'
      ) from error
    now = datetime.datetime.now().astimezone()
    holder = {
      'host': socket.gethostname(),
      'process': os.getpid(),
      'since': now.isoformat(' ', 'seconds'),
    }
    # Only a note of who has it, which a full disk need not take.
    with contextlib.suppress(OSError):
      file.truncate(0)
      file.write(f'{json.dumps(holder)}\n'.encode())
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
