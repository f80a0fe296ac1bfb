"""Whether a worker of a sweep is a process that still runs."""

from collections.abc import Mapping
import functools
import os
import socket
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
