"""The exceptions that users are meant to read."""


class UserError(Exception):
  """A mistake of the user's, told so that it can be mended.

  The message is complete by itself: it names the key or the file, what is
  wrong with it and what is accepted. The scripts print it as it is, without a
  traceback, and exit with status 2.
  """


class WriteError(UserError):
  """Something cannot be written, as on a full disk.

  No mistake in what was to be written, which is worth another try once it can
  be.
  """


def shown(text: object, max_length: int = 300) -> str:
  """What a file is called, or has in it, as it fits into a line of a message.

  Line ends, control characters and bytes that are no UTF-8 are escaped, and
  the middle of what is too long is left out.
  """
  text = str(text)
  if len(text) > max_length:
    half = max_length // 2
    text = f'{text[:half]}…{text[-half:]}'
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
