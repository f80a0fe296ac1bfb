"""Notes what the training loop does, and when the devices were done with it.

From outside: the functions that the loop calls are wrapped, and the loop stays
as it is. All that the devices do returns before they are done, so a thread
waits for an output of each call.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
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
from vae import checkpoints
from vae import figures
from vae import splits
from vae import training

# What the devices do.
KINDS = ('training', 'validation', 'pictures', 'snapshots')
# What the host does.
DATA = 'next images or indices'
CALLS = 'calls of the devices'
RESULTS = 'waits for the devices'
CHECKPOINTS = 'checkpoints'
REPORT = 'metrics and pictures'
HOST = (DATA, CALLS, RESULTS, CHECKPOINTS, REPORT)


@dataclasses.dataclass
class Call:
  """One call of the devices; all times are in seconds.

  Attributes:
    kind: one of `KINDS`.
    epoch: in which it was made, from 0.
    is_first: of its function, so that it was traced and compiled.
    called: when.
    returned: when it did.
    finished: when its outputs were there.
    wait: of the devices, before it.
    compilation: the devices' wait within it.
    computation: of the devices.
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
  """Notes what the loop does, and when the devices were done with it.

  Attributes:
    calls: of the devices, in order.
    host: seconds of the loop's thread, by what it did.
    epoch: which one is under way, from 0.
    start: when the loop asked for its first images.
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
    """Waits for all that was called."""
    self._outputs.put(None)
    self._watcher.join()

  def timed(self, what: str, function: Callable) -> Callable:
    """The function, its time noted; what it calls by itself is part of it."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
      if self._is_timing or threading.current_thread() is not self._thread:
        return function(*args, **kwargs)
      self._is_timing, start = True, time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        self.host[what] += time.perf_counter() - start
        self._is_timing = False

    return wrapper

  def watched(self, kind: str, function: Callable) -> Callable:
    """The function of the devices, each call noted."""
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
    """`splits.train_chunks` or `splits.eval_chunks`, each `next` timed."""

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
  """Notes what the loop does, which runs unchanged."""
  # So that the watcher need not wait 5 ms for a host that is computing.
  sys.setswitchinterval(1e-4)
  recorder = Recorder()

  def maker(kind):
    def wrap(make):
      return lambda *args: recorder.watched(kind, make(*args))

    return wrap

  def watched(kind):
    return functools.partial(recorder.watched, kind)

  def timed(what):
    return functools.partial(recorder.timed, what)

  wrappers = (
    (splits, 'train_chunks', recorder.chunks),
    (splits, 'eval_chunks', recorder.chunks),
    (training, 'make_train_steps', maker('training')),
    (training, 'make_eval_steps', maker('validation')),
    (training, 'snapshot', watched('snapshots')),
    (figures, 'samples', watched('pictures')),
    (figures, 'reconstructions', watched('pictures')),
    (jax, 'block_until_ready', timed(RESULTS)),
    (jax, 'device_get', timed(RESULTS)),
    (progress.Report, 'training', timed(REPORT)),
    (progress.Report, 'validation', timed(REPORT)),
    (progress.Report, 'pictures', timed(REPORT)),
    (checkpoints.CheckpointWriter, 'save', timed(CHECKPOINTS)),
  )
  with contextlib.ExitStack() as stack:
    stack.callback(recorder.close)
    for owner, name, wrap in wrappers:
      wrapped = wrap(getattr(owner, name))
      stack.enter_context(mock.patch.object(owner, name, wrapped))
    yield recorder


def settle(calls: list[Call]) -> None:
  """Says of each call what the devices waited, and what they computed."""
  free = calls[0].called
  for call in calls:
    begun = max(call.called, free)
    call.wait = begun - free
    if call.is_first:
      call.compilation = max(0, call.returned - begun)
    call.computation = max(0, call.finished - begun - call.compilation)
    free = max(free, call.finished)
