"""Experiment trackers, beside TensorBoard and `metrics.jsonl`.

A tracker is a module with a class `Writer(trackers.Tracker)`; `NAMES` are those
of this package, and any other name is a module on `sys.path`. Each has its own
settings in its own environment variables, such as WANDB_MODE=offline and
MLFLOW_TRACKING_URI.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib
import json
import queue
import threading
import time
from typing import Any

from etils import epath
import numpy as np

from runs import progress
from vae import paths
from vae.errors import UserError

# The project's trackers and their modules.
NAMES = {'wandb': 'runs.wandb_tracker', 'mlflow': 'runs.mlflow_tracker'}

# After a failure nothing is sent for this long, and twice as long after each.
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 10.0, 600.0

# Seconds that `close` waits for the tracker.
_SECONDS_TO_END = 60.0


class Tracker(progress.Writer):
  """A writer that sends everything in a thread, in the order of the calls.

  Training goes on if the tracker fails; `close` says how many rows it lacks,
  which are in `metrics.jsonl`. A subclass has `name` and the methods below that
  raise NotImplementedError, which are called in that thread.
  """

  name = ''

  def __init__(self, workdir: epath.Path, project: str):
    """Sends a run to a project; one that goes on stays the tracker's run."""
    self.workdir, self.project = workdir, project
    self._has_begun, self._num_lost, self._num_waiting = False, 0, 0
    self._settings: dict[str, object] | None = None  # Until they are sent.
    self._wait, self._retry = _FIRST_WAIT_SECONDS, 0.0
    self._outcome: progress.Outcome = 'finished'
    # A daemon: a server that hangs must not keep the process.
    self._calls: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._send, daemon=True)
    self._thread.start()

  def begin(self, identity: str | None) -> str:
    """Begins a run, or goes on with the one of an identity; returns it."""
    raise NotImplementedError

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    """Sends numbers by name."""
    raise NotImplementedError

  def log_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Sends pictures, uint8 [height, width, channels]."""
    raise NotImplementedError

  def log_settings(self, settings: Mapping[str, object]) -> None:
    """Sends the settings of the run, flat."""
    raise NotImplementedError

  def end(self, outcome: progress.Outcome) -> None:
    """Sends how the run ended, and waits until all was sent."""
    raise NotImplementedError

  def rewind(self, step: int, validated: bool) -> None:
    if not step:  # The run begins again, perhaps with other settings.
      self._identity.unlink(missing_ok=True)

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    self._num_waiting += 1
    self._calls.put((1, lambda: self.log(step, scalars)))

  def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
    self._calls.put((0, lambda: self.log_images(step, images)))

  def write_hparams(self, hparams: dict[str, object]) -> None:
    self._settings = hparams
    self._calls.put((0, lambda: None))

  def close(self, outcome: progress.Outcome = 'finished') -> None:
    self._outcome = outcome
    self._calls.put(None)
    self._thread.join(_SECONDS_TO_END)
    if lost := self._num_lost + self._num_waiting:
      progress.warn(
        f'warning: {self.name} lacks {lost} rows of this run, which are in '
        f'{self.workdir}.'
      )
    if self._settings is not None:
      progress.warn(f'warning: {self.name} lacks the settings of this run.')

  @property
  def _identity(self) -> epath.Path:
    """The file with the tracker's identity of the run."""
    return self.workdir / f'{self.name}.json'

  def _send(self) -> None:
    for num_rows, call in iter(self._calls.get, None):
      if time.monotonic() < self._retry:
        self._num_lost += num_rows
      else:
        self._try(num_rows, call)
      self._num_waiting -= num_rows
    if self._has_begun:
      self._try(0, lambda: self.end(self._outcome))

  def _try(self, num_rows: int, call: Callable[[], None]) -> None:
    try:
      if not self._has_begun:
        self._begin()
      if self._settings is not None:
        self.log_settings(self._settings)
        self._settings = None
      call()
      self._wait = _FIRST_WAIT_SECONDS
    except Exception as error:  # Clients raise errors of many kinds.
      reason = ' '.join(str(error).split())[:300]
      progress.warn(
        f'warning: {self.name} cannot be reached ({reason}); training goes on, '
        f'and nothing is sent for {self._wait:.0f} seconds.'
      )
      self._num_lost += num_rows
      self._retry = time.monotonic() + self._wait
      self._wait = min(2 * self._wait, _LONGEST_WAIT_SECONDS)

  def _begin(self) -> None:
    identity = None
    if self._identity.exists():
      identity = json.loads(self._identity.read_text())['run']
    found = self.begin(identity)
    if found != identity:
      paths.replace(self._identity, json.dumps({'run': found}).encode())
    self._has_begun = True


class Writers(progress.Writer):
  """Several writers as one; the first is that of the workdir."""

  def __init__(self, writers: Sequence[progress.Writer]):
    self._writers = writers
    self.folder = writers[0].folder

  def rewind(self, step: int, validated: bool) -> None:
    for writer in self._writers:
      writer.rewind(step, validated)

  def flush(self) -> Callable[[], None]:
    return self._writers[0].flush()

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
    for writer in self._writers:
      writer.write_images(step, images)

  def write_hparams(self, hparams: dict[str, object]) -> None:
    for writer in self._writers:
      writer.write_hparams(hparams)

  def close(self, outcome: progress.Outcome = 'finished') -> None:
    for writer in self._writers:
      writer.close(outcome)


def find(name: str) -> type[Tracker]:
  """The tracker of a name; raises UserError if there is none."""
  advice = f'it is {" or ".join(NAMES)}, or a module on PYTHONPATH'
  try:
    module: Any = importlib.import_module(NAMES.get(name, name))
    if issubclass(module.Writer, Tracker):
      return module.Writer
    advice = f'its Writer is not a {Tracker.__name__} of runs.trackers'
  except AttributeError:
    advice = 'the module has no class Writer'
  except ModuleNotFoundError as error:
    if name in NAMES:
      advice = f'pip install {name} ({error})'
    elif error.name != name:
      raise
  raise UserError(f'--trackers has {name}; {advice}.')
