"""Trains a variational autoencoder.

  python main.py --config=configs/celeba.py --config.objective.beta=4

Any setting of configs/default.py can be given as --config.GROUP.NAME=VALUE.
The same command again goes on where the run stopped.
"""

import os
import pathlib

from absl import flags
from etils import epath
import jax

import command_line
import run_config

# TensorFlow's C++ side is chatty, and reads this when it is loaded.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

command_line.define_config('configs/faces.py')
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where the run is kept: config, metrics, checkpoints, pictures. By default '
  'logs/NAME, with the NAME of the config file.',
)


def main() -> None:
  """Checks the flags, sets the platform up, and trains."""
  path = command_line.config_path()
  config = flags.FLAGS.config
  run_config.validate(config)
  run_config.check_devices(config, jax.device_count())
  workdir = epath.Path(_WORKDIR.value or f'logs/{pathlib.Path(path).stem}')
  run_config.claim_workdir(config, workdir)

  # TensorFlow takes seconds to load; a mistake above is told before.
  import tensorflow as tf

  import input_pipeline
  import metric_writer
  import train

  # The accelerators are JAX's alone.
  tf.config.set_visible_devices([], 'GPU')
  tf.config.set_visible_devices([], 'TPU')

  data = input_pipeline.load(config)
  writer = metric_writer.MetricWriter(workdir)
  try:
    train.train_and_evaluate(config, workdir, data, writer)
  finally:
    writer.close()


if __name__ == '__main__':
  command_line.run(main)
