"""Trackers: their real clients hold the numbers of `metrics.jsonl`."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request

from absl import flags
from etils import epath
import pytest

import main
from runs import processes, trackers
from tests import ports
from tests.preloaded import run
import train
from vae.errors import UserError

FLAGS = (
  '--config.data.source=celeba',
  '--config.data.image_size=16',
  '--config.model.hidden_channels=(4,8)',
  '--config.model.latent_dim=3',
  '--config.train.batch_size=8',
  '--config.train.steps_per_dispatch=2',
  '--config.train.log_every_steps=2',
)


class Failing(trackers.Tracker):
  """Takes two rows, then nothing."""

  name = 'failing'
  rows = []

  def begin(self, identity):
    return identity or 'new'

  def log(self, step, scalars):
    if len(self.rows) == 2:
      raise ConnectionError('no answer')
    self.rows.append((step, scalars))

  def log_settings(self, settings):
    pass

  def end(self, outcome):
    pass


def test_failure_of_a_tracker_is_said_and_counted(tmp_path, capsys):
  writer = Failing(tmp_path, 'project')
  for step in range(5):
    writer.write_scalars(step, {'loss': 1.0})
  writer.write_hparams({'beta': 1})
  writer.close()
  err = capsys.readouterr().err
  assert [step for step, _ in Failing.rows] == [0, 1]
  # Not once for each row.
  assert err.count('cannot be reached (no answer)') == 1
  assert 'lacks 3 rows' in err
  # The run keeps its identity for the next start.
  assert json.loads((tmp_path / 'failing.json').read_text()) == {'run': 'new'}


class Hanging(Failing):
  """A server that never answers."""

  name = 'hanging'

  def begin(self, identity):
    threading.Event().wait()


def test_server_that_hangs_does_not_keep_a_run(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(trackers, '_SECONDS_TO_END', 0.1)
  writer = Hanging(tmp_path, 'project')
  for step in range(3):
    writer.write_scalars(step, {'loss': 1.0})
  writer.close()
  assert 'lacks 3 rows' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('name', 'message'),
  [('no_such_tracker', 'wandb or mlflow'), ('json', 'no class Writer')],
)
def test_unknown_tracker_is_a_mistake(name, message):
  with pytest.raises(UserError, match=message):
    trackers.find(name)


class Late(Failing):
  """Cannot be reached at first."""

  name, sent = 'late', []

  def begin(self, identity):
    if self.project == 'not yet':
      raise ConnectionError('no answer')
    return 'new'

  def log(self, step, scalars):
    self.sent.append(step)

  def log_settings(self, settings):
    self.sent.append(settings)


def test_settings_are_sent_once_the_tracker_answers(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(trackers, '_FIRST_WAIT_SECONDS', 0.0)
  writer = Late(tmp_path, 'not yet')
  writer.write_hparams({'beta': 1})
  writer.write_scalars(1, {'loss': 1.0})
  while not writer._calls.empty():
    time.sleep(0.01)
  writer.project = 'now'
  writer.write_scalars(2, {'loss': 1.0})
  writer.close()
  assert Late.sent == [{'beta': 1}, 2]
  assert 'lacks 1 rows' in capsys.readouterr().err
  lost = Late(tmp_path / 'other', 'not yet')
  lost.write_hparams({'beta': 1})
  lost.close()
  assert 'lacks the settings' in capsys.readouterr().err


def test_a_run_that_begins_again_is_another_one(tmp_path):
  (tmp_path / 'late.json').write_text('{"run": "old"}')
  writer = Late(tmp_path, 'now')
  writer.rewind(5, validated=True)
  assert (tmp_path / 'late.json').exists()
  writer.rewind(0, validated=True)
  assert not (tmp_path / 'late.json').exists()
  writer.close()


class Ended(Failing):
  """Keeps how each run ended."""

  name, outcomes = 'ended', []

  def end(self, outcome):
    self.outcomes.append(outcome)


@pytest.mark.parametrize(
  ('outcome', 'raised'),
  [
    ('finished', None),
    ('stopped', None),
    ('stopped', processes.TerminatedError),
    ('failed', UserError),
  ],
)
def test_trackers_know_how_a_run_ended(
  small_config, tmp_path, monkeypatch, outcome, raised
):
  def train_none(config, workdir, data, writer, stop):
    writer.write_scalars(1, {'loss': 1.0})
    if raised:
      raise raised
    if outcome == 'stopped':
      signal.raise_signal(signal.SIGTERM)
    stop()

  monkeypatch.setattr(train, 'train_and_evaluate', train_none)
  monkeypatch.setattr(Failing, 'rows', [])
  monkeypatch.setattr(Ended, 'outcomes', [])
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['main'])
  expected = pytest.raises(raised) if raised else contextlib.nullcontext()
  with processes.StopSignals() as stop, expected:
    stop()  # Before the first call a signal ends the program.
    main._train(small_config, epath.Path(tmp_path), stop, [Ended])
  assert Ended.outcomes == [outcome]


def train_twice(celeba_dir, workdir, tracker):
  """Trains two epochs, loses the second, and trains three."""
  flags = [*FLAGS, f'--config.data.dir={celeba_dir}', f'--workdir={workdir}']
  flags += ['--config.data.decoded_dir=', f'--trackers={tracker}']
  for num_epochs in (2, 3):
    code, _, err = run(*flags, f'--config.train.num_epochs={num_epochs}')
    assert code == 0, err
    # As a kill before the checkpoint: rows of these steps are written again.
    if num_epochs == 2:
      shutil.rmtree(workdir / 'checkpoints' / '10')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  expected = {}
  for row in map(json.loads, lines):
    step = row.pop('step')
    row.pop('images_per_second', None)  # Of the first or the second time.
    expected |= {(step, name): value for name, value in row.items()}
  return expected


def records(path):
  """The records of a .wandb file, in the format of LevelDB's log.

  Blocks of 32 KiB hold pieces, each of a checksum (4 bytes), its length (2) and
  its kind (1): whole, first, middle or last. The file begins with 7 bytes.
  """
  from wandb.proto import wandb_internal_pb2

  data, position, parts = path.read_bytes(), 7, b''
  while position + 7 <= len(data):
    left = 32768 - position % 32768
    if left < 7:
      position += left
      continue
    length, kind = struct.unpack_from('<HB', data, position + 4)
    position += 7
    parts += data[position : position + length]
    position += length
    if kind in (1, 4):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(parts)
      yield record
      parts = b''


@pytest.mark.slow
def test_wandb_offline_has_the_numbers(celeba_dir, tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  workdir = tmp_path / 'run'
  expected = train_twice(celeba_dir, workdir, 'wandb')
  files = sorted(workdir.glob('wandb/offline-run-*/*.wandb'))
  assert len(files) == 2
  # Both are the same run for the server.
  assert len({path.stem for path in files}) == 1
  found = {}
  for path in files:
    for record in records(path):
      row = {
        item.key or '/'.join(item.nested_key): json.loads(item.value_json)
        for item in record.history.item
      }
      for name, value in row.items():
        others = '_', 'samples/', 'reconstructions/', 'step', 'images_per'
        if not name.startswith(others):
          found[row['step'], name] = value
  pictures = workdir.glob('wandb/offline-run-*/files/media/images/*.png')
  assert len(list(pictures)) == 8  # Two after each epoch, one of them twice.
  assert found == pytest.approx(expected)


@contextlib.contextmanager
def mlflow_server(folder):
  port = ports.free_port()
  command = [sys.executable, '-m', 'mlflow', 'server', '--host=127.0.0.1']
  command += [f'--port={port}', f'--backend-store-uri=sqlite:///{folder}/db']
  command += [f'--artifacts-destination={folder}/artifacts', '--workers=1']
  log = (folder / 'server.log').open('w')
  process = subprocess.Popen(
    command, stdout=log, stderr=log, start_new_session=True
  )
  address = f'http://127.0.0.1:{port}'
  try:
    end = time.monotonic() + 120
    while True:
      with contextlib.suppress(OSError):
        urllib.request.urlopen(f'{address}/health', timeout=5)
        break
      assert time.monotonic() < end, (folder / 'server.log').read_text()
      time.sleep(0.5)
    yield address
  finally:
    os.killpg(process.pid, 15)
    process.wait(timeout=30)


@pytest.mark.slow
def test_mlflow_server_has_the_numbers(celeba_dir, tmp_path, monkeypatch):
  mlflow = pytest.importorskip('mlflow')
  folder = tmp_path / 'mlflow'
  folder.mkdir()
  with mlflow_server(folder) as address:
    monkeypatch.setenv('MLFLOW_TRACKING_URI', address)
    expected = train_twice(celeba_dir, tmp_path / 'run', 'mlflow')
    client = mlflow.MlflowClient(address)
    (experiment,) = client.search_experiments(filter_string="name = 'vae'")
    (found_run,) = client.search_runs([experiment.experiment_id])
    found = {}
    for name in found_run.data.metrics:
      history = client.get_metric_history(found_run.info.run_id, name)
      steps = [metric.step for metric in history]
      assert len(set(steps)) == len(steps)  # Each is there once.
      if name != 'images_per_second':
        found |= {(metric.step, name): metric.value for metric in history}
    assert found == pytest.approx(expected)
    assert found_run.info.run_name == 'run'
    assert found_run.data.params['model.latent_dim'] == '3'
    names = [a.path for a in client.list_artifacts(found_run.info.run_id)]
    assert sorted(names) == ['reconstructions', 'samples']
    assert found_run.info.status == 'FINISHED'
    flags = [*FLAGS, f'--config.data.dir={celeba_dir}', '--trackers=mlflow']
    flags += ['--config.data.decoded_dir=', f'--workdir={tmp_path / "other"}']
    code, _, err = run(*flags, '--config.optimizer.learning_rate=1000')
    assert code == 2 and 'diverged' in err
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(r.info.status for r in runs) == ['FAILED', 'FINISHED']
