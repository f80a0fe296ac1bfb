"""Files and folders on a disk or in a bucket, by paths as users write them.

Importing this module makes epath and fsspec reach gs:// by `vae.buckets`.
"""

from collections.abc import Callable, Iterable
from concurrent import futures
import contextlib
import functools
import os
import shutil
import tempfile
import threading
import uuid

from etils import epath
import fsspec

from vae.errors import UserError

# By default epath reaches buckets by TensorFlow, whose client retries for ever
# if a bucket is missing. epath reads this once, at its first gs://.
os.environ['EPATH_USE_TF'] = '0'
for _name in ('gs', 'gcs'):
  fsspec.register_implementation(_name, 'vae.buckets.FileSystem', clobber=True)

# Requests in flight to a bucket.
_COPIED_AT_ONCE = 8

# A bucket takes about one write a second to each object, and a file is copied
# as a whole.
_SECONDS_BETWEEN_COPIES = 5.0

# Ends the name of a file that is being written.
_PARTIAL = '.partial'


def expand(path: epath.PathLike) -> epath.Path:
  """Replaces a leading `~` or `~USER`; UserError for a URL but gs://."""
  if is_remote(path) and not str(path).startswith('gs://'):
    raise UserError(f'{path} is neither a local path nor gs://BUCKET/….')
  return epath.Path(path).expanduser()


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return '://' in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """The path without `..`, from the root; a bucket's stays as it is."""
  path = epath.Path(path)
  return path if is_remote(path) else path.resolve()


def list_files(folder: epath.PathLike) -> list[str]:
  """Relative paths of the files in a folder and below it, sorted."""
  found: Iterable[str]
  if is_remote(folder):
    found = _list_objects(str(folder))
  else:
    found = (
      os.path.relpath(os.path.join(root, name), folder)
      for root, _, names in os.walk(folder)
      for name in names
    )
  # Consoles of buckets make empty objects for folders.
  return sorted(name for name in found if name and not name.endswith('/'))


def _list_objects(folder: str) -> dict[str, str]:
  top = folder.partition('://')[2].rstrip('/') + '/'
  found = fsspec.filesystem('gcs').find(top, detail=True)
  return {name.removeprefix(top): o['generation'] for name, o in found.items()}


@functools.lru_cache(maxsize=8)
def list_generations(folder: str) -> dict[str, str]:
  """The generation of each object below a bucket's folder, by relative path.

  An object that is written again gets another one. The listing is made once, as
  it takes a request for each 1,000 objects.
  """
  return _list_objects(folder)


def copy(source: epath.Path, target: epath.Path) -> None:
  """Copies the files of a folder; either may be in a bucket."""

  def copy_file(name: str) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes((source / name).read_bytes())

  with futures.ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
    list(pool.map(copy_file, list_files(source)))


def move(source: epath.Path, target: epath.Path) -> None:
  """Moves a folder to a free path on the same disk or in the same bucket."""
  if is_remote(source):
    copy(source, target)
    source.rmtree()
  else:
    source.rename(target)


def replace(path: epath.Path, content: bytes) -> None:
  """Writes or replaces a file; it has all of the content, or is as before.

  Also after a loss of power, and with several writers.
  """
  if is_remote(path):
    path.write_bytes(content)  # Atomic in a bucket.
    return
  partial = path.parent / f'{uuid.uuid4().hex}{_PARTIAL}'
  try:
    with partial.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise


def flush(folder: epath.Path) -> None:
  """Forces a local folder and all below it to the disk."""
  if is_remote(folder):
    return
  for root, _, names in os.walk(folder):
    for path in (root, *(os.path.join(root, name) for name in names)):
      descriptor = os.open(path, os.O_RDONLY)
      try:
        os.fsync(descriptor)
      finally:
        os.close(descriptor)


class Mirror:
  """A local folder whose changes are copied to a bucket every few seconds.

  `warn` is called with a line if copying fails; it is retried.

  Attributes:
    folder: the local one; files in it grow or are replaced.
  """

  def __init__(self, target: epath.Path, warn: Callable[[str], None]):
    self.folder = epath.Path(tempfile.mkdtemp(prefix='vae-'))
    self._target, self._warn = target, warn
    # Size and time of change of each file when it was copied.
    self._copied: dict[str, tuple[int, int]] = {}
    self._copying, self._closing = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def copy(self) -> None:
    """Copies all changes; raises OSError if that fails.

    A file that the bucket denies does not keep the others from it.
    """
    denied: PermissionError | None = None
    with self._copying:
      for name in list_files(self.folder):
        if name.endswith(_PARTIAL):
          continue
        status = os.stat(self.folder / name)
        facts = status.st_size, status.st_mtime_ns
        if self._copied.get(name) != facts:
          content = (self.folder / name).read_bytes()
          try:
            (self._target / name).write_bytes(content)
            self._copied[name] = facts
          except PermissionError as error:
            denied = error
    if denied is not None:
      raise denied

  def close(self) -> None:
    """Copies all changes and deletes the local folder.

    If copying fails it raises OSError, and the local folder stays.
    """
    self._closing.set()
    self._thread.join()
    self.copy()
    shutil.rmtree(self.folder)

  def _run(self) -> None:
    is_failing = False
    while not self._closing.wait(_SECONDS_BETWEEN_COPIES):
      try:
        self.copy()
        is_failing = False
      except OSError as error:
        if not is_failing:
          self._warn(
            f'warning: {self._target} cannot be written '
            f'({error.strerror or error}); training continues, and writing is '
            'retried.'
          )
        is_failing = True
