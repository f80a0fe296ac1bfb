"""The processes of a run: how they join and stop, identity, free memory.

Schedulers send SIGTERM before they take a machine away. SIGUSR1, which Slurm
sends early (`--signal=USR1@120`), and SIGHUP, of a closed terminal, count as
SIGTERM.
"""

from collections.abc import Mapping
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import signal
import socket
import sys
import time
from typing import Any
import uuid

import jax
from jax.experimental import multihost_utils
import numpy as np
import psutil

from vae import devices
from vae.errors import UserError

# A process without a heartbeat for this long is taken for dead.
_HEARTBEAT_SECONDS = 30

# Finished processes wait this long for the first, which may wait for a disk to
# take the last checkpoint.
_SHUTDOWN_SECONDS = 900

# The limits of containers and services on Linux, and the process's own group.
_CGROUPS = pathlib.Path('/sys/fs/cgroup')
_OWN_CGROUP = pathlib.Path('/proc/self/cgroup')

# Memory that a cgroup counts as used and the kernel frees on demand: mostly
# cached files.
_RECLAIMABLE = ('inactive_file', 'active_file', 'slab_reclaimable')

_ON_FIRST = (
  b'\nFinishing the steps in flight, then saving; Ctrl-C again stops at once.\n'
)
_ON_SECOND = b'\nStopped without saving.\n'


def join(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Connects the processes of a run, so that JAX sees all of their devices.

  The address is HOST:PORT of the first process. A TPU pod and Slurm provide the
  arguments that are None. Raises a UserError if this fails.
  """
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f'--distributed: {error} On a TPU pod and under Slurm the flag suffices; '
      'elsewhere add --coordinator_address, --num_processes and --process_id.'
    ) from error


def check_same(content: object, name: str) -> None:
  """Raises a UserError in all processes if their content (JSON) differs."""
  text = json.dumps(content, sort_keys=True)
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  is_same = np.array_equal(devices.as_first_process(digest), digest)
  if not devices.least_of_all(is_same):
    raise UserError(
      f'the processes of this run have different {name}; start all with the '
      'same command, and give them the same images.'
    )


@functools.cache
def this_one() -> dict[str, object]:
  """Identifies this process to others, as JSON."""
  pid, host = os.getpid(), socket.gethostname()
  started = psutil.Process(pid).create_time()
  return dict(host=host, pid=pid, started=started, machine=this_machine())


@functools.cache
def this_machine() -> str:
  """An identifier that processes share if they see each other's ids."""
  # Containers may share a host's name, and not its processes.
  try:
    with open('/proc/sys/kernel/random/boot_id') as file:
      return f'{file.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return f'{socket.gethostname()} {uuid.getnode()}'


def is_alive(other: Mapping[str, Any]) -> bool:
  """Whether a process of this machine, as `this_one`, still runs."""
  try:
    process = psutil.Process(other['pid'])
    return (
      abs(process.create_time() - other['started']) < 1
      and process.status() != psutil.STATUS_ZOMBIE
    )
  except psutil.NoSuchProcess:
    return False


def free_memory() -> int:
  """Free bytes of this machine, within the limits of the process's cgroups."""
  free, own = psutil.virtual_memory().available, _CGROUPS
  with contextlib.suppress(OSError):
    own /= _OWN_CGROUP.read_text().strip().rpartition('0::/')[2]
  for group in (own, *own.parents):
    # There may be no such group here, or no limit: 'max' is not a number.
    with contextlib.suppress(OSError, ValueError):
      limit = int((group / 'memory.max').read_text())
      used = int((group / 'memory.current').read_text())
      words = (group / 'memory.stat').read_text().split()
      stat = dict(zip(words[::2], words[1::2], strict=True))
      used -= sum(int(stat.get(name, 0)) for name in _RECLAIMABLE)
      free = min(free, limit - used)
  return max(free, 0)


class TerminatedError(BaseException):
  """SIGTERM or a signal that counts as it; as KeyboardInterrupt for Ctrl-C."""


@functools.cache
def _hide_stops() -> None:
  """Silences the report of a signal that a destructor receives.

  The run stops at its next step.
  """
  previous = sys.unraisablehook

  def hook(unraisable):
    if unraisable.exc_type not in (KeyboardInterrupt, TerminatedError):
      previous(unraisable)

  sys.unraisablehook = hook


class StopSignals:
  """A context in which signals ask training to stop.

  Before the first call a signal ends the program at once, as nothing can be
  lost. From then on calls return whether to stop. All processes of a run must
  call it at the same places, and get the same answer: a signal to one of them
  stops all. A second Ctrl-C ends the process without saving.
  """

  def __init__(self):
    # The signal that this process got, if any.
    self.received: signal.Signals | None = None
    self.answered = False  # What the last call returned.
    self._num_calls, self._previous = 0, {}

  def __enter__(self):
    caught = [signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Not under nohup.
      caught.append(signal.SIGHUP)
    if not jax.distributed.is_initialized():
      caught.append(signal.SIGTERM)  # Else JAX's service broadcasts it.
    self._previous = {n: signal.signal(n, self._receive) for n in caught}
    _hide_stops()
    return self

  def __exit__(self, *unused_args):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __call__(self) -> bool:
    self._num_calls += 1
    if jax.distributed.is_initialized():
      reached = multihost_utils.reached_preemption_sync_point
      self.answered = reached(self._num_calls)
    else:
      self.answered = self.received is not None
    return self.answered

  def raise_if_received(self) -> None:
    """Raises KeyboardInterrupt after Ctrl-C, TerminatedError after another."""
    if self.received == signal.SIGINT:
      raise KeyboardInterrupt
    if self.received is not None:
      raise TerminatedError

  def sleep(self, seconds: float) -> None:
    """Sleeps; raises as `raise_if_received` as soon as a signal comes."""
    end = time.monotonic() + seconds
    self.raise_if_received()
    # Python continues a sleep that a signal interrupts.
    while (left := end - time.monotonic()) > 0:
      time.sleep(min(left, 0.2))
      self.raise_if_received()

  def _receive(self, number: int, frame: object) -> None:
    del frame
    first, self.received = self.received is None, signal.Signals(number)
    if not self._num_calls:
      self.raise_if_received()
    if number == signal.SIGINT:
      # Ctrl-C may also have ended the reader of stderr; and `print` may be what
      # was interrupted.
      with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), _ON_FIRST if first else _ON_SECOND)
      if not first:
        os._exit(130)
    if first and jax.distributed.is_initialized():
      os.kill(os.getpid(), signal.SIGTERM)  # JAX's service catches only this.
