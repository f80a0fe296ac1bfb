import json

from etils import epath
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from runs import metric_writer


def rows(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_scalars_go_to_both(tmp_path):
  writer = metric_writer.MetricWriter(epath.Path(tmp_path))
  writer.write_scalars(5, {'epoch': 0.5, 'train/loss': 3.25})
  writer.write_images(5, {'samples': np.zeros((4, 4, 3), np.uint8)})
  writer.write_hparams({'objective.beta': 1.5, 'channels': (1, 2)})
  writer.close()
  assert rows(tmp_path) == [{'step': 5, 'epoch': 0.5, 'train/loss': 3.25}]
  events = event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
  events.Reload()
  (tensor,) = events.Tensors('train/loss')
  assert tensor.step == 5
  assert tensor_util.make_ndarray(tensor.tensor_proto) == 3.25
  tags = events.Tags()
  assert 'samples' in tags['tensors']
  assert '_hparams_/session_start_info' in (
    events.summary_metadata.keys() | set(tags['tensors'])
  )


def test_rewind_drops_what_will_be_written_again(tmp_path):
  writer = metric_writer.MetricWriter(epath.Path(tmp_path))
  writer.rewind(0, validated=True)  # Nothing there yet.
  for step in (1, 2, 3, 4):
    writer.write_scalars(step, {'epoch': step / 4})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5, "ep')  # Killed while writing.
  writer.rewind(2, validated=True)
  writer.write_scalars(3, {'epoch': 1.0})
  writer.close()
  assert [(r['step'], r['epoch']) for r in rows(tmp_path)] == [
    (1, 0.25),
    (2, 0.5),
    (3, 1.0),
  ]


@pytest.mark.parametrize('validated', [True, False])
def test_rewind_drops_a_validation_that_will_be_made_again(tmp_path, validated):
  writer = metric_writer.MetricWriter(epath.Path(tmp_path))
  for step in (1, 2):
    writer.write_scalars(step, {'train/loss': 1.0})
    writer.write_scalars(step, {'val/loss': 2.0})
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    # As a damaged disk leaves it.
    file.write(b'\xff\xfe\n7\n{"epoch": 3}\n')
  writer.rewind(2, validated)
  writer.flush()
  writer.close()
  assert len(rows(tmp_path)) == 3 + validated
  assert [r['step'] for r in rows(tmp_path) if 'train/loss' in r] == [1, 2]
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'metrics.jsonl',
    'tensorboard',
  ]
