"""Has main.py meet configs, each in a process of its own; says how it went.

  PYTHONPATH=. python tests/hostile_config_run.py FOLDER

FOLDER holds cases.json, a list of {"config": text or null, "argv": [...]}, and
gets results.json, for each case its exit status, seconds and output. To load
JAX and TensorFlow takes longer than all the rest, so they are loaded once, and
each case is a fork of this process in which nothing has been started yet.
Where the training loop would begin, its steps are traced by shapes alone.
"""

import json
import os
import pathlib
import sys
import time
import traceback

import jax
from jax._src import xla_bridge
import numpy as np
import training_loop
from vae.single import SingleRun

from data import sources
import input_pipeline  # noqa: F401
import main
from runs import command_line
from runs import metric_writer  # noqa: F401
from tests.fuzzed_configs import MAX_SECONDS
from tests.fuzzed_configs import VALID
from vae import devices
from vae import splits
from vae import training


def trace(loop, validate_first):
  """In place of the training loop: its steps, by shapes alone.

  Raises:
    SystemExit: after a word that all is well.
  """
  del validate_first
  trainer, data, config = loop._trainer, loop._data, loop._config
  metrics = jax.eval_shape(
    trainer._train_steps,
    trainer._state,
    trainer._settings,
    trainer._train_key,
    splits.stored_images(data.train),
    _batches(data.train, config.train.batch_size),
    1,
  )[1]
  sums = jax.eval_shape(
    trainer._eval_steps,
    trainer._state.variables,
    trainer._settings,
    trainer._eval_key,
    splits.stored_images(data.validation),
    _batches(
      data.validation,
      min(config.eval.batch_size, data.validation.num_examples),
    ),
    1,
    0,
    data.validation.num_examples,
  )
  assert metrics['loss'].shape == sums['loss'].shape == (1,)
  print(VALID)
  sys.exit()


def _batches(split, batch_size):
  topology = devices.current()
  shape = (topology.local_devices, 1, batch_size // topology.num_devices)
  if splits.stored_images(split) is not None:
    return jax.ShapeDtypeStruct(shape, np.int32)
  return jax.ShapeDtypeStruct((*shape, *split.image_shape), np.uint8)


def run(folder: pathlib.Path, argv: list[str]) -> None:
  """A case, in its own process; does not return."""
  code = 1
  try:
    os.chdir(folder)
    for name, number in (('stdout', 1), ('stderr', 2)):
      os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = argv
    # No state is made, as it may be large, but its shapes; there is none to be
    # restored.
    training.create_state = lambda model, optimizer, seed: (
      training.abstract_state(model, optimizer)
    )
    SingleRun.restore = lambda trainer, saved: [{}]
    training_loop.Loop.run = trace
    # Of CelebA's drive: nobody listens there.
    sources._CELEBA_DRIVE = ('127.0.0.1', 9)
    command_line.run(main.main)
    code = 0
  except SystemExit as error:
    code = {None: 0}.get(error.code, error.code)
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def main_loop(folder: pathlib.Path) -> None:
  """Runs all cases, as many at a time as there are cores."""
  assert not xla_bridge.backends_are_initialized()
  cases = json.loads((folder / 'cases.json').read_text())
  results, running = [None] * len(cases), {}
  pending = list(enumerate(cases))[::-1]

  def reap():
    for pid, (index, start) in list(running.items()):
      done, status, usage = os.wait4(pid, os.WNOHANG)
      seconds = time.monotonic() - start
      if not done and seconds > MAX_SECONDS:
        os.kill(pid, 9)
        done, status, usage = os.wait4(pid, 0)
      if done:
        del running[pid]
        where = folder / str(index)
        results[index] = {
          'code': os.waitstatus_to_exitcode(status),
          'seconds': seconds,
          'cpu_seconds': usage.ru_utime + usage.ru_stime,
          'gigabytes': usage.ru_maxrss / 1e6,
          **{
            name: (where / name).read_bytes().decode(errors='replace')
            for name in ('stdout', 'stderr')
          },
        }

  while pending or running:
    if pending and len(running) < (os.cpu_count() or 1):
      index, case = pending.pop()
      where = folder / str(index)
      where.mkdir()
      config = where / 'config.py'
      config.write_text(case['config'], errors='surrogateescape')
      argv = ['main.py', f'--config={config}', '--workdir=w', *case['argv']]
      start = time.monotonic()
      pid = os.fork()
      if not pid:
        run(where, argv)
      running[pid] = (index, start)
    else:
      time.sleep(0.002)
    reap()
  (folder / 'results.json').write_text(json.dumps(results))


if __name__ == '__main__':
  main_loop(pathlib.Path(sys.argv[1]))
