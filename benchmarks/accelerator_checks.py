"""Compares an accelerator's losses with a CPU's, and its bits with themselves.

  python benchmarks/accelerator_checks.py --output=checks.json

Losses: the network of configs/celeba.py is trained for twenty steps from the
same seed on the accelerator and on the CPU, whose convolutions have other code.
They may differ by rounding, in float64 by that of the draws, which are float32.
At the default precision a GPU rounds the factors of products to TF32, 11 bits,
and in bfloat16 all numbers to 8 bits. Steps amplify rounding, as Adam divides
by the gradient's own size: at the article's learning rate of 0.005 until losses
differ by percents in any precision. At 0.0001, which is used here, an error of
1e-7 in the draws is one of 6e-6 in the loss of the twentieth step, in float64
on a CPU.

Bits: on the accelerator, a run of `train.train_and_evaluate` is compared with
the same run again, with the images kept by the host, and with a run that was
stopped and goes on from its checkpoint in another process. All four end in the
same bits. Differences are relative, of the parameters (Euclidean norm). If any
bits differ, all is tried again with XLA's deterministic operations.

Each platform has a process of its own, and all run at the same time. Exits with
1 if a check fails.
"""

import argparse
from collections.abc import Mapping, Sequence
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

# Processes share the device's memory.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import end_to_end, jax_vae, results
from runs import progress
import train
from vae import numerics, splits
from vae.trainer import Trainer

# dtype and precision of products: largest relative difference of the loss at
# the first step, and at any.
_LIMITS = {
  ('float64', 'default'): (1e-9, 1e-4),
  ('float32', 'highest'): (1e-5, 5e-3),
  ('float32', 'default'): (1e-3, 2e-2),
  ('bfloat16', 'default'): (1e-2, 5e-2),
}
_LEARNING_RATE = 1e-4
_DETERMINISTIC = '--xla_gpu_deterministic_ops=true'


def main() -> None:
  """Makes the checks; prints tables, and writes JSON."""
  args = _arguments()
  if args.only:
    _CHILDREN[args.only](args)
    return
  content = {'settings': vars(args), 'losses': [], 'bits': [], 'failed': []}
  with tempfile.TemporaryDirectory(prefix='accelerator_checks_') as folder:
    platforms = {'cpu': {'JAX_PLATFORMS': 'cpu'}, 'accelerator': {}}
    processes = []
    for name, environment in platforms.items():
      own = pathlib.Path(folder, name)
      own.mkdir()
      processes.append(_start('losses', own, environment))

    def check_bits(flags):
      try:
        content['bits'] += _bits(folder, flags)
      except subprocess.CalledProcessError:
        content['failed'].append(f'bits {flags}')
      results.save(args.output, content)

    check_bits('')
    running = True
    while running:
      # Asked before reading, so that the rows of the end are read too.
      running = any(process.poll() is None for process in processes)
      content |= _losses(folder, platforms)
      results.save(args.output, content)
      time.sleep(1)
    if any(process.returncode for process in processes):
      content['failed'].append('losses')
    if not all(row['same'] for row in content['bits']):
      check_bits(_DETERMINISTIC)
  if content['machine'] is not None:
    print(results.describe(content['machine']), end='\n\n')
  print(tables(content))
  results.write(args.output, content)
  are_same = [row['same'] for row in content['bits'][-3:]]
  are_close = [row['passed'] for row in content['losses']]
  if content['failed'] or not all(are_same + are_close):
    sys.exit(1)


def compare(
  cpu: Mapping[str, Sequence[float]],
  accelerator: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
  """The rows of the table of losses that both platforms have.

  Args:
    cpu: the loss of each step, by dtype and precision of products.
    accelerator: likewise.
  """
  rows = []
  for (dtype, products), limits in _LIMITS.items():
    name = f'{dtype} {products}'
    if name not in cpu or name not in accelerator:
      continue
    expected, found = np.array(cpu[name]), np.array(accelerator[name])
    differences = np.abs(found / expected - 1)
    first, largest = float(differences[0]), float(differences.max())
    rows.append(
      {
        'dtype': dtype,
        'products': products,
        'first': first,
        'first_limit': limits[0],
        'largest': largest,
        'largest_limit': limits[1],
        # False for NaN.
        'passed': first <= limits[0] and largest <= limits[1],
        'losses': found.tolist(),
        'losses_of_cpu': expected.tolist(),
      }
    )
  return rows


def tables(content: dict[str, Any]) -> str:
  """Markdown of the JSON."""
  header = ['losses', 'products', 'first step', '', 'twenty steps', '', '']
  losses = [
    [
      row['dtype'],
      row['products'],
      *(f'{row["first"]:.1e}', f'≤ {row["first_limit"]:.0e}'),
      *(f'{row["largest"]:.1e}', f'≤ {row["largest_limit"]:.0e}'),
      'as the CPU' if row['passed'] else '**differs**',
    ]
    for row in content['losses']
  ]
  bits = [
    [
      f'{row["run"]}{row["flags"] and ", " + row["flags"]}',
      'same bits' if row['same'] else f'{row["difference"]:.1e}',
    ]
    for row in content['bits']
  ]
  parts = [
    results.table(header, losses),
    results.table(['a run, and', 'parameters'], bits),
    *(f'{name}: a process failed, see above.' for name in content['failed']),
  ]
  return '\n\n'.join(parts)


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  # For the processes that this one starts.
  parser.add_argument('--only', choices=_CHILDREN, help=argparse.SUPPRESS)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  return results.parse(parser)


def _start(
  only: str, folder: str | pathlib.Path, environment: Mapping[str, str]
) -> subprocess.Popen:
  """Starts a process that writes its files into the folder."""
  command = [sys.executable, __file__, *sys.argv[1:]]
  command += [f'--only={only}', f'--folder={folder}']
  return subprocess.Popen(
    command, stdout=sys.stderr, env=os.environ | environment
  )


def _losses(folder: str, platforms: Sequence[str]) -> dict[str, Any]:
  """`machine`, and the rows of `losses` so far."""
  cpu, accelerator = (
    json.loads(path.read_text()) if path.exists() else {'losses': {}}
    for path in (pathlib.Path(folder, p, 'losses.json') for p in platforms)
  )
  return {
    'machine': accelerator.get('machine'),
    'losses': compare(cpu['losses'], accelerator['losses']),
  }


def _bits(folder: str, flags: str) -> list[dict[str, Any]]:
  """The rows of the table of bits."""
  with tempfile.TemporaryDirectory(dir=folder) as own:
    # As in main.py, compiled programs are kept between processes.
    environment = {
      'XLA_FLAGS': results.xla_flags(flags),
      'JAX_COMPILATION_CACHE_DIR': f'{own}/compiled',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    for only in ('bits', 'resumed'):
      process = _start(only, own, environment)
      if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)
    states = {
      path.stem: np.load(path)['state']
      for path in pathlib.Path(own).glob('*.npz')
    }
  rows = []
  for name, run in {
    'again': 'the same run again',
    'host': 'images kept by the host',
    'resumed': 'stopped and resumed',
  }.items():
    difference = np.linalg.norm(states[name] - states['run'])
    rows.append(
      {
        'run': run,
        'flags': flags,
        'same': states[name].tobytes() == states['run'].tobytes(),
        'difference': float(difference / np.linalg.norm(states['run'])),
      }
    )
  return rows


# The processes.


def _config(args: argparse.Namespace):
  config = jax_vae.make_config(args.quick)
  config.train.num_epochs, config.train.steps_per_dispatch = 1, 5
  return config


def _images(config) -> splits.ArraySplit:
  """An epoch of twenty batches."""
  count = 20 * config.train.batch_size
  images = end_to_end.make_images(count, config.data.image_size, seed=0)
  return splits.ArraySplit(images)


def _train_losses(args: argparse.Namespace) -> None:
  """Writes the loss of each of twenty steps, for each row of `_LIMITS`."""
  content = {'machine': results.machine(), 'losses': {}}
  for dtype, products in _LIMITS:
    config = _config(args)
    config.model.dtype = dtype
    config.optimizer.learning_rate = _LEARNING_RATE
    split = _images(config)
    with numerics.fixed(dtype), jax.default_matmul_precision(products):
      trainer = Trainer(config, splits.DataSet(split, split, split))
      metrics = [trainer.train(c) for c in trainer.train_chunks(0, 0, 5)]
      losses = [trainer.by_run(m)['loss'][0] for m in metrics]
    content['losses'][f'{dtype} {products}'] = np.concatenate(losses).tolist()
    results.save(f'{args.folder}/losses.json', content)


def _train_runs(args: argparse.Namespace) -> None:
  """Trains a run, again, with images of the host, and a part of a fourth."""
  for name in ('run', 'again', 'host'):
    _train(args, name, name)
  _train(args, 'stopped', 'resumed', stop_after=2)


def _resume(args: argparse.Namespace) -> None:
  _train(args, 'resumed', 'resumed')


def _train(
  args: argparse.Namespace,
  name: str,
  workdir: str,
  stop_after: int | None = None,
) -> None:
  """Trains a run, or resumes it, and writes its parameters.

  Args:
    args: of the process.
    name: of the file; with `host`, the images are kept by the host.
    workdir: in the folder.
    stop_after: a number of dispatches.
  """
  config = _config(args)
  split = _images(config)
  if name != 'host':
    split = splits.DeviceSplit(split)
  dispatches = itertools.count(1)
  state = train.train_and_evaluate(
    config,
    pathlib.Path(args.folder, workdir),
    splits.DataSet(split, split, split),
    progress.Writer(),
    stop=lambda: next(dispatches) == stop_after,
  )
  leaves = jax.device_get(jax.tree.leaves(state.params))
  state = np.concatenate([leaf.ravel() for leaf in leaves])
  np.savez(pathlib.Path(args.folder, f'{name}.npz'), state=state)


_CHILDREN = {
  'losses': _train_losses,
  'bits': _train_runs,
  'resumed': _resume,
}

if __name__ == '__main__':
  main()
