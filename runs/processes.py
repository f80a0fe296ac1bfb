"""The processes of a run: how they join, identify each other, and stop.

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

# Settings that may differ between processes: paths on each host.
_OWN_KEYS = frozenset({'data.dir', 'data.decoded_dir'})

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

  Args:
    coordinator_address: HOST:PORT of the first process; a TPU pod and Slurm
      provide this and the other two if they are None.
    num_processes: number of processes.
    process_id: index of this process, from 0.

  Raises:
    UserError: if they cannot be connected.
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


def check_same(config: Mapping[str, object]) -> None:
  """Checks that all processes of the run have the same config, but for paths.

  Raises:
    UserError: in all of them, if they differ.
  """
  shared = {k: v for k, v in config.items() if k not in _OWN_KEYS}
  digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).digest()
  if not devices.all_have(np.frombuffer(digest, np.uint8)):
    raise UserError(
      'the processes of this run have different configs; start all with the '
      'same command.'
    )


def explain(error: BaseException) -> str | None:
  """A message for the user if another process of the run failed, else None."""
  if not (
    jax.distributed.is_initialized()
    and isinstance(error, jax.errors.JaxRuntimeError)
  ):
    return None
  return (
    'the processes of this run can no longer work together '
    f'({" ".join(str(error).split())[:300]}). Start all of them again: they go '
    'on from the last checkpoint.'
  )


@functools.cache
def this_one() -> dict[str, object]:
  """Identifies this process to others, as JSON."""
  process = psutil.Process()
  return {
    'host': socket.gethostname(),
    'pid': process.pid,
    'started': process.create_time(),
    'machine': this_machine(),
  }


@functools.cache
def this_machine() -> str:
  """An identifier that processes share if they see each other's ids.

  Containers may share a host's name, and not its processes.
  """
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


class TerminatedError(BaseException):
  """SIGTERM or a signal that counts as it; as KeyboardInterrupt for Ctrl-C."""


class StopSignals:
  """A context in which signals ask training to stop.

  Before the first call a signal ends the program at once, as nothing can be
  lost. From then on calls return whether to stop. All processes of a run must
  call it at the same places, and get the same answer: a signal to one of them
  stops all. A second Ctrl-C ends the process without saving.

  Attributes:
    received: the signal that this process got, if any.
  """

  def __init__(self):
    self.received: signal.Signals | None = None
    self._num_calls = 0
    self._previous = {}

  def __enter__(self):
    caught = [signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Not under nohup.
      caught.append(signal.SIGHUP)
    if not jax.distributed.is_initialized():
      caught.append(signal.SIGTERM)  # Else JAX's service broadcasts it.
    self._previous = {n: signal.signal(n, self._receive) for n in caught}
    return self

  def __exit__(self, *unused_args):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __call__(self) -> bool:
    """Whether to stop at this step."""
    self._num_calls += 1
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(self._num_calls)
    return self.received is not None

  def raise_if_received(self) -> None:
    """Raises KeyboardInterrupt after Ctrl-C, TerminatedError after another."""
    if self.received is not None:
      interrupted = self.received == signal.SIGINT
      raise KeyboardInterrupt if interrupted else TerminatedError

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
