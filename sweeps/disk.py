"""Where what is written to is at fault, and not the point of a sweep."""

import errno

from vae.errors import UserError
from vae.errors import WriteError

_NUMBERS = {
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
  errno.ESTALE,
}


def is_at_fault(error: Exception) -> bool:
  """Whether the next point would fail in the same way."""
  # A checkpoint that cannot be read now says nothing of its point either.
  cause = error.__cause__ if isinstance(error, UserError) else error
  if isinstance(cause, OSError) and cause.errno in _NUMBERS:
    return True
  return isinstance(error, WriteError)


def told(error: Exception, what: object, advice: str) -> WriteError:
  """An error for the user, in one line.

  Args:
    error: that came of writing.
    what: cannot be written.
    advice: what to do, in a sentence.
  """
  cause = error if isinstance(error, OSError) else error.__cause__
  if isinstance(error, WriteError) and not isinstance(cause, OSError):
    return error  # It says what it is about.
  return WriteError(f'{what} cannot be written ({reason(cause)}). {advice}')


def reason(error: OSError) -> str:
  """What the operating system says."""
  return error.strerror or ' '.join(str(error).split())
