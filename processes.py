"""The processes that train one model together, and what becomes of them."""

from collections.abc import Iterator
import contextlib
import ctypes
import os
import signal

import jax

import command_line
from vae.errors import UserError

# After which a process that says nothing, not even that it ended, is given up.
_HEARTBEAT_SECONDS = 30

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
    )
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f'--distributed: {error} On a TPU pod and under Slurm the flag suffices; '
      'elsewhere give --coordinator_address, --num_processes and --process_id '
      'too.'
    ) from error
  _end_in_a_sentence()


@contextlib.contextmanager
def working_together() -> Iterator[None]:
  """Turns what is seen of another process's death into a clear message.

  Raises:
    UserError: where the devices of several processes fail.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    reason = command_line.first_line(error)
    raise UserError(_LOST.format(reason=reason)) from error


def _end_in_a_sentence() -> None:
  """Has the last word where JAX's own service ends this process.

  It aborts, from a thread of its own, when the first process is gone or one
  has been silent for too long; Python's handlers do not run then.
  """

  def say_and_leave(number: int) -> None:
    del number
    message = _LOST.format(reason='another ended, or does not answer')
    os.write(2, f'error: {message}\n'.encode())
    os._exit(2)

  global _handler
  _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say_and_leave)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)


# What C calls must live as long as the process.
_handler = None
