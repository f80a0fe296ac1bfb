"""Decoded images on disk, so that the next run need not decode them again."""

import hashlib
import os
import pathlib
import shutil
import sys

import numpy as np

# Left free on the disk, whatever is kept.
_MARGIN = 1 << 30


class DecodedStore:
  """Arrays in a folder, by name; each a `.npy` file, complete or absent.

  It only saves time: what cannot be read counts as absent, and what cannot be
  written is said once, in one line.
  """

  def __init__(self, directory: str):
    """Takes the folder; with an empty name nothing is kept."""
    self._directory = pathlib.Path(directory).expanduser()
    self._keeps = bool(directory)

  def path(self, name: str) -> pathlib.Path:
    """The file of an array."""
    return self._directory / f'{name}.npy'

  def read(self, name: str) -> np.ndarray | None:
    """The array of a name, or None if there is none that is whole."""
    if not self._keeps:
      return None
    try:
      return np.load(self.path(name), allow_pickle=False)
    except (OSError, ValueError, EOFError):
      return None

  def write(self, name: str, array: np.ndarray) -> None:
    """Keeps an array, if there is room for it."""
    if not self._keeps:
      return
    path = self.path(name)
    partial = path.with_suffix(f'.{os.getpid()}.partial')
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      if shutil.disk_usage(self._directory).free < array.nbytes + _MARGIN:
        raise OSError('the disk is almost full')
      try:
        with open(partial, 'wb') as file:
          np.save(file, array, allow_pickle=False)
        partial.replace(path)
      finally:
        partial.unlink(missing_ok=True)
    except OSError as error:
      print(
        f'note: decoded images are not kept in {self._directory} '
        f'({error.strerror or error}); name another folder with '
        '--config.data.decoded_dir, or none.',
        file=sys.stderr,
      )


def digest(*parts: object) -> str:
  """A short name for what the parts, in this order, say."""
  hashed = hashlib.sha256()
  for part in parts:
    data = part if isinstance(part, bytes) else repr(part).encode()
    hashed.update(len(data).to_bytes(8, 'big') + data)
  return hashed.hexdigest()[:20]
