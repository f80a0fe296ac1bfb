import os
import signal

import jax
import pytest

from runs import stop_signals

TERMINATING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
  """As in a program that a terminal starts; put back afterwards."""
  numbers = (*TERMINATING, signal.SIGINT)
  before = {number: signal.getsignal(number) for number in numbers}
  for number in TERMINATING:
    signal.signal(number, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('number', TERMINATING)
def test_signal_asks_training_to_stop(number):
  with stop_signals.StopSignals() as stop:
    assert not stop()
    signal.raise_signal(number)
    assert stop() and stop.received == number
    # A scheduler that sends several changes nothing.
    signal.raise_signal(signal.SIGTERM)
    assert stop()
    with pytest.raises(stop_signals.TerminatedError):
      stop.raise_if_received()
  assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize('number', TERMINATING)
def test_signal_before_training_ends_at_once(number):
  with (
    pytest.raises(stop_signals.TerminatedError),
    stop_signals.StopSignals(),
  ):
    signal.raise_signal(number)


def test_hangup_that_nohup_ignores_stays_ignored():
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with stop_signals.StopSignals() as stop:
    signal.raise_signal(signal.SIGHUP)
    assert not stop() and stop.received is None
  assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(
  'number', [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
)
def test_one_of_several_processes_passes_it_on_to_jax_once(monkeypatch, number):
  """JAX's service catches SIGTERM; a handler stands in for it."""
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(
    stop_signals.multihost_utils,
    'reached_preemption_sync_point',
    lambda step: False,
  )
  caught = []
  signal.signal(signal.SIGTERM, lambda *_: caught.append(os.getpid()))
  with stop_signals.StopSignals() as stop:
    stop()
    signal.raise_signal(number)
    assert stop.received == number
    signal.raise_signal(signal.SIGUSR1)
  assert caught == [os.getpid()]
