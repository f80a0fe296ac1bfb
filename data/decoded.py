"""Decoded images on disk, so that the next run need not decode them again."""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import time
import zlib

import numpy as np

from runs import progress
from vae import ordinary_files

# Left free on the disk, whatever is kept.
_MARGIN = 1 << 30

# Bytes that are summed up by a thread at a time.
_BLOCK = 1 << 24

_PARTIAL = '.partial'
# After which what is not complete is given up.
_SECONDS_TO_WRITE = 24 * 3600


class DecodedStore:
  """Arrays in a folder, by name; each a `.npy` file, complete or absent.

  After the array comes a checksum, as a bit that flipped on the disk would go
  into training unseen. All this only saves time: what cannot be read counts as
  absent, and what cannot be written is said in one line.
  """

  def __init__(self, directory: str):
    """Takes the folder; with an empty name nothing is kept."""
    self._directory = pathlib.Path(os.path.expanduser(directory))
    self.keeps = bool(directory)

  def path(self, name: str) -> pathlib.Path:
    """The file of an array."""
    return self._directory / f'{name}.npy'

  def read(self, name: str) -> np.ndarray | None:
    """The array of a name, or None if there is none that is whole."""
    if not self.keeps:
      return None
    path = self.path(name)
    try:
      ordinary_files.check(path, max_bytes=None)
      with path.open('rb') as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        return array if file.read() == _checksum(array) else None
    except Exception:  # A damaged head can claim anything, and does not fit.
      return None

  def write(self, name: str, array: np.ndarray) -> None:
    """Keeps an array, if there is room for it."""
    if not self.keeps:
      return
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._clear_away()
      if shutil.disk_usage(self._directory).free < array.nbytes + _MARGIN:
        raise OSError('the disk is almost full')
      partial = tempfile.NamedTemporaryFile(
        dir=self._directory, suffix=_PARTIAL, delete=False
      )
      try:
        with partial as file:
          np.save(file, array, allow_pickle=False)
          file.write(_checksum(array))
          file.flush()
          # Else the name could outlive a power failure, and not the content.
          os.fsync(file.fileno())
        os.replace(partial.name, self.path(name))
      finally:
        pathlib.Path(partial.name).unlink(missing_ok=True)
    except OSError as error:
      progress.warn(
        f'note: decoded images are not kept in {self._directory} '
        f'({error.strerror or error}); name another folder with '
        '--config.data.decoded_dir, or none.'
      )

  def _clear_away(self) -> None:
    """Removes what killed processes left half written."""
    for path in self._directory.glob(f'*{_PARTIAL}'):
      with contextlib.suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime > _SECONDS_TO_WRITE:
          path.unlink()


def _checksum(array: np.ndarray) -> bytes:
  """Tells an array from one in which bits were changed.

  In blocks, so that all cores take part: a GB takes two of them 0.3 seconds.
  """
  about = repr((array.dtype.str, array.shape, array.flags.c_contiguous))
  data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  blocks = [data[i : i + _BLOCK] for i in range(0, len(data), _BLOCK)]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    sums = list(pool.map(zlib.crc32, blocks))
  return zlib.crc32(repr((about, sums)).encode()).to_bytes(4, 'big')


def digest(*parts: object) -> str:
  """A short name for what the parts, in this order, say."""
  hashed = hashlib.sha256()
  for part in parts:
    data = part if isinstance(part, bytes) else repr(part).encode()
    hashed.update(len(data).to_bytes(8, 'big') + data)
  return hashed.hexdigest()[:20]
