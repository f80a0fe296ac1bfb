"""Whether a worker of a sweep is still there."""

import time
from typing import Any

from runs import processes


class Watch:
  """Tells which workers are dead by how long they gave no sign of life."""

  def __init__(self, grace_seconds: float):
    """Takes for how long a worker without a sign of life is not dead."""
    self._grace_seconds = grace_seconds
    # The last sign of each trial's worker, and when it was seen first.
    self._seen: dict[int, tuple[object, float]] = {}

  def is_dead(
    self, trial_id: int, worker: dict[str, Any] | None, heartbeat: int | None
  ) -> bool:
    """Whether the worker that has a trial is no more.

    Args:
      trial_id: of the trial.
      worker: as `processes.this_one` said it, if it did.
      heartbeat: its last sign of life; a process of this machine needs none.
    """
    if worker is not None and worker['machine'] == processes.this_machine():
      return not processes.is_alive(worker)
    sign = (worker, heartbeat)
    seen, since = self._seen.get(trial_id, (None, None))
    now = time.monotonic()
    if since is None or seen != sign:
      # By this worker's own clock: others' may be wrong.
      self._seen[trial_id] = (sign, now)
      return False
    return now - since > self._grace_seconds

  def forget(self) -> None:
    """Begins anew, where nobody could give a sign of life in the meantime."""
    self._seen.clear()
