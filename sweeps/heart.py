"""The signs of life that a worker gives for the points that it has."""

import threading
import time

import optuna
from optuna import exceptions

# There are so many in the time after which their lack is death.
_SIGNS = 6


class Heart:
  """Keeps counting in trials, in the background.

  Attributes:
    lost: ids of the trials that turned out to be others' by now.
  """

  def __init__(
    self, storage: optuna.storages.BaseStorage, grace_seconds: float
  ):
    """Takes the storage, and after how long no sign of life is death."""
    self._storage, self._grace_seconds = storage, grace_seconds
    self.lost: set[int] = set()
    self._trial_ids: set[int] = set()
    self._last_beat = time.monotonic()
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def start(self) -> None:
    """Begins to beat."""
    self._thread.start()

  def stop(self) -> None:
    """Ends it, and waits for the last beat."""
    self._stop.set()
    self._thread.join()

  def beat_for(self, trial_id: int) -> None:
    """Gives signs of life for this trial too."""
    with self._lock:
      self._trial_ids.add(trial_id)

  def forget(self, trial_id: int) -> None:
    """Gives none any more."""
    with self._lock:
      self._trial_ids.discard(trial_id)
      self.lost.discard(trial_id)

  def trial_ids(self) -> list[int]:
    """Those that it beats for."""
    with self._lock:
      return list(self._trial_ids)

  def seems_dead(self) -> bool:
    """Whether others see no sign of life for too long."""
    return time.monotonic() - self._last_beat > self._grace_seconds

  def _run(self) -> None:
    count = 0
    while not self._stop.wait(self._grace_seconds / _SIGNS):
      count += 1
      if self._beat(count):
        self._last_beat = time.monotonic()

  def _beat(self, count: int) -> bool:
    """Whether all could be told."""
    for trial_id in self.trial_ids():
      try:
        self._storage.set_trial_user_attr(trial_id, 'heartbeat', count)
      except exceptions.UpdateFinishedTrialError:
        with self._lock:
          if trial_id in self._trial_ids:
            self.lost.add(trial_id)
      except Exception:  # The database is away; perhaps it comes back.
        return False
    return True
