"""Flags, config files, and errors in one line."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import pathlib
import re
import runpy
import sys
import traceback
import warnings

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from runs import processes, schema
from vae import paths
from vae.errors import shown, UserError

_SCRIPTS = pathlib.Path(__file__).resolve().parent.parent

WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder of the run: config, metrics, checkpoints, pictures. main.py makes '
  'it, by default as logs/NAME, with the NAME of the config file, and '
  'NAME_ARGUMENT with --config=FILE:ARGUMENT.',
)


def run(
  main: Callable[..., None],
  commands: Sequence[str] = (),
  on_interrupt: str = 'interrupted.',
) -> None:
  """Parses the flags and runs `main`, with the first word if it is a command.

  A user's mistake, in the flags or a `UserError`, ends in one line on standard
  error and exit status 2, Ctrl-C in `on_interrupt` and 130, SIGTERM in 0.
  """

  def parse(argv):
    with _errors_in_one_line(on_interrupt):
      # A default of the flag itself would be loaded by an import.
      if 'config' in flags.FLAGS and not any(
        re.match('--?config(=|$)', flag) for flag in argv
      ):
        argv = [argv[0], f'--config={config_path()}', *argv[1:]]
      return flags.FLAGS(argv)

  def checked(argv):
    # absl's default shows the libraries' own logs.
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    words = argv[1:]
    with _errors_in_one_line(on_interrupt):
      if commands and (not words or words[0] not in commands):
        raise UserError(
          f'the command is {" ".join(words[:1]) or "missing"}; it must be one '
          f'of {", ".join(commands)} (--help lists the flags).'
        )
      if len(words) > bool(commands):
        raise UserError(f'{words[-1]!r} is not a flag, which is --name=value.')
      main(*words)

  # Compiled programs are kept, unless the user has chosen another folder. JAX
  # distinguishes those of other processors, as machines may share a home.
  if jax.config.jax_compilation_cache_dir is None:
    folder = os.path.expanduser('~/.cache/vae/jax')
    jax.config.update('jax_compilation_cache_dir', folder)
  # After a kill or on a full disk a program is compiled again.
  warnings.filterwarnings(
    'ignore', 'Error (reading|writing) persistent compilation cache entry'
  )
  app.run(checked, flags_parser=parse)


@contextlib.contextmanager
def _errors_in_one_line(on_interrupt: str) -> Iterator[None]:
  """Ends the process after a user's mistake, or a signal."""
  try:
    yield
    return
  except UserError as error:
    message, status = str(error), 2
  except flags.Error as error:
    message, status = f'{error} (--help lists the flags)', 2
  except KeyboardInterrupt:
    message, status = on_interrupt, 130
  except processes.TerminatedError:
    message, status = on_interrupt.replace('interrupted', 'terminated'), 0
  except Exception as error:
    if message := _explain(error):
      status = 2
    elif jax.distributed.is_initialized():
      message, status = traceback.format_exc(), 1
    else:
      raise
  if status == 2:
    message = f'error: {shown(" ".join(message.split()), 2000)}'
  else:
    message = f'\n{message}'
  # Ctrl-C may also have ended the readers of these, as in `2>&1 | tee log`.
  for stream, text in ((sys.stdout, ''), (sys.stderr, f'{message}\n')):
    with contextlib.suppress(OSError):
      stream.write(text)
      stream.flush()
  # A proper exit can crash while a device still computes, and waits for minutes
  # for other processes of the run. All that was to be saved is saved.
  os._exit(status)


def _explain(error: Exception) -> str | None:
  """A message if memory ran out, or another process of the run failed."""
  reason = ' '.join(str(error).split())[:300]
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in reason:
    return (
      f'out of memory ({reason or "MemoryError"}). Lower the batch sizes, the '
      "number of images or the model's sizes, or set config.data.cache=none."
    )
  if jax.distributed.is_initialized() and isinstance(
    error, jax.errors.JaxRuntimeError
  ):
    return (
      f'the processes of this run can no longer work together ({reason}). '
      'Start all of them again: they go on from the last checkpoint.'
    )
  return None


def define_config(default: str) -> None:
  """Defines `--config`, and the flags that override the settings of its file.

  `default` is the file without the flag, relative to the scripts.
  """
  config_flags.DEFINE_config_file(
    'config',
    None,
    f'The experiment; configs/ has several. By default {default}. '
    'FILE:ARGUMENT calls get_config(ARGUMENT) in FILE.',
    lock_config=False,
  )
  flags.FLAGS['config'].parser = _ConfigFile(str(_SCRIPTS / default))


def config_path() -> str:
  """Path of the config file in use."""
  return flags.FLAGS['config'].parser.path


def config_name() -> str:
  """The name of the config file in use, and its argument if it has one."""
  parser = flags.FLAGS['config'].parser
  return '_'.join([pathlib.Path(parser.path).stem, *parser.argument])


class _ConfigFile(flags.ArgumentParser):
  """Loads a config file, completes it, and checks which keys are overridden."""

  def __init__(self, path: str):
    self.path, self.argument = path, []

  def parse(self, value: str) -> ml_collections.ConfigDict:
    """The config of FILE or FILE:ARGUMENT; raises UserErrors."""
    path, *self.argument = value.split(':', 1)
    self.path = str(paths.expand(path))
    # A file that is not in the current folder may be beside the scripts.
    if not os.path.exists(self.path) and (_SCRIPTS / self.path).is_file():
      self.path = str(_SCRIPTS / self.path)
    if not os.path.isfile(self.path):
      raise UserError(
        f'--config={path}: there is no such file here or in {_SCRIPTS}; '
        f'{_SCRIPTS}/configs has the configs.'
      )
    try:
      config = runpy.run_path(self.path)['get_config'](*self.argument)
    except (Exception, SystemExit) as error:
      raise UserError(
        f'--config cannot be loaded: {_place(error, self.path)}'
      ) from error
    flag_of = re.compile(r'(--?(?:no)?config\.([^=]*))=?(.*)')
    overrides = list(filter(None, map(flag_of.fullmatch, sys.argv)))
    # Which keys there are depends on the model and the objective.
    named = {match[2]: match[3] for match in overrides if match[3]}
    schema.complete(config, named)
    for match in overrides:
      schema.check_known(match[1], match[2], schema.flatten(config))
    return config


def _place(error: BaseException, path: str) -> str:
  """An error of a config file, after the file's line from which it came."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  if isinstance(error, SyntaxError):
    path, lines = error.filename, [error.lineno]
  where = f'{path}, line {lines[-1]}' if lines else path
  return f'{where}: {traceback.format_exception_only(error)[-1].strip()}'
