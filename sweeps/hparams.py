"""The points of a sweep in TensorBoard's HParams view."""

import hashlib
import io
import math
import time

from etils import epath
import numpy as np
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.scalar import summary_v2 as scalar_summary
from tensorboard.summary.writer import record_writer

from sweeps import variation
from sweeps.results import Result
from vae import paths

# TensorBoard reads the files that have the first of these in their names; the
# last tells this module's files from others.
_PREFIX = 'events.out.tfevents'
_SUFFIX = '.hparams'

# It keeps scalars in single precision, and cannot compare those beyond.
_LARGEST = float(np.finfo(np.float32).max)

_TYPES = {
  bool: api_pb2.DATA_TYPE_BOOL,
  float: api_pb2.DATA_TYPE_FLOAT64,
  str: api_pb2.DATA_TYPE_STRING,
}
_FIELDS = {bool: 'bool_value', float: 'number_value', str: 'string_value'}


def write(folder: epath.Path, results: list[Result]) -> None:
  """Makes a folder show these results, whatever was written there before.

  Each complete or failed point is a run, in a sub-folder of its own, and so is
  what is said of the whole sweep: which settings vary, and what is measured.
  Only what is new is written, so this may be called whenever a point ends.

  Args:
    folder: of the sweep, `tensorboard/`.
    results: of its points, in any state.
  """
  # A TensorBoard that is running reads a file once, and of a run's settings and
  # status keeps the first that it read until the run is gone. So what is new
  # goes to a new file, and a new run where it is more than a metric.
  wanted = {
    (run, _digest(summary)): summary
    for run, summary in _summaries(results).items()
  }
  existing = _existing(folder)
  for run, digest in wanted.keys() - existing.keys():
    name = f'{_PREFIX}.{time.time_ns()}.{digest}{_SUFFIX}'
    _write_events(folder / run / name, wanted[run, digest])
  runs = {run for run, _ in wanted}
  for run, digest in existing.keys() - wanted.keys():
    if run in runs:
      existing[run, digest].unlink(missing_ok=True)
    else:
      (folder / run).rmtree(missing_ok=True)


def _summaries(results: list[Result]) -> dict[str, summary_pb2.Summary]:
  """What TensorBoard is told, by the name of the run that says it."""
  types = {
    key: _type([r.values[key] for r in results if key in r.values])
    for key in variation.keys(results)
  }
  points = [
    {key: _as(types[key], value) for key, value in result.values.items()}
    for result in results
  ]
  sweep = _sweep(types, points, [r for r in results if r.state == 'complete'])
  summaries = {f'sweep-{_digest(sweep)}': sweep}
  for result, values in zip(results, points, strict=True):
    if result.state == 'complete':
      summaries[result.name] = _point(result, values)
    elif result.state == 'failed':
      # It may be tried again, and succeed.
      summaries[f'{result.name},failed'] = _point(result, values)
  return summaries


def _type(values):
  """That of all values of a setting: TensorBoard compares them."""
  if all(isinstance(value, bool) for value in values):
    return bool
  if all(variation.is_number(v) and math.isfinite(v) for v in values):
    return float
  return str


def _as(kind, value):
  return variation.text(value) if kind is str else kind(value)


def _sweep(types, points, complete):
  """Which settings vary, from where to where, and what is measured."""
  experiment = api_pb2.Experiment()
  for key, kind in types.items():
    values = sorted({values[key] for values in points if key in values})
    info = experiment.hparam_infos.add(
      name=key, type=_TYPES[kind], differs=len(values) > 1
    )
    if kind is float:
      info.domain_interval.min_value = values[0]
      info.domain_interval.max_value = values[-1]
    else:
      info.domain_discrete.extend(values)
  for name in dict.fromkeys(name for r in complete for name in _finite(r)):
    experiment.metric_infos.add(
      name={'tag': name}, description=variation.unit(complete, name)
    )
  return _hparams_summary(metadata.EXPERIMENT_TAG, experiment=experiment)


def _point(result, values):
  """A point's values, how it ended, and its metrics."""
  start = plugin_data_pb2.SessionStartInfo(group_name=result.name)
  for key, value in values.items():
    setattr(start.hparams[key], _FIELDS[type(value)], value)
  succeeded = result.state == 'complete'
  end = plugin_data_pb2.SessionEndInfo(
    status=api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
  )
  summary = _hparams_summary(
    metadata.SESSION_START_INFO_TAG, session_start_info=start
  )
  summary.MergeFrom(
    _hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)
  )
  for name, value in _finite(result).items():
    unit = result.units.get(name)
    summary.MergeFrom(scalar_summary.scalar_pb(name, value, unit))
  return summary


def _finite(result):
  return {
    name: value
    for name, value in result.metrics.items()
    if abs(value) <= _LARGEST
  }


def _hparams_summary(tag, **content):
  data = plugin_data_pb2.HParamsPluginData(
    version=metadata.PLUGIN_DATA_VERSION, **content
  )
  summary = summary_pb2.Summary()
  value = summary.value.add(tag=tag, tensor=metadata.NULL_TENSOR)
  plugin = value.metadata.plugin_data
  plugin.plugin_name = metadata.PLUGIN_NAME
  plugin.content = data.SerializeToString(deterministic=True)
  return summary


def _digest(summary):
  data = summary.SerializeToString(deterministic=True)
  return hashlib.sha256(data).hexdigest()[:8]


def _existing(folder):
  """What an earlier call wrote, by run and digest."""
  if not folder.exists():
    return {}
  return {
    (run.name, path.name.split('.')[-2]): path
    for run in folder.iterdir()
    if run.is_dir()
    for path in run.iterdir()
    if path.name.endswith(_SUFFIX)
  }


def _write_events(path, summary):
  file = io.BytesIO()
  writer = record_writer.RecordWriter(file)
  now = time.time()
  for content in ({'file_version': 'brain.Event:2'}, {'summary': summary}):
    event = event_pb2.Event(wall_time=now, **content)
    writer.write(event.SerializeToString())
  path.parent.mkdir(parents=True, exist_ok=True)
  paths.replace(path, file.getvalue())
