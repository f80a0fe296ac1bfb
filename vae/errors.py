"""Exceptions that users read."""


class UserError(Exception):
  """A mistake of the user's: what is wrong, what is accepted, what to do.

  The scripts print the message in one line, without a traceback, and exit with
  status 2.
  """


class WriteError(UserError):
  """A failed write, as on a full disk; a retry may succeed."""


def shown(text: object, max_length: int = 300) -> str:
  """A name, or the content of a file, as part of a line of a message.

  Line ends, control characters and bytes that are not UTF-8 are escaped; the
  middle of a long text is left out.
  """
  text = str(text)
  if len(text) > max_length:
    half = max_length // 2
    text = f'{text[:half]}…{text[-half:]}'
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
