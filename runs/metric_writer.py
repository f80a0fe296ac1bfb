"""A run's metrics in TensorBoard, through clu, and in `metrics.jsonl`."""

from collections.abc import Callable, Mapping
from concurrent import futures
import contextlib
import json
import os
import time
from typing import Any

from etils import epath
import numpy as np

from runs import progress, tf
from vae import paths
from vae.errors import UserError

FILENAME = 'metrics.jsonl'

# Shortest age of a file of events before the next: TensorBoard orders files by
# the second in their names.
_SECONDS_OF_PIECE = 2.0


def read(workdir: epath.Path) -> list[dict[str, float]]:
  """The rows of a run's `metrics.jsonl`; empty if there is no file."""
  path = workdir / FILENAME
  if not path.exists():
    return []
  rows = []
  for line in path.read_bytes().decode(errors='replace').splitlines():
    # A kill can cut a line short.
    with contextlib.suppress(ValueError):
      row = json.loads(line)
      if isinstance(row, dict) and isinstance(row.get('step'), int):
        rows.append(row)
  return rows


def unpack(summary: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Values and metadata of a TensorFlow summary, as clu's writer takes them."""
  values = {v.tag: tf.make_ndarray(v.tensor) for v in summary.value}
  return values, {v.tag: v.metadata for v in summary.value}


class MetricWriter(progress.Writer):
  """Writes scalars to both, pictures and hyperparameters to TensorBoard.

  On a full disk training goes on, with one warning: rows wait until they can be
  written, and TensorBoard's curves have a gap. For a workdir in a bucket all is
  written locally and copied in the background.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir, self._mirror = workdir, None
    if paths.is_remote(workdir):
      self._mirror = paths.Mirror(workdir, progress.warn)
      self.folder = self._mirror.folder
      if (workdir / FILENAME).exists():
        content = (workdir / FILENAME).read_bytes()
        (self.folder / FILENAME).write_bytes(content)
    folder = self.folder or workdir
    self._path = folder / FILENAME
    self._waiting: list[str] = []  # Lines that could not be written yet.
    # TensorBoard names a run by the folder of its files.
    self._logdir = str(folder)
    # It writes TensorBoard's files.
    self._thread = futures.ThreadPoolExecutor(1, 'tensorboard')
    self._events: Any = None  # A `clu.metric_writers.SummaryWriter`.
    self._begun, self._is_failing = 0.0, False
    self._hparams: dict[str, Any] | None = None

  def rewind(self, step: int, validated: bool) -> None:
    """See `progress.Writer`; raises UserError if the file cannot be written.

    A killed run wrote the rows after its last checkpoint; the run that goes on
    from there writes them again.
    """
    if not self._path.exists():
      return
    kept = [
      row
      for row in read(self._path.parent)
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
    """See `progress.Writer`; the function may be called by any thread.

    It raises OSError if a bucket fails to take the rows, unless it denies
    access: a checkpoint does not wait for that.
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
    """Writes one JSON object on a line of its own, and points of curves."""
    self._write_line(json.dumps({'step': step, **scalars}) + '\n')
    self._submit('write_scalars', step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes pictures, uint8 [height, width, channels]."""
    self._submit('write_images', step, images)
    if self._mirror is not None:
      # A bucket gets small files, as one is copied whenever it has grown.
      self._thread.submit(self._end_file, _SECONDS_OF_PIECE)

  def write_hparams(self, hparams: Mapping[str, object]) -> None:
    """Writes the settings of the run; tuples and the like as text."""
    plain = {
      key: value if isinstance(value, (bool, int, float, str)) else str(value)
      for key, value in hparams.items()
    }
    self._hparams = plain

  def _submit(self, *call: Any) -> None:
    self._submit_hparams()
    self._thread.submit(self._write_events, *call)

  def _submit_hparams(self) -> None:
    # With the first row: TensorFlow's import would delay the first step.
    hparams, self._hparams = self._hparams, None
    if hparams is not None:
      self._thread.submit(self._write_hparams, hparams)

  def close(self, outcome: progress.Outcome = 'finished') -> None:
    """Waits until everything is written that can be."""
    self._submit_hparams()
    self._thread.submit(self._end_file)
    self._thread.shutdown()
    if self._waiting:
      self._write_line('')
    if self._waiting:
      lines = ''.join(self._waiting).count('\n')
      progress.warn(
        f'warning: {self._path} lacks {lines} rows, which could not be written.'
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

  def _write_line(self, line: str) -> None:
    """Appends the lines that wait and this one to the file, or none."""
    had_to_wait = bool(self._waiting)
    self._waiting.append(line)
    end = None
    try:
      end = os.path.getsize(self._path) if self._path.exists() else 0
      with self._path.open('a') as file:
        file.write(''.join(self._waiting))
      self._waiting = []
    except OSError as error:
      # Half a line would swallow the next one.
      with contextlib.suppress(OSError):
        if end is not None and self._path.exists():
          os.truncate(self._path, end)
      if not had_to_wait:
        _warn(f'{self._path} cannot be written ({error.strerror or error})')

  def _write_events(self, method: str, *args) -> None:
    """Calls a method of clu's writer, which is replaced after a failure.

    Its buffer is lost then, and its file may end in the middle of a record,
    behind which nothing would be read.
    """
    # In this thread, as it imports TensorFlow, which takes seconds.
    tf.load()
    from clu import metric_writers

    try:
      if self._events is None:
        self._begun = time.time()
        self._events = metric_writers.SummaryWriter(self._logdir)
      getattr(self._events, method)(*args)
      self._is_failing = False
    # TensorFlow has errors of its own.
    except Exception as error:
      if not self._is_failing:
        reason = str(error).strip().split('\n')[0]
        _warn(f'{self._logdir} cannot be written ({reason})')
      self._events, self._is_failing = None, True

  def _write_hparams(self, hparams: dict[str, Any]) -> None:
    """Writes them with the workdir's name; clu names a trial by a hash.

    Points of different sweeps have the same names.
    """
    tf.load()
    from tensorboard.plugins.hparams import api

    name, parent = self._workdir.name, self._workdir.parent
    if parent.name == 'points':  # Of a sweep.
      name = f'{parent.parent.name}/{name}'
    summary = api.hparams_pb(hparams, trial_id=name)
    self._write_events('write_summaries', 0, *unpack(summary))

  def _end_file(self, min_age: float = 0.0) -> None:
    if self._events is not None and time.time() - self._begun >= min_age:
      self._write_events('close')
      self._events = None


def _warn(problem: str) -> None:
  progress.warn(f'warning: {problem}; training goes on.')
