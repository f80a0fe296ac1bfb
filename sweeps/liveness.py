"""Whether a worker of a sweep is still there."""

from collections.abc import Mapping
import functools
import os
import socket
import time
from typing import Any
import uuid

import psutil


@functools.cache
def this_worker() -> dict[str, object]:
  """What others tell this process by, as JSON has it."""
  process = psutil.Process()
  return {
    'host': socket.gethostname(),
    'pid': process.pid,
    'started': process.create_time(),
    'machine': this_machine(),
  }


@functools.cache
def this_machine() -> str:
  """What processes that see each other have in common, and others have not.

  Containers may share a host's name, and not its processes.
  """
  try:
    with open('/proc/sys/kernel/random/boot_id') as file:
      return f'{file.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return f'{socket.gethostname()} {uuid.getnode()}'


def is_alive(worker: Mapping[str, Any]) -> bool:
  """Whether a worker of this machine is a process that still runs."""
  try:
    process = psutil.Process(worker['pid'])
    return (
      abs(process.create_time() - worker['started']) < 1
      and process.status() != psutil.STATUS_ZOMBIE
    )
  except psutil.NoSuchProcess:
    return False


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
      worker: as `this_worker` said it, if it did.
      heartbeat: its last sign of life; a process of this machine needs none.
    """
    if worker is not None and worker['machine'] == this_machine():
      return not is_alive(worker)
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
