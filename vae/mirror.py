"""A local folder that is copied to a bucket in the background."""

from collections.abc import Callable
import os
import shutil
import tempfile
import threading

from etils import epath

from vae import paths

# A bucket takes about one write a second to each object, and a file is copied
# as a whole.
_SECONDS_BETWEEN_COPIES = 5.0


class Mirror:
  """Copies the files that have changed every few seconds.

  Attributes:
    folder: the local one; files in it grow or are replaced, and none is
      deleted.
  """

  def __init__(self, target: epath.Path, warn: Callable[[str], None]):
    """Starts to copy.

    Args:
      target: the folder in the bucket.
      warn: takes a line if copying fails; it is tried again.
    """
    self.folder = epath.Path(tempfile.mkdtemp(prefix='vae-'))
    self._target, self._warn = target, warn
    # Size and time of change of each file as it was copied.
    self._copied: dict[str, tuple[int, int]] = {}
    self._copying, self._closing = threading.Lock(), threading.Event()
    self._thread = threading.Thread(
      target=self._run, name='mirror', daemon=True
    )
    self._thread.start()

  def copy(self) -> None:
    """Copies what has changed; returns when it is in the bucket.

    Raises:
      OSError: if that fails. A file that access is denied to does not keep
        the others from being copied.
    """
    denied = None
    with self._copying:
      for name in paths.list_files(self.folder):
        if name.endswith('.partial'):
          continue  # Of `atomic_files`, and gone in a moment.
        path = self.folder / name
        facts = os.stat(path)
        facts = (facts.st_size, facts.st_mtime_ns)
        if self._copied.get(name) != facts:
          try:
            (self._target / name).write_bytes(path.read_bytes())
            self._copied[name] = facts
          except PermissionError as error:
            denied = error
    if denied is not None:
      raise denied

  def close(self) -> None:
    """Copies what has changed, and deletes the local folder.

    Raises:
      OSError: if copying fails; the local folder stays.
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
            f'({error.strerror or error}); training goes on, and writing is '
            'tried again.'
          )
        is_failing = True
