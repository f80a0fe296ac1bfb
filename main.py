"""Trains a variational autoencoder.

  python main.py --config=configs/celeba.py --config.objective.beta=4

Any setting of configs/default.py can be given as --config.GROUP.NAME=VALUE.
The same command again continues where the run stopped.
"""

import contextlib
import os
import sys

from absl import flags
from etils import epath
import jax
import ml_collections

import input_pipeline
from runs import (
  command_line,
  metric_writer,
  processes,
  progress,
  schema,
  trackers,
  workdirs,
)
import train
from vae import devices, loading, paths
from vae.checkpoints import Checkpoints
from vae.errors import UserError

command_line.define_config('configs/faces.py')
flags.adopt_module_key_flags(command_line)
_TRACKERS = flags.DEFINE_list(
  'trackers',
  [],
  f'Experiment trackers beside TensorBoard: {",".join(trackers.NAMES)}, or '
  'modules of your own (docs/training.md).',
)
_PROJECT = flags.DEFINE_string(
  'project', 'vae', "The trackers' project, or experiment."
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'One of several processes that train together: the same command on every '
  'host of a TPU pod, or under Slurm. Elsewhere add the next three flags.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT of the first process.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Index of this process, from 0.'
)


def main() -> None:
  """Checks the flags, joins the processes, and trains."""
  config = flags.FLAGS.config
  address = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if _DISTRIBUTED.value:
    processes.join(*address)
  elif any(value is not None for value in address):
    raise UserError(
      '--coordinator_address, --num_processes and --process_id go with '
      '--distributed; add it, or drop them.'
    )
  devices.check()
  schema.validate(config)
  found = [trackers.find(name) for name in _TRACKERS.value]
  # Paths may differ between hosts.
  shared = config.copy_and_resolve_references()
  shared.data.dir = shared.data.decoded_dir = shared.init_from = ''
  processes.check_same(shared.to_dict(), 'configs')
  schema.check_devices(config, jax.device_count())
  default = f'logs/{command_line.config_name()}'
  workdir = paths.expand(command_line.WORKDIR.value or default)
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(processes.StopSignals())
    if jax.process_index() == 0:
      workdirs.check_writable(workdir, '--workdir')
      stack.enter_context(workdirs.hold(workdir))
      workdirs.check(config, workdir)
      if config.init_from and not Checkpoints(workdir).all_steps():
        loading.read_config(config.init_from)
        Checkpoints(config.init_from).find('best')
    else:
      sys.stdout = open(os.devnull, 'w')  # The first process reports for all.
    _train(config, workdir, stop, found)
    if _DISTRIBUTED.value:
      jax.distributed.shutdown()  # Waits for all, so that none looks dead.
    stop.raise_if_received()


def _train(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  stop: processes.StopSignals,
  own_trackers: list[type[trackers.Tracker]],
) -> None:
  # A library may have swallowed the exception of a signal.
  stop.raise_if_received()
  data = input_pipeline.load(config)
  stop.raise_if_received()
  writer = progress.Writer()
  if jax.process_index() == 0:
    others = [make(workdir, _PROJECT.value) for make in own_trackers]
    writer = metric_writer.MetricWriter(workdir)
    if others:
      writer = trackers.Writers([writer, *others])
  outcome: progress.Outcome = 'failed'
  try:
    train.train_and_evaluate(config, workdir, data, writer, stop)
    outcome = 'stopped' if stop.answered else 'finished'
  except (KeyboardInterrupt, processes.TerminatedError):
    outcome = 'stopped'
    raise
  finally:
    writer.close(outcome)


if __name__ == '__main__':
  command_line.run(main, on_interrupt='interrupted; the same command goes on.')
