"""The checkpoints of a run: which are kept, found, restored and replaced.

`workdir/checkpoints/STEP` is complete unless a file `STEP.unfinished` lies
beside it, which marks a folder that is being written or deleted. So it is on
disks and in buckets, where nothing can be renamed.
"""

from collections.abc import Callable, Mapping
import contextlib
import math
import sys
import threading
import time
from typing import Any
import uuid

from etils import epath
import jax

from vae import checkpoint_files, paths
from vae.checkpoint_files import DamagedError, Restored
from vae.errors import UserError, WriteError

# The validation loss, which ranks checkpoints.
METRIC = 'val/loss'

_UNFINISHED = '.unfinished'

# The last, and the one before it in case the last is damaged.
_KEEP_LAST = 2

# Between two tries to write, and between two calls of `stop`.
_SECONDS_TO_RETRY = 10.0
_SECONDS_TO_ASK = 0.5


class Checkpoints:
  """The complete checkpoints of a run, which may still be training.

  All methods raise UserError if the disk or the bucket cannot be read. The
  `directory` of the checkpoints need not exist.
  """

  def __init__(self, workdir: epath.PathLike):
    self._workdir = paths.absolute(workdir)
    self.directory = self._workdir / 'checkpoints'

  def folder(self, step: int | str) -> epath.Path:
    """The folder of a checkpoint."""
    return self.directory / str(step)

  def all_steps(self) -> list[int]:
    """The steps of the checkpoints, ascending."""
    steps = [name for name in self.names() if name.isdecimal()]
    # Listed after the folders, each of which is made after its mark.
    marks = self.names() if steps else ()
    return sorted(
      int(step) for step in steps if step + _UNFINISHED not in marks
    )

  def names(self) -> set[str]:
    """The names in `directory`, marks of unfinished checkpoints included."""
    with contextlib.suppress(DamagedError):
      with checkpoint_files.reading(self.directory):
        return {path.name for path in self.directory.iterdir()}
    return set()

  def best_step(self) -> int | None:
    """The step of the least validation loss, None without any."""
    return next(iter(self.ranking()), None)

  def ranking(self) -> list[int]:
    """The steps with a finite validation loss, best first; no damaged ones."""
    losses = {}
    for step in self.all_steps():
      with contextlib.suppress(DamagedError):
        contents = checkpoint_files.read_contents(self.folder(step))
        loss = contents['metrics'].get(METRIC, math.nan)
        if math.isfinite(loss):
          losses[step] = loss
    return sorted(losses, key=losses.__getitem__)

  def find(self, checkpoint: str | int) -> int:
    """The step of the checkpoint `best`, `last` or of a number.

    Raises UserError if there is no such checkpoint.
    """
    steps = self.all_steps()
    if not steps:
      raise UserError(
        f'{self.directory} holds no complete checkpoint; a run writes its '
        'first when it is validated.'
      )
    if checkpoint == 'best':
      # Without a finite validation loss there is no best.
      return self.best_step() or steps[-1]
    names = {'last': steps[-1]} | {str(step): step for step in steps}
    if str(checkpoint) not in names:
      raise UserError(
        f'{self.directory} has no checkpoint {checkpoint}; there are best, '
        f'{", ".join(names)}.'
      )
    return names[str(checkpoint)]

  def restore(self, shapes: Any, step: int) -> Any:
    """Restores the state of a step, to the last bit, into host memory.

    Raises UserError if it is damaged, or its arrays differ from `shapes`.
    """
    try:
      return checkpoint_files.read(self.folder(step), shapes).state
    except DamagedError as error:
      others = [str(other) for other in self.all_steps() if other != step]
      raise UserError(
        f'checkpoint {self.folder(step)} cannot be restored: {error} Others: '
        f'{", ".join(others) or "none"}.'
      ) from error

  def restore_last(self, shapes: Any) -> Restored | None:
    """Restores the last sound checkpoint, to continue the run.

    Damaged checkpoints are moved to `damaged_checkpoints` in the workdir, with
    a warning. None if there is no checkpoint at all; raises UserError if all
    are damaged, or the arrays differ from `shapes`.
    """
    restored, sound, damaged = None, 0, {}
    for step in reversed(self.all_steps()):
      try:
        if restored is None:
          restored = checkpoint_files.read(self.folder(step), shapes)
          sound = step
        else:  # Without its metrics it could be neither kept nor deleted.
          checkpoint_files.read_contents(self.folder(step))
      except DamagedError as error:
        damaged[step] = error
    if restored is None and damaged:
      step = max(damaged)
      raise UserError(
        f'no checkpoint in {self.directory} can be restored; of step {step}, '
        f'{damaged[step]} Name another --workdir, or delete {self._workdir} to '
        'train from the start.'
      )
    for other, damage in damaged.items():
      place = self._set_aside(other)
      print(
        f'warning: the checkpoint of step {other} is damaged: {damage} It was '
        f'moved to {place}; the run continues from step {sound}.',
        file=sys.stderr,
      )
    return restored

  def _set_aside(self, step: int) -> epath.Path:
    folder = self._workdir / 'damaged_checkpoints'
    place = folder / f'{step}_{uuid.uuid4().hex[:8]}'
    try:
      folder.mkdir(exist_ok=True)
      paths.move(self.folder(step), place)
    except OSError as error:
      raise UserError(
        f'{self.folder(step)} is damaged and cannot be moved to {place} '
        f'({error.strerror or error}); delete it.'
      ) from error
    return place


class CheckpointWriter:
  """Writes a run's checkpoints in a thread; a context manager.

  Older checkpoints are deleted once the new one has been read back. One that
  cannot be written is retried until it can be, or a later one replaces it;
  `warn` is called with a line. Besides the last two, the `keep_best` of least
  validation loss are kept.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    keep_best: int = 2,
    warn: Callable[[str], None] = print,
  ):
    self._saved = Checkpoints(workdir)
    self._keep_best, self._warn = keep_best, warn
    # Of the last checkpoint, and why it could not be written.
    self._step = 0
    self._error: Exception | None = None
    self._tried, self._given_up = threading.Event(), threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self):
    return self

  def __exit__(self, *unused_args):
    self._settle()

  def _settle(self) -> None:
    """Waits until the last checkpoint is written, or gives it up."""
    if self._thread is not None:
      self._tried.wait()
      self._given_up.set()
      self._thread.join()

  def save(
    self,
    step: int,
    state: Any,
    metrics: Mapping[str, float] | None = None,
    first: Callable[[], None] = lambda: None,
  ) -> None:
    """Queues a checkpoint, once the one before was tried.

    The state is copied to host memory before this returns. `metrics` are those
    of its validation, if any. `first` is called in the thread before writing,
    to save what the checkpoint counts on.
    """
    job = step, jax.device_get(state), metrics or {}, first
    self._settle()
    self._step = step
    self._tried.clear()
    self._given_up.clear()
    # A daemon, as the process may end while a bucket hangs.
    self._thread = threading.Thread(
      target=self._try_until_done, args=job, daemon=True
    )
    self._thread.start()

  def finish(
    self, patience: float = 0.0, stop: Callable[[], bool] = lambda: False
  ) -> None:
    """Waits until the last checkpoint is written.

    It is retried for `patience` seconds, unless `stop` returns True; raises
    WriteError if it cannot be written.
    """
    end = time.monotonic() + patience
    if self._thread is None:
      return
    self._tried.wait()
    while self._error is not None:
      if time.monotonic() >= end or stop():
        raise WriteError(
          f'the checkpoint of step {self._step:,} could not be written into '
          f'{self._saved.directory} ({_reason(self._error)}). Once it can be, '
          'the same command continues from the last one that was written.'
        )
      self._thread.join(min(patience, _SECONDS_TO_ASK))

  def _try_until_done(self, step: int, *job: Any) -> None:
    which = f'checkpoint of step {step:,}'
    while True:
      error: Exception | None = None
      try:
        self._write(step, *job)
      except Exception as caught:  # Training continues, whatever it is.
        error = caught
      if error is not None and self._error is None:
        self._warn(
          f'warning: the {which} cannot be written into '
          f'{self._saved.directory} ({_reason(error)}). Training continues, '
          'saved checkpoints are kept, and writing is retried.'
        )
      elif error is None and self._error is not None:
        self._warn(f'The {which} could be written.')
      self._error = error
      self._tried.set()
      if error is None or self._given_up.wait(_SECONDS_TO_RETRY):
        return

  def _write(self, step, state, metrics, first) -> None:
    first()
    saved = self._saved
    if step in saved.all_steps():
      # Saved when the run was stopped, and validated now.
      contents = checkpoint_files.read_contents(saved.folder(step))
      if metrics and not contents['metrics']:
        contents['metrics'] = metrics
        checkpoint_files.write_contents(saved.folder(step), contents)
    else:
      saved.directory.mkdir(parents=True, exist_ok=True)
      for name in saved.names():
        if name.endswith(_UNFINISHED):
          self._delete(name.removesuffix(_UNFINISHED))
      self._mark(step).write_bytes(b'')
      saved.folder(step).mkdir()
      checkpoint_files.write(saved.folder(step), state, metrics)
      self._mark(step).unlink()
    paths.flush(saved.directory)
    kept = saved.ranking()[: self._keep_best]
    for other in saved.all_steps()[:-_KEEP_LAST]:
      if other not in kept:
        self._delete(other)

  def _delete(self, step: int | str) -> None:
    self._mark(step).write_bytes(b'')
    self._saved.folder(step).rmtree(missing_ok=True)
    self._mark(step).unlink()

  def _mark(self, step: int | str) -> epath.Path:
    return self._saved.directory / f'{step}{_UNFINISHED}'


def _reason(error: BaseException) -> str:
  """The cause of an error, in a line."""
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, OSError) and cause.strerror:
      return cause.strerror
    cause = cause.__cause__ or cause.__context__
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
