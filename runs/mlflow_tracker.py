"""MLflow, at the server or folder that MLFLOW_TRACKING_URI names."""

import time

import mlflow
from mlflow import entities

from runs import trackers

# MLflow's words for `progress.Outcome`.
_STATUS = {'finished': 'FINISHED', 'stopped': 'KILLED', 'failed': 'FAILED'}


class Writer(trackers.Tracker):
  """Sends rows as metrics by step.

  A run that goes on from a checkpoint repeats rows with the same bits, but for
  their speed, which MLflow would keep twice; those that it has are not sent.
  """

  name = 'mlflow'

  def begin(self, identity):
    self._client = mlflow.MlflowClient()
    self._last: dict[str, int] = {}  # The last step by the metric's name.
    if identity:
      run = self._client.get_run(identity)
      self._id = identity
      self._client.update_run(identity, status='RUNNING')
      for name in run.data.metrics:
        history = self._client.get_metric_history(identity, name)
        self._last[name] = max(metric.step for metric in history)
      return identity
    found = self._client.get_experiment_by_name(self.project)
    experiment = (
      found.experiment_id
      if found
      else self._client.create_experiment(self.project)
    )
    run = self._client.create_run(experiment, run_name=self.workdir.name)
    self._id = run.info.run_id
    return self._id

  def log(self, step, scalars):
    now = int(1000 * time.time())
    rows = [
      entities.Metric(name, float(value), now, step)
      for name, value in scalars.items()
      if step > self._last.get(name, -1)
    ]
    self._client.log_batch(self._id, metrics=rows)
    # A validation's row repeats the epoch of the row of training before it.
    self._last |= {row.key: step for row in rows}

  def log_images(self, step, images):
    for name, pixels in images.items():
      picture = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
      self._client.log_image(
        self._id, picture, artifact_file=f'{name}/step_{step:08d}.png'
      )

  def log_settings(self, settings):
    for start in range(0, len(settings), 100):  # As many as a request may have.
      part = list(settings.items())[start : start + 100]
      params = [entities.Param(name, str(value)) for name, value in part]
      self._client.log_batch(self._id, params=params)

  def end(self, outcome):
    self._client.set_terminated(self._id, _STATUS[outcome])
