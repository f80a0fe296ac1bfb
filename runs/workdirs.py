"""A workdir: its run's config, data and environment; one run at a time.

A run refuses to continue with another config or other data.
"""

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
from typing import Any
import uuid

from etils import epath
import fsspec
import ml_collections

from runs import processes, schema
from vae import checkpoints, loading, numerics, paths
from vae.errors import UserError, WriteError

DATA = 'data.json'
_ENVIRONMENT = 'environment.json'
_LOCK = 'lock.json'

# Of the lock in a bucket: without a touch for a minute, its holder is dead.
_SECONDS_BETWEEN_TOUCHES = 15.0
_SECONDS_UNTIL_DEAD = 60.0

# Errors of file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def check(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Raises a UserError if a workdir's checkpoints have another config.

  Or another precision of matrix products. `schema.FREE_KEYS` may differ.
  """
  if not checkpoints.Checkpoints(workdir).all_steps():
    return
  given, found = (
    {
      f'config.{key}': value
      for key, value in schema.flatten(schema.resolved(c)).items()
      if key not in schema.FREE_KEYS
    }
    for c in (config, load_config(workdir))
  )
  # Another version of JAX or another device changes the last bits alone.
  environment, name = numerics.environment(), 'JAX_DEFAULT_MATMUL_PRECISION'
  given[name] = environment['matmul_precision'] or 'not set'
  environment |= _read(workdir, _ENVIRONMENT)
  found[name] = environment['matmul_precision'] or 'not set'
  changed = [
    f'{key} was {found.get(key)!r} and is now {given.get(key)!r}'
    for key in given | found
    if given.get(key) != found.get(key)
  ]
  if changed:
    raise UserError(
      f'{workdir} holds another run: {"; ".join(changed)}. Name another '
      '--workdir, or give the old values.'
    )


def check_data(workdir: epath.Path, data: dict[str, int | str]) -> None:
  """Raises a UserError if a run had other data (`splits.DataSet.identity`)."""
  # Older runs have no digests.
  found = data | _read(workdir, DATA)
  changed = [
    f'{key} was {found[key]} and is now {data[key]}'
    for key in data
    if data[key] != found[key]
  ]
  if changed:
    raise UserError(
      f'{workdir} holds a run on other data: {"; ".join(changed)}. Name '
      f'another --workdir, give it its data, or delete {workdir / DATA} to '
      'continue with these.'
    )


def claim(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  data: dict[str, int | str],
) -> None:
  """Writes config, data and environment of a run into its workdir.

  Raises a UserError if it cannot, or if the checkpoints are of other data.
  """
  with _writing_errors(workdir, '--workdir'):
    workdir.mkdir(parents=True, exist_ok=True)
    if checkpoints.Checkpoints(workdir).all_steps():
      check_data(workdir, data)
    for name, content in (
      (loading.CONFIG, schema.resolved(config).to_dict()),
      (DATA, data),
      (_ENVIRONMENT, numerics.environment()),
    ):
      text = json.dumps(content, indent=2) + '\n'
      paths.replace(workdir / name, text.encode())


def load_config(
  workdir: epath.PathLike, data_dir: str | None = None
) -> ml_collections.ConfigDict:
  """The config of a workdir's run, complete and valid, or a UserError.

  `data_dir` is the data's folder, if not the one that the run was given.
  """
  config = loading.read_config(workdir)
  try:
    schema.validate(config)
  except UserError as error:
    path = paths.expand(workdir) / loading.CONFIG
    raise UserError(f'{path}: {error}') from error
  if data_dir is not None:
    config.data.dir = data_dir
    schema.validate(config)
  return config


def _read(workdir: epath.Path, name: str) -> dict[str, Any]:
  """An object in a file of JSON; empty if there is no file."""
  path = workdir / name
  try:
    return {**json.loads(path.read_text())} if path.exists() else {}
  except (OSError, ValueError, TypeError) as error:
    raise UserError(
      f'{path} cannot be read ({getattr(error, "strerror", None) or error}). '
      "Make sure that data and environment are the run's own, and delete the "
      'file.'
    ) from error


def check_writable(folder: epath.Path, flag: str) -> None:
  """Makes the folder of a flag and writes into it, or raises a UserError."""
  with _writing_errors(folder, flag):
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe.{uuid.uuid4().hex}'
    probe.write_text('')
    probe.unlink()


@contextlib.contextmanager
def _writing_errors(folder: epath.Path, flag: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise WriteError(
      f'{flag}={folder} cannot be written ({error.strerror or error}); name a '
      'folder that can.'
    ) from error


class InUseError(UserError):
  """The workdir is locked by another run."""

  def __init__(self, workdir: epath.Path, content: bytes):
    words = 'another process'
    if holder := _parse(content):
      words = 'process {pid} on {host}, since {since}'.format(**holder)
    super().__init__(
      f'{workdir} is in use by {words}; wait for its end (a killed run may '
      'hold a bucket for a minute more), or name another --workdir.'
    )


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
  lock = _ObjectLock if paths.is_remote(workdir) else _locked_file
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(lock(workdir))
    except OSError as error:
      raise WriteError(
        f'{workdir / _LOCK} cannot be locked ({error.strerror or error}); name '
        'another --workdir.'
      ) from error
    yield


@contextlib.contextmanager
def _locked_file(workdir: epath.Path) -> Iterator[None]:
  with open(workdir / _LOCK, 'ab', buffering=0) as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InUseError(workdir, (workdir / _LOCK).read_bytes()) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
    # Only a note, which a full disk need not take.
    with contextlib.suppress(OSError):
      file.truncate(0)
      file.write(_this_holder())
    yield


class _ObjectLock:
  """A lock on a workdir in a bucket; a context manager.

  One process can create the object, and one can delete a generation of it.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir, self._path = workdir, str(workdir / _LOCK)
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
      note = self._files.cat_file(self._path)
      holder = _parse(note)
      if holder.get('machine') == processes.this_machine():
        is_alive = processes.is_alive(holder)
      else:
        is_alive = (now - touched).total_seconds() < _SECONDS_UNTIL_DEAD
      if is_alive:
        raise InUseError(self._workdir, note)
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
  """The process that a lock names; empty if it cannot be read."""
  with contextlib.suppress(ValueError, AttributeError):
    holder = json.loads(text)
    if {'host', 'pid', 'started', 'since'} <= holder.keys():
      return holder
  return {}
