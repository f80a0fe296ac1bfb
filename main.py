"""Trains a variational autoencoder.

  python main.py --config=configs/celeba.py --config.objective.beta=4

Any setting of configs/default.py can be given as --config.GROUP.NAME=VALUE.
The same command again goes on where the run stopped.
"""

import contextlib
import os
import pathlib
import sys

from absl import flags
from etils import epath
import jax
import ml_collections

from runs import command_line
from runs import processes
from runs import schema
from runs import stop_signals
from runs import workdir_lock
from runs import workdirs
from vae import devices
from vae import paths
from vae.errors import UserError

command_line.define_config('configs/faces.py')
flags.adopt_module_key_flags(command_line)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'Whether this is one of several processes that train together: the same '
  'command on every host of a TPU pod, or under Slurm. Elsewhere name the '
  'next three flags too.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT of the first process.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Of this process, from 0.'
)


def main() -> None:
  """Checks the flags, sets the platform up, and trains."""
  path = command_line.config_path()
  config = flags.FLAGS.config
  schema.validate(config)
  explicit = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
  if _DISTRIBUTED.value:
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  elif any(flag.value is not None for flag in explicit):
    names = ', '.join(f'--{flag.name}' for flag in explicit)
    raise UserError(f'{names} go with --distributed; add it, or drop them.')
  devices.check()
  workdir = paths.expand(
    command_line.WORKDIR.value or f'logs/{pathlib.Path(path).stem}'
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(processes.working_together())
    processes.check_same(schema.flatten(config))
    schema.check_devices(config, jax.device_count())
    stop = stack.enter_context(stop_signals.StopSignals())
    if jax.process_index() == 0:
      workdirs.check_writable(workdir, '--workdir')
      stack.enter_context(workdir_lock.hold(workdir))
      workdirs.check(config, workdir)
    else:
      # One process speaks for all.
      sys.stdout = open(os.devnull, 'w')
    _train(config, workdir, stop)
    if _DISTRIBUTED.value:
      # Once all are done, so that none is missed by another.
      jax.distributed.shutdown()
    stop.raise_if_received()


def _train(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  stop: stop_signals.StopSignals,
) -> None:
  # TensorFlow takes seconds to load; a mistake above is told before.
  import input_pipeline
  from runs import metric_writer
  from runs import progress
  import train

  # A library may have caught what a signal raised in it.
  stop.raise_if_received()
  data = input_pipeline.load(config)
  stop.raise_if_received()
  first = jax.process_index() == 0
  writer = (
    metric_writer.MetricWriter(workdir) if first else progress.NullWriter()
  )
  try:
    train.train_and_evaluate(config, workdir, data, writer, stop)
  finally:
    writer.close()


if __name__ == '__main__':
  command_line.run(main, on_interrupt='interrupted; the same command goes on.')
