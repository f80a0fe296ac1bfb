"""Trains and measures a run and a population; prints all numbers, as JSON.

Run by test_numerics.py, in environments that differ.
"""

import json
import pathlib
import sys

from etils import epath
import numpy as np

from evaluation import measure
from runs import progress
from tests.conftest import make_small_config
import train
from vae import checkpoint_files
from vae import checkpoints
from vae import splits
from vae import trained as trained_models


class Writer(progress.NullWriter):
  """Keeps the metrics, but for the speed."""

  def __init__(self):
    self.rows = []

  def write_scalars(self, step, scalars):
    scalars = dict(scalars)
    scalars.pop('images_per_second', None)
    self.rows.append([step, scalars])


def make_run(workdir, num_epochs, **objective):
  config = make_small_config('')
  config.data.source = 'cartoon_faces'
  # All that is random is on, and a schedule.
  config.train.flip = True
  config.objective.input_noise = 0.1
  config.objective.num_samples = 2
  config.objective.update(objective)
  config.optimizer.decay_per_epoch = 0.9
  config.train.num_epochs = num_epochs
  return train.Run(config, epath.Path(workdir), Writer())


def arrays(workdir):
  """The digests of the last state."""
  saved = checkpoints.Checkpoints(workdir)
  path = saved.folder(saved.latest_step()) / checkpoint_files.CONTENTS
  return json.loads(path.read_text())['arrays']


def main():
  workdir, num_epochs = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  pixels = np.random.default_rng(0).integers(0, 256, (56, 16, 16, 3), np.uint8)
  data = splits.DataSet(
    *(splits.ArraySplit(part) for part in np.split(pixels, [40, 51]))
  )
  alone = make_run(workdir / 'alone', num_epochs)
  train.train_and_evaluate(alone.config, alone.workdir, data, alone.writer)
  together = [
    make_run(workdir / f'{beta}', num_epochs, beta=beta) for beta in (0.5, 4.0)
  ]
  together[1].config.seed = 8
  train.train_population(together, data, latent_dim=4)
  trained = trained_models.restore(alone.config, alone.workdir)
  settings = measure.Settings(
    groups=('bounds', 'reconstruction'), num_importance_samples=3
  )
  measured = measure.measure(trained, data, 'train', settings)
  summary = measure.summarise(trained, data.test, settings)
  content = {
    'rows': [run.writer.rows for run in (alone, *together)],
    'states': [arrays(run.workdir) for run in (alone, *together)],
    'measured': [
      {name: metric.value for name, metric in results.metrics.items()}
      for results in (measured, summary)
    ],
    'samples': trained.sample(2).tolist(),
  }
  (workdir / f'{num_epochs}.json').write_text(json.dumps(content))


if __name__ == '__main__':
  main()
