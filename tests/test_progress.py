"""Rows, speed and lines of a run in training."""

import contextlib
import sys
import time
import types

from etils import epath
import numpy as np
from PIL import Image
import pytest

from runs import progress


class ListWriter(progress.Writer):
  def __init__(self):
    self.rows = []

  def write_scalars(self, step, scalars):
    self.rows.append({'step': step, **scalars})


SCHEDULE = progress.Schedule(
  steps_per_epoch=50, num_epochs=10, every_epochs=3, log_every_steps=20
)
VALIDATION = {'loss': [2.0], 'distortion': [1.5], 'kl': [0.5], 'mse': [0.1]}


@pytest.fixture
def setting(monkeypatch, tmp_path, capsys):
  clock, writer = types.SimpleNamespace(now=1000.0), ListWriter()
  monkeypatch.setattr(time, 'monotonic', lambda: clock.now)
  run = progress.Progress(
    [(writer, epath.Path(tmp_path))],
    SCHEDULE,
    step=100,
    batch_size=8,
    learning_rates=[0.5 ** np.arange(10)],
  )
  with run.dispatching():
    clock.now += 60  # Compilation.
  return clock, writer, run


def metrics_of(*losses):
  losses = np.array([losses], np.float32)
  return {'loss': losses, 'kl': losses / 2}


def test_schedule_has_its_rows_and_validations():
  steps = range(100, 201)
  rows = [step for step in steps if SCHEDULE.logs(step)]
  assert rows == [100, 120, 140, 150, 170, 190, 200]
  validated = [step for step in range(501) if SCHEDULE.validates(step)]
  assert validated == [150, 300, 450, 500] and SCHEDULE.total_steps == 500


def test_speed_is_images_by_seconds_of_training(setting, capsys):
  clock, writer, run = setting
  assert capsys.readouterr().out == 'Compiling …\n'
  clock.now += 4
  with run.dispatching():
    pass
  run.training(metrics_of(*[1.0] * 25))  # To 125, logged to 120.
  clock.now += 2
  run.training(metrics_of(*[1.0] * 25))  # To 150, the epoch's end.
  clock.now += 30
  run.validation(150, VALIDATION)
  clock.now += 5
  run.training(metrics_of(*[1.0] * 20))
  speeds = [r['images_per_second'] for r in writer.rows if 'train/loss' in r]
  # The second call has two rows, at 140 and 150.
  assert speeds == pytest.approx(
    [25 * 8 / 4, 25 * 8 / 2, 25 * 8 / 2, 20 * 8 / 5]
  )
  # 70 steps took 41 seconds, validation and all; 330 are left.
  out = capsys.readouterr().out
  assert '3m13s left' in out and 'Compiling' not in out


@pytest.mark.parametrize('cuts', [(50,), (7, 20, 13, 10)])
def test_rows_do_not_depend_on_the_dispatches(setting, cuts):
  _, writer, run = setting
  losses = np.random.default_rng(0).normal(size=50).astype(np.float32)
  for part in np.split(losses, np.cumsum(cuts)[:-1]):
    run.training(metrics_of(*part))
  assert [row['step'] for row in writer.rows] == [120, 140, 150]
  parts = np.split(losses.astype(np.float64), [20, 40])
  for row, values in zip(writer.rows, parts, strict=True):
    assert row['train/loss'] == pytest.approx(values.mean(), rel=1e-12)


def test_pictures_are_kept_by_epoch(setting, tmp_path, capsys):
  _, _, run = setting
  picture = np.full((4, 6, 3), 77, np.uint8)
  (tmp_path / 'others').write_text('')  # In the place of a folder.
  run.pictures(500, lambda: {'others': picture, 'samples': picture})
  run.finish_pictures()
  run.done(best_step=450)
  path = tmp_path / 'samples' / 'epoch_0010.png'
  np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
  out, err = capsys.readouterr()
  assert str(path) in out and 'step 450' in out
  assert err.count('\n') == 1 and 'others/epoch_0010.png cannot be' in err
  run.pictures(300, lambda: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run.finish_pictures()


def test_durations_are_short():
  texts = map(progress.duration, (59.4, 59.6, 3600))
  assert list(texts) == ['59s', '1m00s', '1h00m']


def test_unwritable_log_ends_no_training(setting, monkeypatch):
  """Such as on a full disk, or if its reader has gone."""
  _, writer, run = setting
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stdout', full)
    run.training(metrics_of(*[1.0] * 20))
    progress.say('anything')
    monkeypatch.undo()
    with contextlib.suppress(OSError):
      full.close()
  assert [row['step'] for row in writer.rows] == [120]
