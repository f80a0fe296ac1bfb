"""Ctrl-C and SIGTERM, as something to ask for between two steps.

Schedulers send SIGTERM to what they are about to take the machine from. Slurm's
early warning, SIGUSR1 (`--signal=USR1@120`), and SIGHUP, of a terminal that is
closed, count as SIGTERM. Until training asks for the first time, a signal ends
the program at once: nothing is lost yet. From then on it says that training
should stop, where it can.
"""

import contextlib
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

# A signal that comes while a call sleeps is looked for so often.
_SECONDS_BETWEEN_LOOKS = 0.2

# Which what is being written has after a second Ctrl-C.
_SECONDS_TO_LEAVE = 5.0

_ON_INTERRUPT = (
  '\nFinishing the steps under way, then saving; Ctrl-C again stops at once.\n'
)


class TerminatedError(BaseException):
  """SIGTERM, or a signal that counts as it; as KeyboardInterrupt is Ctrl-C."""


class StopSignals:
  """A context manager, within which the signals are caught.

  Called, it says whether training should stop. All processes of a run must
  call it at the same places, and get the same answer: a signal to one of them
  stops all.

  Attributes:
    received: the signal that this process got, if any.
  """

  def __init__(self):
    """Catches nothing yet."""
    self.received: signal.Signals | None = None
    self._num_calls = 0
    self._previous = {}

  def __enter__(self):
    caught = [signal.SIGINT, signal.SIGUSR1]
    # Else the program was started by nohup.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      caught.append(signal.SIGHUP)
    if not jax.distributed.is_initialized():
      caught.append(signal.SIGTERM)
    # Else JAX's own service has it, which tells the other processes.
    for number in caught:
      self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *unused_args):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __call__(self) -> bool:
    """Whether to stop, here and now."""
    self._num_calls += 1
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(self._num_calls)
    return self.received is not None

  def raise_if_received(self) -> None:
    """Goes on as the signal has it that stopped training, if one did.

    Raises:
      KeyboardInterrupt: after Ctrl-C.
      TerminatedError: after another signal.
    """
    if self.received == signal.SIGINT:
      raise KeyboardInterrupt
    if self.received is not None:
      raise TerminatedError

  def sleep(self, seconds: float) -> None:
    """Sleeps, until a signal comes at the latest.

    Raises:
      KeyboardInterrupt: after Ctrl-C.
      TerminatedError: after another signal.
    """
    end = time.monotonic() + seconds
    self.raise_if_received()
    # Python goes on with a sleep that a signal interrupts.
    while (left := end - time.monotonic()) > 0:
      time.sleep(min(left, _SECONDS_BETWEEN_LOOKS))
      self.raise_if_received()

  def _receive(self, number: int, frame: object) -> None:
    del frame
    again = self.received is not None
    self.received = signal.Signals(number)
    if again and number == signal.SIGINT:
      _leave_soon()
      self.raise_if_received()
    if not self._num_calls:
      self.raise_if_received()
    if again:
      return
    if jax.distributed.is_initialized():
      # JAX's service listens to no other.
      os.kill(os.getpid(), signal.SIGTERM)
    if number == signal.SIGINT:
      # Ctrl-C may have ended who reads it, too. And not by `print`, which may
      # be what was interrupted.
      with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), _ON_INTERRUPT.encode())


def _leave_soon() -> None:
  """Ends the process, though it waits for a bucket that does not answer."""

  def leave():
    with contextlib.suppress(OSError):
      os.write(2, b'\nStopped without waiting any longer.\n')
    os._exit(130)

  timer = threading.Timer(_SECONDS_TO_LEAVE, leave)
  timer.daemon = True
  timer.start()
