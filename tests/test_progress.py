import contextlib
import json
import sys
import threading
import time

from etils import epath
import numpy as np
from PIL import Image
import pytest

from runs import progress


class Clock:
  """Stands still until it is told."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(time, 'monotonic', lambda: self.now)


class ListWriter(progress.NullWriter):
  def __init__(self):
    self.rows = []

  def write_scalars(self, step, scalars):
    self.rows.append({'step': step, **scalars})


@pytest.fixture
def setting(monkeypatch, tmp_path):
  clock, writer = Clock(monkeypatch), ListWriter()
  report = progress.Report(
    [(writer, epath.Path(tmp_path))],
    step=100,
    total_steps=500,
    steps_per_epoch=50,
    batch_size=8,
    log_every_steps=20,
    learning_rates=[0.5 ** np.arange(10)],
  )
  return clock, writer, report


def test_first_dispatch_is_announced_as_it_compiles(setting, capsys):
  _, _, report = setting
  report.dispatching()
  assert capsys.readouterr().out == 'Compiling …\n'
  report.dispatched()
  report.dispatching()
  assert capsys.readouterr().out == ''


class Timer:
  """Goes off by `go_off`, unless it was cancelled."""

  def __init__(self, seconds, function, arguments):
    self.seconds, self.is_on = seconds, False
    self._call = lambda: function(*arguments)
    Timer.last = self

  def start(self):
    self.is_on = True

  def cancel(self):
    self.is_on = False

  def go_off(self):
    if self.is_on:
      self._call()


def test_long_first_batch_of_a_pass_is_explained(monkeypatch, capsys):
  monkeypatch.setattr(threading, 'Timer', Timer)
  with progress.track('encoding', 10):
    Timer.last.go_off()
  assert Timer.last.seconds == 2
  explained, done = capsys.readouterr().out.splitlines()
  assert explained == 'encoding: compiling …' and '10 images in' in done
  with progress.track('encoding', 10) as tell:
    tell(3)
    Timer.last.go_off()
  with pytest.raises(ValueError), progress.track('encoding', 10):
    raise ValueError
  Timer.last.go_off()
  assert 'compiling' not in capsys.readouterr().out


def metrics_of(*losses):
  losses = np.array([losses], np.float32)
  return {'loss': losses, 'kl': losses / 2}


VALIDATION = {'loss': [2.0], 'distortion': [1.5], 'kl': [0.5], 'mse': [0.1]}


def test_speed_is_images_by_seconds_of_training(setting, capsys):
  clock, writer, report = setting
  clock.now += 60  # Compilation.
  report.dispatched()
  clock.now += 4
  report.dispatched()
  report.training(metrics_of(*[1.0] * 25))  # To 125, told to 120.
  clock.now += 2
  report.training(metrics_of(*[1.0] * 25))  # To 150, the epoch's end.
  clock.now += 30
  report.validation(150, VALIDATION)
  clock.now += 5
  report.training(metrics_of(*[1.0] * 20))
  speeds = [
    row['images_per_second'] for row in writer.rows if 'train/loss' in row
  ]
  # Of the second call there are two rows, at 140 and 150.
  assert speeds == pytest.approx(
    [25 * 8 / 4, 25 * 8 / 2, 25 * 8 / 2, 20 * 8 / 5]
  )
  # 70 steps took 41 seconds, validation and all; 330 are left.
  assert '3m13s left' in capsys.readouterr().out


@pytest.mark.parametrize('cuts', [(50,), (7, 20, 13, 10), (1,) * 50])
def test_rows_do_not_depend_on_the_dispatches(setting, cuts):
  _, writer, report = setting
  report.dispatched()
  losses = list(np.random.default_rng(0).normal(size=50))
  first = 0
  for cut in cuts:
    report.training(metrics_of(*losses[first : first + cut]))
    first += cut
  assert [row['step'] for row in writer.rows] == [120, 140, 150]
  parts = np.split(np.float32(losses).astype(np.float64), [20, 40])
  for row, values in zip(writer.rows, parts, strict=True):
    assert row['train/loss'] == pytest.approx(values.mean(), rel=1e-12)


def test_is_told_where_rows_end(setting):
  _, _, report = setting
  told = [step for step in range(100, 201) if report.is_told(step)]
  assert told == [100, 120, 140, 150, 170, 190, 200]


def test_rows_have_step_epoch_and_names(setting):
  _, writer, report = setting
  report.dispatched()
  report.training(metrics_of(*[4.0] * 10, *[2.0] * 10))
  report.validation(150, VALIDATION)
  train, val = writer.rows
  assert train.pop('images_per_second') > 0
  assert train == {
    'step': 120,
    'epoch': 2.4,
    'train/loss': 3.0,
    'train/kl': 1.5,
    'learning_rate': 0.25,
  }
  assert val == {
    'step': 150,
    'epoch': 3,
    **{f'val/{name}': value for name, (value,) in VALIDATION.items()},
  }


def test_pictures_are_kept_by_epoch(setting, tmp_path, capsys):
  _, _, report = setting
  report.dispatched()
  picture = np.full((4, 6, 3), 77, np.uint8)
  report.pictures(500, lambda: {'samples': picture})
  report.done(best_step=450)
  path = tmp_path / 'samples' / 'epoch_0010.png'
  np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
  out = capsys.readouterr().out
  assert str(path) in out and 'step 450' in out


def test_picture_that_cannot_be_written_is_told(setting, tmp_path, capsys):
  _, _, report = setting
  (tmp_path / 'samples').write_text('')  # Where a folder should be.
  picture = np.zeros((4, 4, 3), np.uint8)
  report.pictures(150, lambda: {'samples': picture, 'others': picture})
  report.finish_pictures()
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and 'samples/epoch_0003.png cannot be' in err
  assert (tmp_path / 'others' / 'epoch_0003.png').exists()


def test_picture_that_cannot_be_drawn_ends_the_run(setting):
  _, _, report = setting
  report.pictures(150, lambda: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    report.finish_pictures()


@pytest.mark.parametrize('stop', [1, 19, 20, 33, 49])
def test_rows_do_not_depend_on_where_a_run_was_stopped(setting, tmp_path, stop):
  _, writer, report = setting
  losses = np.random.default_rng(0).normal(size=50).astype(np.float32)
  report.dispatched()
  report.training(metrics_of(*losses))
  again = ListWriter()
  untold = {}
  for first, last in ((0, stop), (stop, 50)):
    part = progress.Report(
      [(again, epath.Path(tmp_path))],
      step=100 + first,
      total_steps=500,
      steps_per_epoch=50,
      batch_size=8,
      log_every_steps=20,
      learning_rates=[0.5 ** np.arange(10)],
      untold=[untold],
    )
    part.dispatched()
    part.training(metrics_of(*losses[first:last]))
    untold = json.loads(json.dumps(part.untold(0)))
  for row in (*writer.rows, *again.rows):
    del row['images_per_second']
  assert again.rows == writer.rows


def test_log_that_cannot_be_written_ends_nothing(setting, monkeypatch):
  """As where the disk that it lies on is full, or its reader has gone."""
  _, writer, report = setting
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stdout', full)
    report.dispatched()
    report.training(metrics_of(*[1.0] * 20))
    progress.say('anything')
    monkeypatch.undo()
    with contextlib.suppress(OSError):
      full.close()
  assert [row['step'] for row in writer.rows] == [120]


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0.4, '0s'),
    (59.4, '59s'),
    (59.6, '1m00s'),
    (3599, '59m59s'),
    (3600, '1h00m'),
    (100 * 3600 + 61, '100h01m'),
  ],
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text
