import time

from etils import epath
import numpy as np
from PIL import Image
import pytest

import report as reports


class Clock:
  """Stands still until it is told."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(time, 'monotonic', lambda: self.now)


class ListWriter(reports.NullWriter):
  def __init__(self):
    self.rows = []

  def write_scalars(self, step, scalars):
    self.rows.append({'step': step, **scalars})


@pytest.fixture
def setting(monkeypatch, tmp_path):
  clock, writer = Clock(monkeypatch), ListWriter()
  report = reports.Report(
    writer,
    epath.Path(tmp_path),
    step=100,
    total_steps=500,
    steps_per_epoch=50,
    batch_size=8,
  )
  return clock, writer, report


def test_speed_is_images_by_seconds_of_training(setting, capsys):
  clock, writer, report = setting
  clock.now += 60  # Compilation.
  report.dispatched()
  clock.now += 4
  report.dispatched()
  report.training(120, {'loss': 3.0}, 0.1)
  with report.pause():
    clock.now += 30  # Validation.
  clock.now += 2
  report.training(140, {'loss': 2.0}, 0.1)
  speeds = [row['images_per_second'] for row in writer.rows]
  assert speeds == pytest.approx([20 * 8 / 4, 20 * 8 / 2])
  # 40 steps took 36 seconds, validation and all; 360 are left.
  assert '5m24s left' in capsys.readouterr().out


def test_rows_have_step_epoch_and_names(setting):
  _, writer, report = setting
  report.dispatched()
  report.training(125, {'loss': 3.0, 'kl': 1.0}, 0.25)
  values = {'loss': 2.0, 'distortion': 1.5, 'kl': 0.5, 'mse': 0.1}
  report.validation(150, values, {})
  train, val = writer.rows
  assert train.pop('images_per_second') > 0
  assert train == {
    'step': 125,
    'epoch': 2.5,
    'train/loss': 3.0,
    'train/kl': 1.0,
    'learning_rate': 0.25,
  }
  assert val == {
    'step': 150,
    'epoch': 3,
    **{f'val/{name}': value for name, value in values.items()},
  }


def test_pictures_are_kept_by_epoch(setting, tmp_path, capsys):
  _, _, report = setting
  report.dispatched()
  picture = np.full((4, 6, 3), 77, np.uint8)
  values = dict.fromkeys(('loss', 'distortion', 'kl', 'mse'), 1.0)
  report.validation(500, values, {'samples': picture})
  path = tmp_path / 'samples' / 'epoch_0010.png'
  np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
  report.done(best_step=450)
  out = capsys.readouterr().out
  assert str(path) in out and 'step 450' in out


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
  assert reports.duration(seconds) == text
