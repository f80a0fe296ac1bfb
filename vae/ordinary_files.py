"""Files that a user names, which may be anything that has a name.

A pipe waits for a writer, a device may have no end, and a sparse file takes
memory that its disk never had. So they are looked at before they are opened.
"""

import errno
import os
import pathlib
import stat

from etils import epath

from vae import paths

# Of an image, a list or an archive: far more than any needs.
MAX_BYTES = 1 << 28

_KINDS = {
  stat.S_IFDIR: 'a folder',
  stat.S_IFIFO: 'a named pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
}


def check(
  path: str | bytes | os.PathLike, max_bytes: int | None = MAX_BYTES
) -> None:
  """Makes sure that a local path is a file that can be read to its end.

  Args:
    path: followed where it is a link.
    max_bytes: that the file may have; None for any number.

  Raises:
    OSError: why it cannot, in words, as the error's `strerror`.
  """
  try:
    facts = os.stat(path)
  except ValueError as error:
    # Python has other words for it in each version.
    raise OSError(errno.EINVAL, 'its name has a zero byte', path) from error
  kind = stat.S_IFMT(facts.st_mode)
  size = facts.st_size
  if kind != stat.S_IFREG:
    reason = f'it is {_KINDS.get(kind, "no file")}'
  # So are those of /proc, some of which never end.
  elif not size:
    reason = 'it is empty'
  elif max_bytes is not None and size > max_bytes:
    reason = f'it has {size:,} bytes, and the limit is {max_bytes:,}'
  else:
    return
  raise OSError(errno.EINVAL, reason, path)


def read(
  path: pathlib.Path | epath.Path, max_bytes: int | None = MAX_BYTES
) -> bytes:
  """The bytes of a file; what is in a bucket is taken as it is.

  Raises:
    OSError: as `check` does.
  """
  if not paths.is_remote(path):
    check(path, max_bytes)
  return path.read_bytes()
