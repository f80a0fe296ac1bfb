"""One run at a time in a workdir."""

from collections.abc import Iterator
import contextlib
import datetime
import email.utils
import errno
import fcntl
import json
import os
import threading
import time
import uuid

from etils import epath
import fsspec

from runs import processes
from vae import paths
from vae.errors import UserError
from vae.errors import WriteError

_FILENAME = 'lock.json'

# Of the object in a bucket. After a minute without a touch its holder is dead.
_SECONDS_BETWEEN_TOUCHES = 15.0
_SECONDS_UNTIL_DEAD = 60.0
_SECONDS_BETWEEN_LOOKS = 2.0

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

  The operating system takes the lock off whatever ends the process. On file
  systems that have none, nothing is locked. In a bucket the lock is an object
  that its holder touches now and then.

  Raises:
    InUseError: if another run has it; names that run.
  """
  if paths.is_remote(workdir):
    with _ObjectLock(workdir):
      yield
    return
  path = workdir / _FILENAME
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(open(path, 'ab', buffering=0))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InUseError(workdir, _in_words(path.read_bytes())) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise WriteError(
          f'{path} cannot be locked ({error.strerror or error}); name another '
          '--workdir.'
        ) from error
    # Only a note of who has it, which a full disk need not take.
    with contextlib.suppress(OSError):
      file.truncate(0)
      file.write(f'{json.dumps(_this_holder())}\n'.encode())
    yield


class _ObjectLock:
  """A lock on a workdir in a bucket; a context manager.

  Only one process can create the object, and only one can delete a generation
  of it. A holder that ended without deleting it is known by its process, if it
  ran on this machine, and else by the object not being touched any more.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir, self._path = workdir, str(workdir / _FILENAME)
    self._bucket, _, self._name = self._path.removeprefix('gs://').partition(
      '/'
    )
    self._files = fsspec.filesystem('gcs')
    self._generation = None
    self._released = threading.Event()
    self._thread = threading.Thread(target=self._touch_often, daemon=True)

  def __enter__(self):
    try:
      while not self._create():
        self._delete_if_dead()
      # Without the right to do this, the lock would be taken for dead.
      self._touch()
    except OSError as error:
      raise WriteError(
        f'{self._path} cannot be written ({error.strerror or error}); name '
        'another --workdir.'
      ) from error
    self._thread.start()

  def __exit__(self, *unused_args):
    self._released.set()
    self._thread.join()
    # Else the next run waits for a while.
    with contextlib.suppress(OSError):
      self._delete(self._generation)

  def _create(self) -> bool:
    """Whether this process has the lock now."""
    content = json.dumps(_this_holder() | {'lock': uuid.uuid4().hex}).encode()
    with contextlib.suppress(FileExistsError):
      self._files.pipe_file(self._path, content, mode='create')
    # A request that was repeated finds what it made itself.
    with contextlib.suppress(FileNotFoundError):
      self._generation = self._look()[0]['generation']
      return self._files.cat_file(self._path) == content
    return False

  def _delete_if_dead(self) -> None:
    """Deletes the lock of a process that ended without doing so.

    Raises:
      InUseError: if its holder runs.
    """
    with contextlib.suppress(FileNotFoundError):
      facts, _ = self._look()
      text = self._files.cat_file(self._path)
      is_dead = _is_dead(text)
      if is_dead is None:
        is_dead = not self._is_touched(_in_words(text))
      if not is_dead:
        raise InUseError(self._workdir, _in_words(text))
      self._delete(facts['generation'])

  def _is_touched(self, holder: str) -> bool:
    """Whether the object is touched within the time that a holder has for it.

    Args:
      holder: in words, for a line if that has to be waited for.
    """
    facts, age = self._look()
    if age < _SECONDS_UNTIL_DEAD:
      print(
        f'{self._workdir} is locked by {holder}; waiting up to '
        f'{_SECONDS_UNTIL_DEAD:.0f}s for a sign that it still runs …',
        flush=True,
      )
    last = facts['updated']
    while age < _SECONDS_UNTIL_DEAD:
      time.sleep(_SECONDS_BETWEEN_LOOKS)
      facts, age = self._look()
      if facts['updated'] != last:
        return True
    return False

  def _look(self) -> tuple[dict[str, str], float]:
    """The object's metadata, and how many seconds ago it was touched.

    By the bucket's clock; that of the holder's machine may be another.
    """
    headers, content = self._call('GET')
    facts = json.loads(content)
    now = email.utils.parsedate_to_datetime(headers['Date'])
    touched = datetime.datetime.fromisoformat(facts['updated'])
    return facts, (now - touched).total_seconds()

  def _delete(self, generation: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      self._call('DELETE', generation=generation)

  def _touch(self) -> None:
    touched = {'metadata': {'touched': str(time.time())}}
    self._call('PATCH', generation=self._generation, json=touched)

  def _touch_often(self) -> None:
    while not self._released.wait(_SECONDS_BETWEEN_TOUCHES):
      try:
        self._touch()
      except FileNotFoundError:
        # This process did not run for a while, and writes no more.
        message = f'error: another run took {self._workdir} over.\n'
        os.write(2, message.encode())
        os._exit(2)
      except OSError:
        pass  # The bucket cannot be reached; perhaps the next time.

  def _call(self, method: str, **kwargs):
    return self._files.call(
      method, 'b/{}/o/{}', self._bucket, self._name, **kwargs
    )


def _this_holder() -> dict[str, object]:
  now = datetime.datetime.now().astimezone()
  return processes.this_one() | {'since': now.isoformat(' ', 'seconds')}


def _is_dead(text: bytes) -> bool | None:
  """Whether the holder that a lock names is gone; None if it may be."""
  try:
    holder = json.loads(text)
    if holder['machine'] == processes.this_machine():
      return not processes.is_alive(holder)
  except (ValueError, KeyError, TypeError):
    pass
  return None


def _in_words(text: bytes) -> str:
  """The holder that a lock names."""
  try:
    holder = json.loads(text)
    return (
      f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]}'
    )
  except (ValueError, KeyError, TypeError):
    return 'another process'
