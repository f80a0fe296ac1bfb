"""Metrics on disk: `metrics.jsonl` and TensorBoard."""

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
  events = event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  (tensor,) = events.Tensors('train/loss')
  assert tensor.step == 5
  assert tensor_util.make_ndarray(tensor.tensor_proto) == 3.25
  tags = set(events.Tags()['tensors']) | events.summary_metadata.keys()
  assert {'samples', '_hparams_/session_start_info'} <= tags


@pytest.mark.parametrize('validated', [True, False])
def test_rewind_drops_rows_that_will_be_written_again(tmp_path, validated):
  writer = metric_writer.MetricWriter(epath.Path(tmp_path))
  writer.rewind(0, validated=True)  # Nothing there yet.
  for step in (1, 2, 3):
    writer.write_scalars(step, {'train/loss': 1.0})
    writer.write_scalars(step, {'val/loss': 2.0})
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    # As a damaged disk leaves it, and a kill while writing.
    file.write(b'\xff\xfe\n7\n{"epoch": 3}\n{"step": 5, "ep')
  writer.rewind(2, validated)
  writer.write_scalars(3, {'train/loss': 4.0})
  writer.flush()()
  writer.close()
  kept = [(1, 1.0), (1, 2.0), (2, 1.0), *[(2, 2.0)] * validated, (3, 4.0)]
  found = [
    (row['step'], row.get('train/loss', row.get('val/loss')))
    for row in rows(tmp_path)
  ]
  assert found == kept
  events, metrics = sorted(path.name for path in tmp_path.iterdir())
  assert events.startswith('events.out.tfevents.')
  assert metrics == 'metrics.jsonl'
