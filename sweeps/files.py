"""Files that several workers may write."""

import contextlib
import uuid

from etils import epath


def replace(path: epath.Path, content: bytes) -> None:
  """Writes a file aside and renames it, so that it is never half there."""
  partial = path.parent / f'{path.name}.{uuid.uuid4().hex}.partial'
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except OSError:
    # On a full disk each try would leave one.
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise
