"""How the scripts meet the command line: flags, and errors in one line."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import contextlib
import hashlib
import itertools
import os
import pathlib
import platform
import re
import signal
import sys
import sysconfig
import threading
import traceback
import warnings

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from runs.stop_signals import TerminatedError
from vae import paths
from vae.errors import UserError

_SCRIPTS = str(pathlib.Path(__file__).resolve().parent.parent)

WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder of the run: config, metrics, checkpoints, pictures. main.py makes '
  'it, by default as logs/NAME, with the NAME of the config file.',
)


def run(
  main: Callable[..., None],
  commands: Sequence[str] = (),
  on_interrupt: str = 'interrupted.',
) -> None:
  """Parses the flags and runs `main`.

  A user's mistake, in the flags or a `UserError`, is told in one line on
  standard error, with exit status 2 and no traceback.

  Args:
    main: to be run.
    commands: words of which the command line must have one, which `main`
      gets; by default it has flags alone.
    on_interrupt: what to say after Ctrl-C.
  """

  def guarded(argv):
    # absl's default shows the libraries' running commentary.
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    words, choices = argv[1:], ', '.join(commands)
    if commands and not words:
      _fail(f'say what to do: one of {choices} (--help lists the flags).')
    if commands and words[0] not in commands:
      _fail(f'{words[0]!r} is none of {choices}.')
    if len(words) > bool(commands):
      _fail(f'{words[-1]!r} is not a flag; flags look like --name=value.')
    try:
      main(*words)
    except UserError as error:
      _fail(str(error))
    except KeyboardInterrupt:
      _leave(on_interrupt, 130)
    except TerminatedError:
      _leave(on_interrupt.replace('interrupted', 'terminated'), 0)
    try:
      sys.stdout.flush()
    except OSError:
      # It would fail again when the program ends, and be taken for a failure.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

  _mind_destructors()
  _keep_compiled_programs()
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # As after `2>&-`.
      setattr(sys, name, open(os.devnull, 'w'))
    # σ and ‖ are not in every encoding.
    getattr(sys, name).reconfigure(errors='replace')
  app.run(guarded, flags_parser=_parse)


def _leave(message: str, status: int) -> None:
  """Ends the process; what was to be saved is saved by now.

  A proper exit can crash while the device still computes.
  """
  for stream, text in ((sys.stderr, f'\n{message}\n'), (sys.stdout, '')):
    with contextlib.suppress(OSError):
      stream.write(text)
      stream.flush()
  os._exit(status)


def _keep_compiled_programs() -> None:
  """Has JAX keep what it compiles between runs, unless told where, or not to.

  `JAX_COMPILATION_CACHE_DIR` is JAX's own name of the place, and
  `JAX_ENABLE_COMPILATION_CACHE=0` its switch.
  """
  # What a kill or a full disk cut short is compiled anew.
  warnings.filterwarnings(
    'ignore', 'Error (reading|writing) persistent compilation cache entry'
  )
  if jax.config.jax_compilation_cache_dir is not None:
    return
  # A home may be shared by machines with other processors, whose programs
  # would not run here.
  try:
    about = pathlib.Path('/proc/cpuinfo').read_text()
    about = '\n'.join(sorted(set(re.findall(r'(?:model name|flags).*', about))))
  except OSError:
    about = ' '.join(platform.uname())
  processor = hashlib.sha256(about.encode()).hexdigest()[:16]
  folder = os.path.expanduser(f'~/.cache/vae/jax/{processor}')
  with contextlib.suppress(OSError):  # It only saves time.
    os.makedirs(folder, exist_ok=True)
    if os.access(folder, os.W_OK):
      jax.config.update('jax_compilation_cache_dir', folder)


def _mind_destructors() -> None:
  """Makes a signal count that falls into a destructor, where Python drops it.

  And keeps quiet where TensorStore tells an event loop that Orbax has closed
  how a write ended: that it failed is told already.
  """
  report = sys.unraisablehook
  numbers = {
    KeyboardInterrupt: signal.SIGINT,
    TerminatedError: signal.SIGTERM,
  }

  def hook(unraisable):
    if unraisable.exc_type in numbers:
      # Not at once, which would be within the destructor again.
      main_thread = threading.main_thread().ident
      again = (main_thread, numbers[unraisable.exc_type])
      threading.Timer(0.1, signal.pthread_kill, again).start()
    elif str(unraisable.exc_value) != 'Event loop is closed':
      report(unraisable)

  sys.unraisablehook = hook


def define_config(default: str) -> None:
  """Defines `--config`, a config file, and its overrides.

  Args:
    default: the file that is used where the flag is not given, relative to
      the scripts.
  """
  # A default that is known to the flag itself would be loaded, overrides and
  # all, while the script is still being imported.
  config_flags.DEFINE_config_file(
    'config',
    None,
    f'The experiment; configs/ has several. By default {default}. '
    'FILE:ARGUMENT calls get_config(ARGUMENT) in FILE.',
    # It fails where a value is still to be given, and does not say which.
    lock_config=False,
  )
  global _default_config
  _default_config = os.path.join(_SCRIPTS, default)


def config_path() -> str:
  """The file that `--config=FILE[:ARGUMENT]` names.

  Raises:
    UserError: if there is no such file, or it could not open another.
  """
  path, *_ = config_flags.get_config_filename(flags.FLAGS['config']).split(':')
  if not os.path.isfile(path):
    raise UserError(
      f'--config={path}: there is no such file in {os.getcwd()} or {_SCRIPTS}; '
      f'{_SCRIPTS}/configs has the configs.'
    )
  try:
    # Where the config could not open a file, ml_collections keeps that to
    # itself until the config is looked at.
    getattr(flags.FLAGS.config, 'seed', None)
  except OSError as error:
    raise UserError(
      f'--config={path} cannot be loaded: {error.__cause__ or error}'
    ) from error
  except Exception:  # It has no such thing, as whoever checks it will say.
    pass
  return path


_default_config = None


def _find_config(argv: list[str]) -> list[str]:
  """Has `--config` name a file that is there, if one is meant.

  `~` is expanded, and configs/ is found from any folder. Without the flag the
  default is added.
  """
  argv, given = argv.copy(), False
  for i, arg in enumerate(argv[1:], start=1):
    flag, equals, value = arg.partition('=')
    if flag not in ('--config', '-config'):
      continue
    given = True
    if equals:
      argv[i] = f'{flag}={_locate(value)}'
    elif i + 1 < len(argv):
      argv[i + 1] = _locate(argv[i + 1])
  if _default_config is not None and not given:
    argv.insert(1, f'--config={_default_config}')
  return argv


def _locate(config: str) -> str:
  """FILE[:ARGUMENT], with the FILE beside the scripts if it is not here."""
  file, *argument = config.split(':', 1)
  path = paths.expand(file)
  beside = os.path.join(_SCRIPTS, path)
  if not os.path.exists(path) and os.path.isfile(beside):
    path = beside
  return ':'.join([str(path), *argument])


def _parse(argv: list[str]) -> list[str]:
  argv = _find_config(argv)
  # ml_collections' own remarks on a config come beside the error in it.
  logging.set_verbosity(logging.ERROR)
  try:
    return flags.FLAGS(argv)
  except KeyboardInterrupt:
    print('\ninterrupted.', file=sys.stderr)
    sys.exit(130)
  except BaseException as error:
    # Configs are programs, which may fail in any way, and may end this one.
    raised = _raised_by_config(error)
    if raised is not None:
      trace = ''.join(traceback.format_exception(raised))
      _fail(f'--config cannot be loaded: {_brief(trace)}')
    if isinstance(error, BrokenPipeError):
      os._exit(1)  # `--help | head` has seen enough.
    if isinstance(error, SystemExit):
      raise  # --help is one.
    message = str(error)
    if isinstance(error, flags.Error) and 'Traceback' not in message:
      _fail(f'{_brief(message)} (--help lists the flags)')
    trace = ''.join(traceback.format_exception(error))
    _fail(
      _about_missing_key(error, argv)
      or f'--config cannot be loaded: {_brief(trace)}'
    )


def _raised_by_config(error: BaseException) -> BaseException | None:
  """What the user's own code raised, where the libraries made this of it."""
  while error is not None:
    frames = traceback.extract_tb(error.__traceback__)
    if _own(frame.filename for frame in frames):
      return error
    error = error.__context__
  return None


def _about_missing_key(error: Exception, argv: list[str]) -> str | None:
  """What to say where ml_collections refuses to override an unknown key."""
  if not isinstance(error, (AttributeError, KeyError)) or not error.args:
    return None
  inner = error.args[0]
  text = inner.args[0] if isinstance(inner, KeyError) else inner
  # The key, and perhaps on a second line what was meant.
  key, _, hint = str(text).partition('\n')
  for flag in argv:
    if key.strip("'") in flag.split('=')[0].split('.'):
      return f'{flag}: there is no such key in the config. {hint}'.rstrip()
  return None


def _brief(error: str) -> str:
  """An error's message in one line; of a traceback, what and where it was."""
  _, traced, trace = error.rpartition('Traceback')
  if not traced and '  File "' not in error:
    return ' '.join(error.split())
  places = re.findall(r'File "([^"]+)", line (\d+)', error)
  files = _own(file for file, _ in places)
  own = [place for place in places if place[0] in files]
  # After the frames, which are indented.
  lines = (trace or error).splitlines()[1 if traced else 0 :]
  what = itertools.dropwhile(lambda line: line[:1] in ('', ' '), lines)
  what = ' '.join(' '.join(what).split())
  return ', line '.join(own[-1]) + f': {what}' if own else what


_STDLIB = sysconfig.get_path('stdlib')


def _own(files: Iterable[str]) -> set[str]:
  """Those that are the user's own code, not a library that it ran into."""
  return {
    file
    for file in files
    if not file.startswith((_STDLIB, __file__, '<'))
    and 'site-packages' not in file
  }


# Characters of an error, some of which may be a file's.
_MAX_ERROR = 2000


def first_line(error: Exception) -> str:
  """What an error says, in one line of no great length."""
  text = str(error).strip() or type(error).__name__
  return ' '.join(text.split('\n')[0].split())[:300]


def _fail(message: str) -> None:
  # In one line, whatever names and values are quoted in it.
  message = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in message)
  if len(message) > _MAX_ERROR:
    half = _MAX_ERROR // 2
    message = f'{message[:half]} … {message[-half:]}'
  print(f'error: {message}', file=sys.stderr, flush=True)
  if jax.distributed.is_initialized():
    # A proper exit would wait, for minutes, for processes that go on.
    os._exit(2)
  sys.exit(2)
