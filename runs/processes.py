"""The processes that train one model together, and what becomes of them."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import traceback
from typing import Any
import uuid

import jax
import numpy as np
import psutil

from runs import command_line
from vae import devices
from vae.errors import UserError

# After which a process that says nothing, not even that it ended, is given up.
_HEARTBEAT_SECONDS = 30

# For so long those that are done wait for the first, which may be waiting for
# a disk to take the last checkpoint.
_SHUTDOWN_SECONDS = 900

# Bytes of a config that is told to all, as JSON.
_MAX_CONFIG = 1 << 16

# In which processes may differ: where each has its data.
_OWN_KEYS = frozenset({'data.dir', 'data.decoded_dir'})

_LOST = (
  'the processes of this run can no longer work together ({reason}). Start all '
  'of them again: they go on from the last checkpoint.'
)


def join(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Connects this process with the others, so that JAX sees all devices.

  Args:
    coordinator_address: HOST:PORT of the first process; where it is None, as
      the others, the TPU pod or Slurm says it.
    num_processes: of the run.
    process_id: of this one, from 0.

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
      'elsewhere give --coordinator_address, --num_processes and --process_id '
      'too.'
    ) from error
  _end_in_a_sentence()


def check_same(config: Mapping[str, object]) -> None:
  """Checks that all processes of the run were given the same config.

  Else they would train different models, or wait for each other for ever.

  Args:
    config: flat.

  Raises:
    UserError: in all of them, if they were not.
  """
  own = {k: v for k, v in config.items() if k not in _OWN_KEYS}
  own = json.loads(json.dumps(own))
  text = json.dumps(own).encode()[:_MAX_CONFIG]
  told = np.frombuffer(text.ljust(_MAX_CONFIG), np.uint8)
  if devices.all_have(told):
    return
  first = devices.as_first_process(told).tobytes().decode(errors='replace')
  with contextlib.suppress(ValueError):
    first = json.loads(first)
    for key in sorted(own.keys() | first.keys()):
      if own.get(key) != first.get(key):
        raise UserError(
          f'config.{key} is {own.get(key)!r}, and in the first process of this '
          f'run {first.get(key)!r}; start all with the same command.'
        )
  raise UserError(
    'another process of this run was given another config; start all with the '
    'same command.'
  )


@contextlib.contextmanager
def working_together() -> Iterator[None]:
  """Turns what is seen of another process's death into a clear message.

  What goes wrong in one of several processes ends it at once: a proper exit
  would wait, for minutes, for those that go on.

  Raises:
    UserError: where the devices fail.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    reason = command_line.first_line(error)
    if 'RESOURCE_EXHAUSTED' in reason:
      raise UserError(
        f'the memory of the devices does not suffice ({reason}); lower '
        'config.train.batch_size, config.eval.batch_size or the size of the '
        'model.'
      ) from error
    if jax.process_count() == 1:
      raise
    raise UserError(_LOST.format(reason=reason)) from error
  except UserError:
    raise
  except Exception:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    os._exit(1)


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
  """What processes that see each other have in common, and others have not.

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


def _end_in_a_sentence() -> None:
  """Has the last word where JAX's own service ends this process.

  It aborts, from a thread of its own, when the first process is gone or one
  has been silent for too long; Python's handlers do not run then.
  """

  def say_and_leave(number: int) -> None:
    del number
    message = _LOST.format(
      reason='another ended or does not answer, if nothing else is said above'
    )
    os.write(2, f'error: {message}\n'.encode())
    os._exit(2)

  global _handler
  _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say_and_leave)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)


# What C calls must live as long as the process.
_handler = None
