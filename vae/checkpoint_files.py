"""One checkpoint: a training state as Orbax writes it, metrics and digests.

Its folder holds the state (`default/`) and a table of contents (JSON) with the
metrics of the state's validation and a digest of every array, by which a
flipped bit or a file cut short is found.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
import types
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from vae import paths
from vae.errors import UserError

STATE = 'default'
CONTENTS = 'contents/metadata'

# Orbax takes a path for a pattern, and TensorStore a backslash for a slash.
_NOT_PLAIN = frozenset('*?[]\\')


class DamagedError(Exception):
  """A checkpoint differs from what was saved; the message says how."""


class Restored(NamedTuple):
  """A state, in host memory, and the metrics of its validation, if any."""

  state: Any
  metrics: Mapping[str, float]


def write(folder: epath.Path, state: Any, metrics: Mapping[str, float]) -> None:
  """Writes a checkpoint into an empty folder, and reads it back.

  Raises DamagedError if the state that is read differs.
  """
  with _plain(folder) as plain:
    checkpointer, args = _orbax()
    checkpointer.save(plain / STATE, args=args.StandardSave(state))
    if paths.is_remote(folder):
      paths.copy(plain, folder)
  (folder / CONTENTS).parent.mkdir()
  write_contents(folder, {'arrays': _describe(state), 'metrics': metrics})
  read(folder, state)


def read(folder: epath.Path, shapes: Any) -> Restored:
  """Reads a checkpoint and compares every array with its digest.

  `shapes` is a pytree of arrays, or of their shapes and dtypes.

  Raises:
    DamagedError: if the checkpoint differs from what was saved.
    UserError: if its arrays differ from `shapes`, or the disk fails.
  """
  contents = read_contents(folder)
  _check_arrays(contents['arrays'], shapes)
  target = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), shapes)
  with _plain(folder) as plain:
    if paths.is_remote(folder):
      with reading(folder / STATE):
        paths.copy(folder / STATE, plain / STATE)
    try:
      checkpointer, args = _orbax()
      state = checkpointer.restore(
        plain / STATE, args=args.StandardRestore(target)
      )
    except MemoryError:
      raise
    except Exception as error:  # Damaged bytes raise anything.
      for name in paths.list_files(plain):  # A failing disk is not damage.
        with reading(folder / name):
          (plain / name).read_bytes()
      reason = (str(error).strip() or type(error).__name__).split('\n')[0]
      raise DamagedError(f'it cannot be read: {reason[:200]}.') from error
  if _describe(state) != contents['arrays']:
    raise DamagedError('an array differs from what was saved.')
  return Restored(state, contents['metrics'])


def write_contents(folder: epath.Path, contents: Mapping[str, Any]) -> None:
  """Writes or replaces a checkpoint's table of contents."""
  contents = {**contents, 'sha256': _digest(contents)}
  paths.replace(folder / CONTENTS, json.dumps(contents).encode())


def read_contents(folder: epath.Path) -> dict[str, Any]:
  """Reads the table of contents; raises as `read` does."""
  with reading(folder / CONTENTS):
    content = (folder / CONTENTS).read_bytes()
  with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
    contents = json.loads(content)
    if contents.pop('sha256') == _digest(contents):
      return contents
  raise DamagedError('its table of contents differs from what was saved.')


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
  """Turns a missing file into DamagedError, other OSErrors into UserError."""
  try:
    yield
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
    raise DamagedError(f'{path.name} is missing.') from error
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror or error}); nothing was '
      'changed. Run the same command again once it can be read.'
    ) from error


def _orbax() -> tuple[Any, types.ModuleType]:
  """Orbax's checkpointer, and the types of its arguments."""
  # Here, as it takes a fifth of a run's imports: by the first checkpoint the
  # devices are at work.
  import orbax.checkpoint as ocp

  _hide_tracebacks()
  # Each process saves by itself; Orbax would wait for the others.
  process = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=process,
    active_processes={process},
    barrier_sync_key_prefix=f'process_{process}',
  )
  handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
  checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
  return checkpointer, ocp.args


@functools.cache
def _hide_tracebacks() -> None:
  """Hides tracebacks of Orbax's threads; one line says what failed."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_is_not_of_orbax)
  # Once one array fails Orbax closes its event loop; TensorStore prints a
  # traceback for each of the others.
  previous = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      previous(unraisable)

  sys.unraisablehook = hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  # asyncio wraps the futures of TensorStore in `_wrap_awaitable`.
  text = record.pathname + record.getMessage()
  return '/orbax/' not in text and '_wrap_awaitable' not in text


@contextlib.contextmanager
def _plain(folder: epath.Path) -> Iterator[epath.Path]:
  """A path of a checkpoint's folder that Orbax understands.

  A symbolic link if it has `_NOT_PLAIN` characters; an empty local folder for a
  bucket, where Orbax needs more rights than objects do.
  """
  is_remote = paths.is_remote(folder)
  if not is_remote and not _NOT_PLAIN.intersection(str(folder)):
    yield folder
    return
  try:
    temporary = tempfile.TemporaryDirectory()
  except OSError as error:
    raise UserError(
      f'{folder} needs a temporary folder ({error.strerror}); set TMPDIR to a '
      'folder that can be written.'
    ) from error
  with temporary as place:
    plain = epath.Path(place) / 'checkpoint'
    plain.mkdir() if is_remote else os.symlink(folder, plain)
    yield plain


def _digest(contents: Mapping[str, Any]) -> str:
  text = json.dumps(contents, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _describe(state: Any) -> dict[str, dict[str, Any]]:
  """Shape, dtype and digest of each array of a state, by its path."""
  table = {}
  for path, array in jax.tree.leaves_with_path(state):
    array = np.asarray(array)
    table[jax.tree_util.keystr(path)] = {
      'shape': list(array.shape),
      'dtype': str(array.dtype),
      'sha256': hashlib.sha256(array.tobytes()).hexdigest(),
    }
  return table


def _check_arrays(found: Mapping[str, Any], shapes: Any) -> None:
  saved = {k: f'{v["dtype"]}{v["shape"]}' for k, v in found.items()}
  wanted = {
    jax.tree_util.keystr(path): f'{np.dtype(leaf.dtype)}{list(leaf.shape)}'
    for path, leaf in jax.tree.leaves_with_path(shapes)
  }
  for name in sorted(saved.keys() | wanted.keys()):
    if saved.get(name) != wanted.get(name):
      raise UserError(
        f'the checkpoint does not fit its config: {name} is '
        f'{saved.get(name, "missing")} in the checkpoint and '
        f'{wanted.get(name, "missing")} in the model; use the config and code '
        'that wrote it.'
      )
