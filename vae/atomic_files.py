"""Files that are there as a whole, or not at all."""

import contextlib
import os
import uuid

from etils import epath

from vae import paths


def replace(path: epath.Path, content: bytes) -> None:
  """Writes a file, or what takes the place of one.

  Aside and renamed, so that nobody ever finds half of it, and neither does who
  comes after the machine lost its power. Several may do so at a time. A bucket
  takes a file as a whole anyway.

  Args:
    path: of the file; its folder must be there.
    content: all of it.

  Raises:
    OSError: if it cannot be written; what was there still is.
  """
  if paths.is_remote(path):
    path.write_bytes(content)
    return
  # Readers that look for names like this one's must not find it.
  partial = path.parent / f'{uuid.uuid4().hex}.partial'
  try:
    with partial.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError:
    # On a full disk each try would leave one.
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise
