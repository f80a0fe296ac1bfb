"""The checkpoints in a workdir, and how to read them back.

Each is a folder that gets its final name only after it was written and read
back (`checkpoint_writer`). It holds the training state, as Orbax writes it; the
validation metrics of that state, if any; and a table of contents with a digest
of every array, by which damage is noticed: a flipped bit, a file cut short.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import tempfile
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from vae import atomic_files
from vae import paths
from vae.errors import UserError
from vae.steps import TrainState

DIRECTORY = 'checkpoints'
METRIC = 'val/loss'

# In the folder of a checkpoint: the state, its table of contents, its metrics.
STATE = 'default'
CONTENTS_FILE = 'contents/metadata'
METRICS_FILE = 'metrics/metrics'

# Behind the step, the name of a folder that is being written or deleted. A
# bucket cannot rename; there an object of this name lies beside the folder.
_UNFINISHED = '.orbax-checkpoint-tmp'

# Orbax takes a path for a pattern, and TensorStore a backslash for a slash.
_NOT_PLAIN = frozenset('*?[]\\')

# Beside the checkpoints: those that turned out to be damaged.
_DAMAGED = 'damaged_checkpoints'


class DamagedError(Exception):
  """What is wrong with a checkpoint that cannot be read back as written."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint holds.

  Attributes:
    state: as it was saved, in host memory.
    metrics: of a validation of this state; none if there was none.
    untold: metrics of the last steps, that no line tells of yet (`report`).
  """

  state: TrainState
  metrics: Mapping[str, float]
  untold: Mapping[str, list[float]]


def warn(message: str) -> None:
  """Says a line on standard error, whose reader may have gone."""
  with contextlib.suppress(OSError):
    print(message, file=sys.stderr, flush=True)


def loss(metrics: Mapping[str, float]) -> float:
  """What checkpoints are ranked by; none, or no number, is the worst."""
  value = metrics.get(METRIC, math.inf)
  return value if math.isfinite(value) else math.inf


def exist(workdir: epath.Path) -> bool:
  """Whether a workdir holds a complete checkpoint."""
  return latest_step(workdir) is not None


def latest_step(workdir: epath.PathLike) -> int | None:
  """The step of a workdir's last complete checkpoint, None without any."""
  return max(Checkpoints(workdir).all_steps(), default=None)


def open_to_read(workdir: epath.PathLike) -> 'Checkpoints':
  """The checkpoints of a run, of which there must be one.

  Raises:
    UserError: if there are none.
  """
  if not exist(workdir):
    raise UserError(
      f'{epath.Path(workdir) / DIRECTORY} holds no complete checkpoint; the '
      'run writes its first when it is validated.'
    )
  return Checkpoints(workdir)


class Checkpoints:
  """Those in `workdir/checkpoints`, of a run that may still be training.

  Reading changes nothing, but for `restore_last`.
  """

  def __init__(self, workdir: epath.PathLike):
    """Takes the folder of the run, which need not be there."""
    self._workdir = paths.absolute(workdir)
    self.directory = self._workdir / DIRECTORY

  def all_steps(self) -> list[int]:
    """The steps of all the checkpoints, ascending.

    Raises:
      UserError: if they cannot be listed.
    """
    with _reading_errors(self.directory):
      if paths.is_remote(self.directory):
        files = paths.list_files(self.directory)
        names = {name.split('/')[0] for name in files}
        names -= {
          name.removesuffix(_UNFINISHED)
          for name in names
          if _UNFINISHED in name
        }
      elif self.directory.is_dir():
        names = [folder.name for folder in self.directory.iterdir()]
      else:
        return []
    return sorted(int(name) for name in names if name.isdecimal())

  def latest_step(self) -> int | None:
    """The step of the last checkpoint, or None where there is none."""
    return max(self.all_steps(), default=None)

  def best_step(self) -> int | None:
    """The step of the checkpoint of least validation loss, or None."""
    losses = self.losses()
    best = min(losses, key=losses.get, default=None)
    return best if losses.get(best, math.inf) < math.inf else None

  def losses(self) -> dict[int, float]:
    """The validation loss by step; infinite if there is none.

    Checkpoints whose metrics are damaged are left out.

    Raises:
      UserError: if metrics cannot be read: another would be the best.
    """
    losses = {}
    for step in self.all_steps():
      with contextlib.suppress(DamagedError):
        losses[step] = loss(_read_metrics(self._folder(step)))
    return losses

  def find(self, checkpoint: str | int) -> int:
    """The step that `best`, `last` or a number means.

    Raises:
      UserError: if there is no such checkpoint.
    """
    if checkpoint == 'best':
      # A run that has not been validated yet has no best.
      return self.best_step() or self.latest_step()
    if checkpoint == 'last':
      return self.latest_step()
    steps = self.all_steps()
    if not str(checkpoint).isdecimal() or int(checkpoint) not in steps:
      raise UserError(
        f'{self.directory} has no checkpoint {checkpoint}; there are best, '
        f'last, {", ".join(map(str, steps))}.'
      )
    return int(checkpoint)

  def restore(self, shapes: TrainState, step: int) -> TrainState:
    """The state saved at `step`, in host memory, to the last bit.

    Args:
      shapes: and dtypes that it must have. On how many devices it was trained
        does not matter.
      step: which checkpoint.

    Raises:
      UserError: if it is damaged, or its arrays are not those of `shapes`.
    """
    try:
      return self._restore(shapes, self._folder(step)).state
    except DamagedError as error:
      others = [str(other) for other in self.all_steps() if other != step]
      raise UserError(
        f'checkpoint {self.directory / str(step)} cannot be restored: {error} '
        f'Others: {", ".join(others) or "none"}.'
      ) from error

  def restore_last(self, shapes: TrainState) -> Restored | None:
    """What the last sound checkpoint holds, for the run that goes on.

    Later ones, which are damaged, are told of on standard error and moved out
    of the way, into a folder beside.

    Args:
      shapes: as of `restore`.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      UserError: if all are damaged, or the last sound one's arrays are not
        those of `shapes`.
    """
    damaged = {}
    for step in reversed(self.all_steps()):
      try:
        restored = self._restore(shapes, self._folder(step))
      except DamagedError as error:
        damaged[step] = error
        continue
      self._set_aside(damaged | self._unranked(), step)
      return restored
    if not damaged:
      return None
    step, error = next(iter(damaged.items()))
    raise UserError(
      f'no checkpoint in {self.directory} can be restored; that of step {step} '
      f'is damaged: {error} Nothing was moved. Name another --workdir, or '
      f'delete {self._workdir} to train anew.'
    )

  def _unranked(self) -> dict[int, DamagedError]:
    """Checkpoints that cannot be compared by their metrics.

    One that was being deleted when the run was killed may be among them.
    """
    damaged = {}
    for step in self.all_steps():
      try:
        _read_metrics(self._folder(step))
      except DamagedError as error:
        damaged[step] = error
    return damaged

  def _set_aside(self, damaged: Mapping[int, DamagedError], step: int) -> None:
    folder = self._workdir / _DAMAGED
    for other, error in damaged.items():
      number, place = 1, folder / str(other)
      while place.exists():
        number, place = number + 1, folder / f'{other}_{number}'
      try:
        folder.mkdir(exist_ok=True)
        paths.move(self.directory / str(other), place)
      except OSError as reason:
        raise UserError(
          f'the checkpoint of step {other} in {self.directory} is damaged '
          f'({error}), and cannot be moved to {place} '
          f'({reason.strerror or reason}); delete it.'
        ) from reason
      warn(
        f'warning: the checkpoint of step {other} is damaged: {error} It was '
        f'moved to {place}; the run goes on from that of step {step}.'
      )

  def _restore(self, shapes: TrainState, folder: epath.Path) -> Restored:
    """Reads all of a checkpoint.

    Raises:
      DamagedError: if it is not as it was written.
      UserError: if its arrays are not those of `shapes`.
    """
    contents, metrics = _read_contents(folder), _read_metrics(folder)
    if contents is not None:
      check_arrays(contents['arrays'], shapes)
      # They may have been added, just before the run was killed.
      known = contents['metrics'] or metrics
      if _digest_of_json(metrics) != _digest_of_json(known):
        raise DamagedError('its metrics are not those that were saved.')
    target = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), shapes)
    state = _restore_state(folder, target)
    found = describe(state)
    if contents is None:
      # Written before there were digests.
      check_arrays(found, shapes)
      return Restored(state, metrics, {})
    for name, about in contents['arrays'].items():
      if found[name] != about:
        raise DamagedError(f'{name} is not what was saved.')
    return Restored(state, metrics, contents['untold'])

  def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds those of a validation to a checkpoint that has none."""
    folder = self._folder(step)
    contents = _read_contents(folder)
    if not metrics or contents is None or contents['metrics']:
      return
    contents['metrics'] = dict(metrics)
    contents['sha256'] = _digest_of_json(contents)
    for path, content in (
      (folder / METRICS_FILE, metrics),
      (folder / CONTENTS_FILE, contents),
    ):
      atomic_files.replace(path, json.dumps(content).encode())

  def read_back(self, state: TrainState, folder: epath.Path) -> None:
    """Checks that a checkpoint that was just written can be restored.

    Args:
      state: that was written.
      folder: of the checkpoint, under whatever name.

    Raises:
      DamagedError: if what is read is not what was written.
      UserError: if the disk cannot be read.
    """
    self._restore(state, folder)

  def begin(self, step: int) -> epath.Path:
    """Makes the folder that the checkpoint of a step is written into."""
    unfinished = self._unfinished(step)
    if paths.is_remote(unfinished):
      unfinished.write_text('')
      return self._folder(step)
    unfinished.mkdir()
    return unfinished

  def publish(self, step: int) -> None:
    """Makes a checkpoint that is written one of `all_steps`."""
    if paths.is_remote(self.directory):
      self._unfinished(step).unlink()
    else:
      self._unfinished(step).rename(self._folder(step))

  def delete(self, step: int) -> None:
    """Deletes a checkpoint; one that is half deleted is none of `all_steps`."""
    if paths.is_remote(self.directory):
      self.begin(step)
      self._clear(self._unfinished(step))
    else:
      self._folder(step).rename(self._unfinished(step)).rmtree()

  def clear_unfinished(self) -> None:
    """Deletes what a killed process left half written or half deleted."""
    for path in self.directory.iterdir():
      if _UNFINISHED in path.name:
        self._clear(path)

  def _clear(self, unfinished: epath.Path) -> None:
    if paths.is_remote(unfinished):
      folder = self.directory / unfinished.name.removesuffix(_UNFINISHED)
      folder.rmtree(missing_ok=True)
      unfinished.unlink()
    else:
      unfinished.rmtree()

  def _unfinished(self, step: int) -> epath.Path:
    return self.directory / f'{step}{_UNFINISHED}'

  def _folder(self, step: int) -> epath.Path:
    return self.directory / str(step)


def save_state(state: TrainState, folder: epath.Path) -> None:
  """Writes a state into the folder of its checkpoint, which is there."""
  with _open_orbax(folder) as (orbax, plain):
    orbax.save(plain / STATE, args=ocp.args.StandardSave(state))
    if paths.is_remote(folder):
      paths.copy(plain, folder)


def _restore_state(folder: epath.Path, target: TrainState) -> TrainState:
  """Reads a state, as a tree of the shapes and dtypes of `target`.

  Raises:
    DamagedError: if it cannot be made of what is there.
    UserError: if what is there cannot be read.
  """
  with _open_orbax(folder) as (orbax, plain):
    if paths.is_remote(folder):
      with _reading_errors(folder / STATE):
        paths.copy(folder / STATE, plain / STATE)
    try:
      return orbax.restore(plain / STATE, args=ocp.args.StandardRestore(target))
    except MemoryError:
      raise
    except Exception as error:  # Whatever comes of bytes that make no sense.
      _check_readable(plain)
      raise DamagedError(f'it cannot be read: {_brief(error)}.') from error


@contextlib.contextmanager
def _open_orbax(
  folder: epath.Path,
) -> Iterator[tuple[ocp.Checkpointer, epath.Path]]:
  """An Orbax checkpointer of one state, and a path that it understands.

  Args:
    folder: to be read or written, whatever characters are in its path.

  Yields:
    The checkpointer, and the folder; but a symbolic link to it if its path has
    `_NOT_PLAIN` characters, and an empty local folder if it is in a bucket:
    Orbax there asks for rights that writing objects does not need, and its
    errors say nothing.

  Raises:
    UserError: if there is no place for the link or the local folder.
  """
  with contextlib.ExitStack() as stack:
    orbax = stack.enter_context(
      ocp.Checkpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=alone()),
        multiprocessing_options=alone(),
      )
    )
    if paths.is_remote(folder) or _NOT_PLAIN.intersection(str(folder)):
      try:
        place = stack.enter_context(tempfile.TemporaryDirectory())
      except OSError as error:
        raise UserError(
          f'{folder} needs a temporary folder, which cannot be made '
          f'({error.strerror}); set TMPDIR to a folder that can be written.'
        ) from error
      plain = epath.Path(place) / 'checkpoint'
      if paths.is_remote(folder):
        plain.mkdir()
      else:
        os.symlink(folder, plain)
      folder = plain
    yield orbax, folder


def make_contents(
  state: TrainState,
  metrics: Mapping[str, float],
  untold: Mapping[str, list[float]],
) -> dict[str, Any]:
  """The table of contents of a checkpoint, to be written as JSON."""
  contents = {
    'arrays': describe(state),
    'metrics': dict(metrics),
    'untold': dict(untold),
  }
  # As it is read back: JSON knows no tuples.
  contents = json.loads(json.dumps(contents))
  return {**contents, 'sha256': _digest_of_json(contents)}


def describe(state: TrainState) -> dict[str, dict[str, Any]]:
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


def check_arrays(found: Mapping[str, Any], shapes: TrainState) -> None:
  """Checks that arrays are those that a config asks for.

  Raises:
    UserError: the first that is not.
  """
  wanted = {
    jax.tree_util.keystr(path): (list(leaf.shape), str(np.dtype(leaf.dtype)))
    for path, leaf in jax.tree.leaves_with_path(shapes)
  }
  for name in sorted(wanted.keys() ^ found.keys()):
    raise UserError(
      f'the checkpoint and its config do not go together: {name} is in '
      f'{"the checkpoint" if name in found else "the model"} alone.'
    )
  for name, (shape, dtype) in wanted.items():
    about = found[name]
    if about['shape'] != shape:
      raise UserError(
        f'the checkpoint and its config do not go together: {name} has the '
        f'shape {tuple(about["shape"])}, and the config asks for '
        f'{tuple(shape)}.'
      )
    if about['dtype'] != dtype:
      raise UserError(
        f'the checkpoint and its config do not go together: {name} is '
        f'{about["dtype"]}, and the config asks for {dtype}.'
      )


def alone() -> ocp.options.MultiprocessingOptions:
  """Has Orbax wait for no other process; each call needs its own."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=process,
    active_processes={process},
    barrier_sync_key_prefix=f'process_{process}',
  )


def _read(path: epath.Path) -> bytes:
  """What a file of a checkpoint holds.

  Raises:
    DamagedError: if it is not there.
    UserError: if it cannot be read, which says nothing of what it holds.
  """
  with _reading_errors(path):
    return path.read_bytes()


@contextlib.contextmanager
def _reading_errors(path: epath.Path) -> Iterator[None]:
  """Turns what reading raises into the two errors of `_read`."""
  try:
    yield
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
    raise DamagedError(f'{path.name} is not there.') from error
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror or error}); once it can be, the '
      'same command goes on. Nothing was changed.'
    ) from error


def _check_readable(folder: epath.Path) -> None:
  """Tells a disk that fails from a checkpoint that is damaged.

  Raises:
    UserError: if what is there cannot be read at all.
  """
  for name in paths.list_files(folder):
    _read(folder / name)


def _read_contents(folder: epath.Path) -> dict[str, Any] | None:
  """The table of contents of a checkpoint; None for an old one without."""
  path = folder / CONTENTS_FILE
  if not path.parent.exists():
    return None
  contents = _read_json(path)
  try:
    if contents.pop('sha256') == _digest_of_json(contents):
      return contents
  except (AttributeError, KeyError):
    pass
  raise DamagedError('its table of contents is not what was saved.')


def _read_metrics(folder: epath.Path) -> dict[str, float]:
  path = folder / METRICS_FILE
  metrics = _read_json(path)
  if not isinstance(metrics, dict):
    raise DamagedError(f'{path.name} cannot be read.')
  return metrics


def _read_json(path: epath.Path) -> Any:
  try:
    return json.loads(_read(path))
  except ValueError as error:
    raise DamagedError(f'{path.name} cannot be read.') from error


def _digest_of_json(content: Any) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _brief(error: Exception) -> str:
  """What an error says first; TensorStore goes on with all its settings."""
  line = (str(error).strip() or type(error).__name__).split('\n')[0]
  return line.rstrip('.') if len(line) < 200 else line[:200] + ' …'
