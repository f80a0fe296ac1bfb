"""One run at a time in a workdir."""

from collections.abc import Iterator, Mapping
import contextlib
import datetime
import email.utils
import errno
import fcntl
import io
import json
import os
import threading
import time
from typing import Any
import uuid

from etils import epath
import fsspec

from runs import processes
from vae import paths
from vae.errors import UserError, WriteError

_FILENAME = 'lock.json'

# Of the object in a bucket: without a touch for a minute, its holder is dead.
_SECONDS_BETWEEN_TOUCHES = 15.0
_SECONDS_UNTIL_DEAD = 60.0

# Errors of file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class InUseError(UserError):
  """Another run, `holder` in words, holds a workdir."""

  def __init__(self, workdir: epath.Path, holder: str):
    super().__init__(
      f'{workdir} is in use by {holder}; wait for its end (a killed run may '
      'hold a bucket for a minute more), or name another --workdir.'
    )
    self.holder = holder


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Keeps other runs out of a workdir, which exists.

  The operating system unlocks the file when the process ends, however it ends;
  file systems without locks lock nothing. In a bucket the lock is an object
  that its holder touches now and then.

  Raises:
    InUseError: if another run holds the workdir.
    WriteError: if it cannot be locked.
  """
  path = workdir / _FILENAME
  with contextlib.ExitStack() as stack:
    try:
      if paths.is_remote(workdir):
        stack.enter_context(_ObjectLock(workdir))
      else:
        file = stack.enter_context(open(path, 'ab', buffering=0))
        _lock(workdir, file)
    except OSError as error:
      raise WriteError(
        f'{path} cannot be locked ({error.strerror or error}); name another '
        '--workdir.'
      ) from error
    yield


def _lock(workdir: epath.Path, file: io.FileIO) -> None:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    holder = _parse((workdir / _FILENAME).read_bytes())
    raise InUseError(workdir, _in_words(holder)) from None
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
  # Only a note, which a full disk need not take.
  with contextlib.suppress(OSError):
    file.truncate(0)
    file.write(_this_holder())


class _ObjectLock:
  """A lock on a workdir in a bucket; a context manager.

  One process can create the object, and one can delete a generation of it.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir, self._path = workdir, str(workdir / _FILENAME)
    self._files = fsspec.filesystem('gcs')
    self._generation = None
    self._released = threading.Event()
    self._thread = threading.Thread(target=self._touch_often, daemon=True)

  def __enter__(self):
    while not self._create():
      self._delete_if_dead()
    # Without the right to do this, the lock would be taken for dead.
    self._touch()
    self._thread.start()

  def __exit__(self, *unused_args):
    self._released.set()
    self._thread.join()
    with contextlib.suppress(OSError):  # Else the next run waits.
      self._call('DELETE', generation=self._generation)

  def _create(self) -> bool:
    """Whether this process holds the lock now."""
    content = _this_holder()
    with contextlib.suppress(FileExistsError):
      self._files.pipe_file(self._path, content, mode='create')
    # A retried request finds the object that it created itself.
    with contextlib.suppress(FileNotFoundError):
      self._generation = self._files.info(self._path)['generation']
      return self._files.cat_file(self._path) == content
    return False

  def _delete_if_dead(self) -> None:
    with contextlib.suppress(FileNotFoundError):
      # The bucket's clock, as those of the machines may differ.
      headers, content = self._call('GET')
      now = email.utils.parsedate_to_datetime(headers['Date'])
      found = json.loads(content)
      touched = datetime.datetime.fromisoformat(found['updated'])
      holder = _parse(self._files.cat_file(self._path))
      if holder.get('machine') == processes.this_machine():
        is_alive = processes.is_alive(holder)
      else:
        is_alive = (now - touched).total_seconds() < _SECONDS_UNTIL_DEAD
      if is_alive:
        raise InUseError(self._workdir, _in_words(holder))
      self._call('DELETE', generation=found['generation'])

  def _touch(self) -> None:
    touched = {'metadata': {'touched': str(time.time())}}
    self._call('PATCH', generation=self._generation, json=touched)

  def _touch_often(self) -> None:
    while not self._released.wait(_SECONDS_BETWEEN_TOUCHES):
      try:
        self._touch()
      except FileNotFoundError:
        # This process slept, and must write no more.
        message = f'error: another run took {self._workdir} over.\n'
        os.write(2, message.encode())
        os._exit(2)
      except OSError:
        pass  # The bucket cannot be reached; perhaps the next time.

  def _call(self, method: str, **kwargs):
    bucket, _, name = self._path.removeprefix('gs://').partition('/')
    return self._files.call(method, 'b/{}/o/{}', bucket, name, **kwargs)


def _this_holder() -> bytes:
  since = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
  holder = {'since': since, 'lock': uuid.uuid4().hex, **processes.this_one()}
  return f'{json.dumps(holder)}\n'.encode()


def _parse(text: bytes) -> dict[str, Any]:
  """The holder that a lock names; empty if it cannot be read."""
  with contextlib.suppress(ValueError, AttributeError):
    holder = json.loads(text)
    if {'host', 'pid', 'started', 'since'} <= holder.keys():
      return holder
  return {}


def _in_words(holder: Mapping[str, Any]) -> str:
  if not holder:
    return 'another process'
  return f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]}'
