"""Weights & Biases, online or offline as WANDB_MODE says."""

import pathlib

import wandb

from runs import progress, trackers
from vae import paths


class Writer(trackers.Tracker):
  """Sends rows with the `step` of the run, the axis of all charts.

  W&B counts the calls beside it. A run that goes on from a checkpoint repeats
  rows with the same bits, but for their speed, which fall onto each other.
  """

  name = 'wandb'

  def begin(self, identity):
    self._run = wandb.init(
      project=self.project,
      name=self.workdir.name,
      id=identity,
      resume='allow' if identity else None,
      dir=None if paths.is_remote(self.workdir) else str(self.workdir),
      settings=wandb.Settings(silent=True),
    )
    self._run.define_metric('*', step_metric='step')
    return self._run.id

  def log(self, step, scalars):
    self._run.log({'step': step, **scalars})

  def log_images(self, step, images):
    # They are drawn while later steps are logged already.
    pictures = {name: wandb.Image(pixels) for name, pixels in images.items()}
    self._run.log({'step': step, **pictures})

  def log_settings(self, settings):
    self._run.config.update(dict(settings), allow_val_change=True)

  def end(self, outcome):
    # Each start of a run that is offline leaves a folder.
    folder = pathlib.Path(self._run.dir).parent.parent
    offline = f'wandb sync {folder}/offline-run-*-{self._run.id}'
    where = self._run.url or offline
    # W&B shows a run as crashed if its exit code is not 0.
    self._run.finish(exit_code=int(outcome == 'failed'))
    progress.say(f'W&B: {where}')
