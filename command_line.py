"""How the scripts meet the command line: flags, and errors in one line."""

from collections.abc import Callable
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from vae.errors import UserError


def run(main: Callable[[], None]) -> None:
  """Parses the flags and runs `main`.

  A user's mistake, in the flags or a `UserError`, is told in one line on
  standard error, with exit status 2 and no traceback.
  """

  def guarded(argv):
    # absl's default shows the libraries' running commentary.
    if flags.FLAGS['verbosity'].using_default_value:
      logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
      _fail(f'{argv[1]!r} is not a flag; flags look like --name=value.')
    try:
      main()
    except UserError as error:
      _fail(str(error))

  app.run(guarded, flags_parser=_parse)


def load_config(name: str = 'config'):
  """The config that the flag `--config=FILE.py` and its overrides make.

  Raises:
    UserError: if there is no such file.
  """
  path = config_flags.get_config_filename(flags.FLAGS[name])
  if not os.path.isfile(path):
    raise UserError(
      f'--{name}={path}: there is no such file; configs/ has the configs.'
    )
  return flags.FLAGS[name].value


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _fail(f'{_one_line(error)} (--help lists the flags)')
  except AttributeError as error:
    # How ml_collections refuses an override of a key that is not there.
    key = str(error).strip('"\'')
    _fail(f'{_override_of(key, argv)}: there is no such key in the config.')
  except Exception as error:  # pylint: disable=broad-exception-caught
    # Configs are programs, which may fail in any way.
    _fail(
      f'the config cannot be loaded: {type(error).__name__}: {_one_line(error)}'
    )


def _override_of(key: str, argv: list[str]) -> str:
  """The flag that names `key`, as it was given."""
  given = [arg for arg in argv if key in arg.split('=')[0].split('.')]
  return given[0] if given else key


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())


def _fail(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)
