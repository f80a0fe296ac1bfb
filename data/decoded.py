"""Decoded images on disk, so that the next run need not decode them again."""

import os
import pathlib
import shutil
import tempfile
import time
import zlib

import numpy as np

from runs import progress

# Bytes that stay free on the disk.
_MARGIN = 1 << 30

# A file that is not complete after this long is given up.
_SECONDS_TO_WRITE = 24 * 3600


class DecodedStore:
  """Arrays in a folder; each a `.npy` file with a checksum, or absent.

  A bit that flips on the disk would go into training unseen. The store only
  saves time: an array that cannot be read counts as absent.
  """

  def __init__(self, directory: str):
    """Opens the store in a folder; with an empty name it keeps nothing."""
    self._directory = pathlib.Path(os.path.expanduser(directory))
    self.keeps = bool(directory)

  def path(self, name: str) -> pathlib.Path:
    """The file of an array."""
    return self._directory / f'{name}.npy'

  def read(self, name: str) -> np.ndarray | None:
    """Reads an array; None if it is absent or damaged."""
    if not self.keeps:
      return None
    try:
      with self.path(name).open('rb') as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        return array if file.read() == _checksum(array) else None
    except Exception:  # A damaged head can claim anything.
      return None

  def write(self, name: str, array: np.ndarray) -> None:
    """Keeps an array, or warns if it cannot be written."""
    if not self.keeps:
      return
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      if shutil.disk_usage(self._directory).free < array.nbytes + _MARGIN:
        raise OSError('the disk is almost full')
      for old in self._directory.glob('*.partial'):  # Of killed processes.
        if time.time() - old.stat().st_mtime > _SECONDS_TO_WRITE:
          old.unlink()
      partial = tempfile.NamedTemporaryFile(
        dir=self._directory, suffix='.partial', delete=False
      )
      try:
        with partial as file:
          np.save(file, array, allow_pickle=False)
          file.write(_checksum(array))
          file.flush()
          # Else the name could survive a power failure, and not the content.
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


def _checksum(array: np.ndarray) -> bytes:
  about = repr((array.dtype.str, array.shape, array.flags.c_contiguous))
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return zlib.crc32(data, zlib.crc32(about.encode())).to_bytes(4, 'big')
