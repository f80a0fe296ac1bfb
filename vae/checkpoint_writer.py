"""Writes the checkpoints of a run, in the background.

A checkpoint is written aside and read back, and gets its final name (in a
bucket, loses its mark of an unfinished one) only if what was read has the
digests of what was written. A write that fails either way
is reported once and tried again, until it succeeds or a later checkpoint takes
its place. Older checkpoints are deleted after that.
"""

from collections.abc import Callable
from collections.abc import Mapping
import json
import logging
import math
import os
import re
import threading
import time

from etils import epath
import jax

from vae import checkpoints
from vae import paths
from vae.checkpoints import Checkpoints
from vae.checkpoints import DamagedError
from vae.errors import WriteError
from vae.steps import TrainState

# Between two tries to write what could not be written.
_SECONDS_TO_RETRY = 10.0

# In the path of its files.
_ORBAX = f'{os.sep}orbax{os.sep}'

# Between two questions whether to go on trying.
_SECONDS_TO_ASK = 0.5

# How many of the last are kept, should the very last turn out to be damaged.
_KEEP_LAST = 2


class CheckpointWriter:
  """Writes into `workdir/checkpoints`; a context manager.

  On leaving the context, what is being written is written to its end; and what
  cannot be is given up.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    keep_best: int = 2,
    warn: Callable[[str], None] = checkpoints.warn,
  ):
    """Writes nothing yet.

    Args:
      workdir: of the run.
      keep_best: how many to keep by validation loss, besides the last two.
      warn: takes a line where one cannot be written.
    """
    self._saved = Checkpoints(workdir)
    self._directory = self._saved.directory
    self._keep_best, self._warn = keep_best, warn
    # Step, state, metrics and untold metrics of what is to be written.
    self._job = None
    # The last one that could not be, and why.
    self._failed, self._error = None, None
    self._closing = False
    self._changed = threading.Condition()
    # Orbax logs a traceback, in each of its threads, of what is told in a line;
    # and its event loops do, at any time later, of tasks that it forgot.
    self._absl = logging.getLogger('absl')
    self._absl.addFilter(_is_not_orbax)
    logging.getLogger('asyncio').addFilter(_is_no_task_of_orbax)
    self._thread = threading.Thread(
      target=self._write_jobs, name='checkpoints', daemon=True
    )
    self._thread.start()

  def __enter__(self):
    return self

  def __exit__(self, *unused_args):
    with self._changed:
      self._changed.wait_for(self._is_tried)
      self._job, self._closing = None, True
      self._changed.notify_all()
    self._thread.join()
    self._absl.removeFilter(_is_not_orbax)

  def finish(
    self, patience: float = 0.0, stop: Callable[[], bool] = lambda: False
  ) -> None:
    """Waits until all is written.

    Args:
      patience: for how many seconds to go on trying what could not be.
      stop: asked now and then; True ends that.

    Raises:
      UserError: if it still cannot be.
    """
    deadline = time.monotonic() + patience
    with self._changed:
      self._changed.wait_for(self._is_tried)
      while self._job is not None:
        left = deadline - time.monotonic()
        if left <= 0 or stop():
          break
        self._changed.wait(min(left, _SECONDS_TO_ASK))
      else:
        return
      raise WriteError(
        f'the checkpoint of step {self._job[0]:,} could not be written into '
        f'{self._directory} ({_reason(self._error)}). Once it can be, the same '
        'command goes on from the last one that was written.'
      )

  def save(
    self,
    step: int,
    state: TrainState,
    metrics: Mapping[str, float] | None = None,
    untold: Mapping[str, list[float]] | None = None,
    first: Callable[[], None] = lambda: None,
  ) -> None:
    """Has a checkpoint written, once the one before it is.

    It takes the place of one before it that cannot be written.

    Args:
      step: the state's.
      state: to be saved; copied to host memory before this returns.
      metrics: of a validation of this very state; a checkpoint without them
        gives way to any that has them.
      untold: as of `checkpoints.Restored`.
      first: called before writing, in the background; saves the metrics that
        the checkpoint counts on.
    """
    state = jax.device_get(state)
    with self._changed:
      self._changed.wait_for(self._is_tried)
      self._job = (step, state, dict(metrics or {}), dict(untold or {}), first)
      self._changed.notify_all()

  def _is_tried(self) -> bool:
    """Whether nothing is to be written but what could not be."""
    return self._job is None or self._job is self._failed

  def _write_jobs(self) -> None:
    """What the thread does."""
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._job is not None or self._closing)
        job = self._job
      if job is None:
        return
      error = None
      try:
        self._write(*job)
      except Exception as caught:  # Whatever it is, training goes on.
        error = caught
      with self._changed:
        self._tell(job[0], error)
        if error is None and self._job is job:
          self._job = None
        self._error, self._failed = error, None if error is None else job
        self._changed.notify_all()
        if error is not None:
          self._changed.wait_for(
            lambda job=job: self._job is not job, _SECONDS_TO_RETRY
          )

  def _tell(self, step: int, error: Exception | None) -> None:
    if error is not None and self._error is None:
      self._warn(
        f'warning: the checkpoint of step {step:,} cannot be written into '
        f'{self._directory} ({_reason(error)}). Training goes on, what was '
        'saved is kept, and writing is tried again.'
      )
    if error is None and self._error is not None:
      self._warn(f'The checkpoint of step {step:,} could be written.')

  def _write(self, step, state, metrics, untold, first) -> None:
    first()
    if step in self._saved.all_steps():
      # It was saved when the run was stopped, and is validated now; or could
      # not be flushed.
      self._saved.add_metrics(step, metrics)
      _flush(self._directory / str(step))
    else:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._write_new(step, state, metrics, untold)
    _flush_names(self._directory)
    self._delete_old()

  def _write_new(self, step, state, metrics, untold) -> None:
    self._saved.clear_unfinished()
    folder = self._saved.begin(step)
    contents = checkpoints.make_contents(state, metrics, untold)
    checkpoints.save_state(state, folder)
    for path, content in (
      (checkpoints.METRICS_FILE, metrics),
      (checkpoints.CONTENTS_FILE, contents),
    ):
      (folder / path).parent.mkdir()
      (folder / path).write_text(json.dumps(content))
    self._saved.read_back(state, folder)
    _flush(folder)
    self._saved.publish(step)

  def _delete_old(self) -> None:
    """Deletes all but the last two and the best by validation loss."""
    losses = self._saved.losses()
    finite = [step for step in losses if losses[step] < math.inf]
    best = sorted(finite, key=losses.get)[: self._keep_best]
    for step in sorted(losses)[:-_KEEP_LAST]:
      if step not in best:
        self._saved.delete(step)


def _flush(folder: epath.Path) -> None:
  """Forces a folder and all in it to disk."""
  if paths.is_remote(folder):
    return
  for root, _, names in os.walk(folder):
    for path in (root, *(os.path.join(root, name) for name in names)):
      _sync(path)


def _flush_names(folder: epath.Path) -> None:
  """Forces the names in a folder to disk."""
  if not paths.is_remote(folder):
    _sync(folder)


def _sync(path: str | epath.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _reason(error: Exception) -> str:
  """What went wrong, in a few words."""
  if isinstance(error, DamagedError):
    return f'what was written cannot be read back: {str(error).rstrip(".")}'
  cause = error
  while cause is not None:
    if isinstance(cause, OSError) and cause.strerror:
      return cause.strerror
    cause = cause.__cause__ or cause.__context__
  text = ' '.join(str(error).split()) or type(error).__name__
  # As TensorStore says what the operating system said.
  found = re.search(r'([^:]*) \[os_error_code=', text)
  return found.group(1).strip() if found else text[:200]


def _is_not_orbax(record: logging.LogRecord) -> bool:
  return _ORBAX not in record.pathname


def _is_no_task_of_orbax(record: logging.LogRecord) -> bool:
  return _ORBAX not in record.getMessage()
