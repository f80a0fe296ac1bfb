"""The one exception that users are meant to read."""


class UserError(Exception):
  """A mistake of the user's, told so that it can be mended.

  The message is complete by itself: it names the key or the file, what is
  wrong with it and what is accepted. The scripts print it as it is, without a
  traceback, and exit with status 2.
  """
