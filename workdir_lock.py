"""One run at a time in a workdir."""

from collections.abc import Iterator
import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket

from etils import epath

from vae.errors import UserError
from vae.errors import WriteError

_FILENAME = 'lock.json'

# What file systems say that have no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class InUseError(UserError):
  """Another run has a workdir.

  Attributes:
    holder: that run, in words.
  """

  def __init__(self, workdir: epath.Path, holder: str):
    """Says of a workdir who has it."""
    super().__init__(
      f'{workdir} is in use by {holder}; wait for its end, or name another '
      '--workdir.'
    )
    self.holder = holder


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Keeps other runs out of a workdir, which exists.

  The operating system takes the lock off whatever ends the process. On object
  stores and file systems that have none, nothing is locked.

  Raises:
    InUseError: if another run has it; names that run.
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
      raise InUseError(workdir, _holder(path)) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise WriteError(
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
