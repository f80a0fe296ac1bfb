"""Where a run's metrics go: TensorBoard, through clu, and `metrics.jsonl`."""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import json
import os
import time

import runs  # noqa: F401 (Sets the environment of TensorFlow.)

# isort: split
from clu import metric_writers
from etils import epath
import numpy as np
import tensorflow as tf

from runs import progress
from vae import paths
from vae.errors import UserError

FILENAME = 'metrics.jsonl'

# At least, of a file of events: TensorBoard reads them by the second in their
# names, and what is out of order is lost.
_SECONDS_OF_PIECE = 2.0


def read(workdir: epath.Path) -> list[dict[str, float]]:
  """The lines of a run's `metrics.jsonl`; none where there is no file."""
  path = workdir / FILENAME
  if not path.exists():
    return []
  rows = []
  for line in path.read_bytes().decode(errors='replace').splitlines():
    # What was cut short by a kill is none.
    with contextlib.suppress(ValueError):
      row = json.loads(line)
      if isinstance(row, dict) and isinstance(row.get('step'), int):
        rows.append(row)
  return rows


class MetricWriter:
  """Writes scalars to both, pictures and hyperparameters to TensorBoard.

  Where the disk does not take them training goes on: that is told once, lines
  wait until it does, and TensorBoard's curves have a gap. For a workdir in a
  bucket all is written locally and copied in the background.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir, self._mirror, self.folder = workdir, None, None
    if paths.is_remote(workdir):
      self._mirror = paths.Mirror(workdir, progress.warn)
      self.folder = self._mirror.folder
      if (workdir / FILENAME).exists():
        content = (workdir / FILENAME).read_bytes()
        (self.folder / FILENAME).write_bytes(content)
    folder = self.folder or workdir
    self._path = folder / FILENAME
    # Lines that the disk has not taken.
    self._waiting = []
    self._tensorboard = metric_writers.AsyncWriter(
      _PatientSummaryWriter(
        str(folder / 'tensorboard'), in_pieces=self._mirror is not None
      )
    )

  def rewind(self, step: int, validated: bool) -> None:
    """Drops the lines of `metrics.jsonl` beyond `step`.

    A killed run wrote them after its last checkpoint; the run that goes on
    from there writes them again.

    Args:
      step: of that checkpoint.
      validated: whether the line of its validation is kept; else that is
        written again, too.

    Raises:
      UserError: if the file cannot be written.
    """
    if not self._path.exists():
      return
    rows = read(self._path.parent)
    kept = [
      row
      for row in rows
      if row['step'] < step
      or (row['step'] == step and (validated or 'val/loss' not in row))
    ]
    text = ''.join(json.dumps(row) + '\n' for row in kept)
    try:
      paths.replace(self._path, text.encode())
      if self._mirror is not None:
        self._mirror.copy()
    except OSError as error:
      raise UserError(
        f'{self._workdir / FILENAME} cannot be written '
        f'({error.strerror or error}); once it can be, the same command goes '
        'on.'
      ) from error

  def flush(self) -> Callable[[], None]:
    """Writes the lines that still wait, as far as the disk takes them.

    Returns:
      A function that waits until the lines are on disk, or in the bucket, for
      any thread. It raises OSError if a bucket fails to take them, unless it
      denies access: a checkpoint does not wait for that.
    """
    if self._waiting:
      self._write_line('')
    return self._sync

  def _sync(self) -> None:
    if self._mirror is not None:
      with contextlib.suppress(PermissionError):
        self._mirror.copy()
    elif self._path.exists():
      with contextlib.suppress(OSError), self._path.open('a') as file:
        os.fsync(file.fileno())

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """One JSON object on a line of its own, and a point on each curve."""
    row = {'step': step, **scalars}
    self._write_line(json.dumps(row) + '\n')
    self._tensorboard.write_scalars(step, scalars)

  def _write_line(self, line: str) -> None:
    had_to_wait = bool(self._waiting)
    self._waiting.append(line)
    try:
      self._append(''.join(self._waiting))
    except OSError as error:
      if not had_to_wait:
        _warn(f'{self._path} cannot be written ({error.strerror or error})')
      return
    self._waiting = []

  def _append(self, text: str) -> None:
    """Appends all of a text, or nothing."""
    end = self._path.stat().length if self._path.exists() else 0
    try:
      with self._path.open('a') as file:
        file.write(text)
    except OSError:
      # Half a line would swallow the next one.
      if self._path.exists():
        os.truncate(self._path, end)
      raise

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Pictures, uint8 [height, width, channels]."""
    self._tensorboard.write_images(step, images)

  def write_hparams(self, hparams: Mapping[str, object]) -> None:
    """The settings of the run; what is not a plain value goes as text."""
    self._tensorboard.write_hparams(
      {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in hparams.items()
      }
    )

  def close(self) -> None:
    """Waits until everything is written, that can be."""
    self._tensorboard.close()
    if self._waiting:
      try:
        self._append(''.join(self._waiting))
      except OSError:
        _warn(
          f'{len(self._waiting)} lines of {self._path} could not be written'
        )
    if self._mirror is not None:
      try:
        self._mirror.close()
      except OSError as error:
        progress.warn(
          f'warning: metrics and pictures could not be written into '
          f'{self._workdir} ({error.strerror or error}); copy them there from '
          f'{self._mirror.folder}.'
        )


class _PatientSummaryWriter:
  """A `SummaryWriter` that is made anew where the disk did not take a write.

  What was in its buffer is lost, and its file may end in the middle of a
  record, behind which nothing would be read.
  """

  def __init__(self, logdir: str, in_pieces: bool):
    """Opens no file yet.

    Args:
      logdir: the folder of the files.
      in_pieces: whether to end a file after pictures, so that files stay small;
        TensorBoard reads one after the other.
    """
    self._logdir, self._in_pieces, self._begun = logdir, in_pieces, 0.0
    self._writer: metric_writers.SummaryWriter | None = None
    self._is_failing = False

  def write_scalars(self, step, scalars):
    self._try('write_scalars', step, scalars)

  def write_images(self, step, images):
    self._try('write_images', step, images)
    if self._in_pieces and time.time() - self._begun > _SECONDS_OF_PIECE:
      self.close()
      self._writer = None

  def write_hparams(self, hparams):
    self._try('write_hparams', hparams)

  def flush(self):
    if self._writer is not None:
      self._try('flush')

  def close(self):
    if self._writer is not None:
      self._try('close')

  def _try(self, method: str, *args) -> None:
    try:
      if self._writer is None:
        self._begun = time.time()
        self._writer = metric_writers.SummaryWriter(self._logdir)
      getattr(self._writer, method)(*args)
      self._is_failing = False
    except (OSError, tf.errors.OpError) as error:
      if not self._is_failing:
        reason = str(error).strip().split('\n')[0]
        _warn(f'{self._logdir} cannot be written ({reason})')
      self._writer, self._is_failing = None, True


def _warn(what: str) -> None:
  progress.warn(f'warning: {what}; training goes on.')
