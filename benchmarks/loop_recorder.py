"""Records the calls of the training loop, and when the devices finished them.

The functions that the loop calls are wrapped from outside, and the loop stays
as it is. Calls of the devices return before they are done, so a thread waits
for an output of each.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import queue
import sys
import threading
import time
from unittest import mock

import jax

from runs import progress
from vae import splits, steps, trainer
from vae.checkpoints import CheckpointWriter

# Work of the devices.
KINDS = ('training', 'validation', 'pictures', 'snapshots')

# Work of the host.
DATA = 'next images or indices'
CALLS = 'calls of the devices'
RESULTS = 'waits for the devices'
CHECKPOINTS = 'checkpoints'
PROGRESS = 'metrics and pictures'
HOST = (DATA, CALLS, RESULTS, CHECKPOINTS, PROGRESS)


@dataclasses.dataclass
class Call:
  """One call of the devices; all times are in seconds.

  Attributes:
    kind: one of `KINDS`.
    epoch: from 0.
    is_first: whether it is the first of its function, which compiles.
    called: time of the call.
    returned: time of the return.
    finished: time at which its outputs were ready.
    wait: of the devices before it, a duration.
    compilation: wait of the devices within it, a duration.
    computation: of the devices, a duration.
  """

  kind: str
  epoch: int
  is_first: bool
  called: float
  returned: float = 0.0
  finished: float = 0.0
  wait: float = 0.0
  compilation: float = 0.0
  computation: float = 0.0


class Recorder:
  """The calls of the loop.

  Attributes:
    calls: of the devices, in order.
    host: seconds of the loop's thread, by its work (`HOST`).
    epoch: the current one, from 0.
    start: time at which the loop asked for its first images.
  """

  def __init__(self):
    self.calls = []
    self.host = collections.Counter()
    self.epoch = 0
    self.start = None
    self._thread = threading.current_thread()
    self._is_timing = False
    self._outputs = queue.SimpleQueue()
    self._watcher = threading.Thread(target=self._watch, name='watcher')
    self._watcher.start()

  def _watch(self) -> None:
    for call, outputs in iter(self._outputs.get, None):
      jax.block_until_ready(outputs)
      call.finished = time.perf_counter()

  def close(self) -> None:
    """Waits for all calls."""
    self._outputs.put(None)
    self._watcher.join()

  def timed(self, work: str, function: Callable) -> Callable:
    """Times a function, with all that it calls."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
      if self._is_timing or threading.current_thread() is not self._thread:
        return function(*args, **kwargs)
      self._is_timing, start = True, time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        self.host[work] += time.perf_counter() - start
        self._is_timing = False

    return wrapper

  def watched(self, kind: str, function: Callable) -> Callable:
    """Records each call of a function of the devices."""
    is_first = True

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
      nonlocal is_first
      call = Call(kind, self.epoch, is_first, time.perf_counter())
      is_first = False
      outputs = function(*args, **kwargs)
      call.returned = time.perf_counter()
      self.calls.append(call)
      # The new state is donated to the next step, and the metrics are not.
      kept = outputs[1] if kind == 'training' else outputs
      self._outputs.put((call, kept))
      return outputs

    return self.timed(CALLS, wrapper)

  def chunks(self, function: Callable) -> Callable:
    """Times each `next` of `splits.train_chunks` or `splits.eval_chunks`."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
      if function.__name__ == 'train_chunks':
        self.epoch = args[2]
      if self.start is None:
        self.start = time.perf_counter()
      # The order of an epoch is part of the wait for its first chunk.
      iterator = self.timed(DATA, function)(*args, **kwargs)
      advance = self.timed(DATA, next)
      while (chunk := advance(iterator, None)) is not None:
        yield chunk

    return wrapper


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
  """A context in which the loop is recorded."""
  # By default the watcher would wait 5 ms for a host that computes.
  sys.setswitchinterval(1e-4)
  recorder = Recorder()

  def maker(kind):
    def wrap(make):
      return lambda *args: recorder.watched(kind, make(*args))

    return wrap

  def watched(kind):
    return functools.partial(recorder.watched, kind)

  def timed(work):
    return functools.partial(recorder.timed, work)

  wrappers = (
    (splits, 'train_chunks', recorder.chunks),
    (splits, 'eval_chunks', recorder.chunks),
    (steps, 'make_train_steps', maker('training')),
    (steps, 'make_eval_steps', maker('validation')),
    (steps, 'snapshot', watched('snapshots')),
    (trainer, '_samples', watched('pictures')),
    (trainer, '_reconstructions', watched('pictures')),
    (jax, 'block_until_ready', timed(RESULTS)),
    (jax, 'device_get', timed(RESULTS)),
    (progress.Progress, 'training', timed(PROGRESS)),
    (progress.Progress, 'validation', timed(PROGRESS)),
    (progress.Progress, 'pictures', timed(PROGRESS)),
    (CheckpointWriter, 'save', timed(CHECKPOINTS)),
  )
  with contextlib.ExitStack() as stack:
    stack.callback(recorder.close)
    for owner, name, wrap in wrappers:
      wrapped = wrap(getattr(owner, name))
      stack.enter_context(mock.patch.object(owner, name, wrapped))
    yield recorder


def settle(calls: list[Call]) -> None:
  """Fills in each call's wait, compilation and computation."""
  free = calls[0].called
  for call in calls:
    begun = max(call.called, free)
    call.wait = begun - free
    if call.is_first:
      call.compilation = max(0, call.returned - begun)
    call.computation = max(0, call.finished - begun - call.compilation)
    free = max(free, call.finished)
