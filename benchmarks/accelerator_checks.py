"""Whether an accelerator computes what a CPU does, and the same bits twice.

  python benchmarks/accelerator_checks.py --output=checks.json

Losses: the network of configs/celeba.py is trained for twenty steps from the
same seed on the accelerator and on the CPU, which have other code for its
convolutions. They may differ by rounding. In float64 that hides no error; in
float32 with exact products (`highest`) the first step agrees to 1e-5, while
later ones drift apart, as Adam divides by the gradient's own size: on a CPU by
2e-3 in twenty steps if only the number of devices is another. At the default
precision a GPU rounds the factors of products to TF32, 11 bits, and in bfloat16
all numbers to 8 bits.

Bits: on the accelerator alone, a run of `train.train_and_evaluate` is compared
with the same run again, with one whose images are kept by the host, and with
one that was stopped and goes on from its checkpoint in another process. All
four end in the same bits if a run is a function of its config. Differences are
of the parameters, relative (Euclidean norm). If any bits differ the same is
tried once more with XLA's deterministic operations alone.

Each platform has a process of its own, and all run at the same time. Exits with
1 if a check fails.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
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
from vae.single import SingleRun

from benchmarks import end_to_end
from benchmarks import results
from configs import celeba
from runs import progress
import train
from vae import numerics
from vae import paths
from vae import splits

# dtype and precision of products: largest relative difference of the loss at
# the first step, and at any.
_LIMITS = {
  ('float64', 'default'): (1e-9, 1e-9),
  ('float32', 'highest'): (1e-5, 0.01),
  ('float32', 'default'): (1e-3, 0.05),
  ('bfloat16', 'default'): (1e-2, 0.05),
}
_DETERMINISTIC = '--xla_gpu_deterministic_ops=true'


def main() -> None:
  """Makes the checks; prints tables, and writes JSON."""
  args = _arguments()
  if args.only:
    _CHILDREN[args.only](args)
    return
  content = {'settings': vars(args), 'losses': [], 'bits': [], 'failed': {}}

  def check_bits(flags):
    try:
      content['bits'] += _bits(args, folder, flags)
    except subprocess.CalledProcessError:
      # The other check goes on.
      content['failed'][f'bits {flags}'] = 'a process failed, see above'
    results.save(args.output, content)

  with tempfile.TemporaryDirectory(prefix='accelerator_checks_') as folder:
    losses = _Losses(args, folder)
    check_bits('')
    while losses.is_running():
      time.sleep(1)
      content |= losses.so_far()
      results.save(args.output, content)
    content |= losses.so_far()
    if losses.is_failed():
      content['failed']['losses'] = 'a process failed, see above'
    if not all(row['same'] for row in content['bits']):
      check_bits(_DETERMINISTIC)
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
  """The rows of the table of losses.

  Args:
    cpu: the loss of each step, by dtype and precision of products.
    accelerator: likewise; what only one of them has is left out.
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
        # A loss that is not a number is no agreement.
        'passed': first <= limits[0] and largest <= limits[1],
        'losses': found.tolist(),
        'losses_of_cpu': expected.tolist(),
      }
    )
  return rows


def tables(content: dict[str, Any]) -> str:
  """Markdown of what was written as JSON."""
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
    *(f'{name}: {why}.' for name, why in content['failed'].items()),
  ]
  return '\n\n'.join(parts)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', help='JSON file for all that was found')
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a tiny network, batch 8: whether it runs at all',
  )
  # For the processes that this one starts.
  parser.add_argument('--only', choices=_CHILDREN, help=argparse.SUPPRESS)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.quick and not args.only:
    results.compile_quickly()
  return args


# What this process does.


def _start(
  args: argparse.Namespace, only: str, folder: str, **environment: str
) -> subprocess.Popen:
  """A process that leaves its files in the folder."""
  command = [sys.executable, __file__, f'--only={only}', f'--folder={folder}']
  command += ['--quick'] * args.quick
  return subprocess.Popen(
    command, stdout=sys.stderr, env=os.environ | environment
  )


def _wait(process: subprocess.Popen) -> None:
  if process.wait():
    raise subprocess.CalledProcessError(process.returncode, process.args)


class _Losses:
  """Both platforms' losses, computed at the same time."""

  def __init__(self, args: argparse.Namespace, folder: str):
    self._folders = [
      pathlib.Path(folder) / name for name in ('cpu', 'accelerator')
    ]
    for path in self._folders:
      path.mkdir()
    cpu, accelerator = map(str, self._folders)
    self._processes = [
      _start(args, 'losses', cpu, JAX_PLATFORMS='cpu'),
      _start(args, 'losses', accelerator),
    ]

  def is_running(self) -> bool:
    return None in [process.poll() for process in self._processes]

  def is_failed(self) -> bool:
    return any(process.poll() for process in self._processes)

  def so_far(self) -> dict[str, Any]:
    """`machine`, and the rows of `losses` that both platforms have."""
    cpu, accelerator = (
      json.loads(path.read_text()) if path.exists() else {}
      for path in (folder / 'losses.json' for folder in self._folders)
    )
    return {
      'machine': accelerator.get('machine'),
      'losses': compare(cpu, accelerator),
    }


def _bits(
  args: argparse.Namespace, folder: str, flags: str
) -> list[dict[str, Any]]:
  """The rows of the table of bits."""
  flags_of_all = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
  with tempfile.TemporaryDirectory(dir=folder) as own:
    # As main.py has it, programs are kept between processes.
    environment = {
      'XLA_FLAGS': flags_of_all,
      'JAX_COMPILATION_CACHE_DIR': f'{own}/compiled',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    for only in ('bits', 'resumed'):
      _wait(_start(args, only, own, **environment))
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


# What the processes do that it starts.


def _config(args: argparse.Namespace):
  config = celeba.get_config()
  if args.quick:
    config.data.image_size = 16
    config.model.latent_dim = 4
    config.model.hidden_channels = (4, 8)
    config.train.batch_size = 8
  config.train.num_epochs, config.train.steps_per_dispatch = 1, 5
  return config


def _images(config) -> splits.ArraySplit:
  """An epoch of twenty batches."""
  count = 20 * config.train.batch_size
  images = end_to_end.make_images(count, config.data.image_size, seed=0)
  return splits.ArraySplit(images)


def _train_losses(args: argparse.Namespace) -> None:
  """The loss of each of twenty steps, for each row of `_LIMITS`."""
  path = pathlib.Path(args.folder) / 'losses.json'
  losses = {'machine': results.machine()}
  for dtype, products in _LIMITS:
    config = _config(args)
    config.model.dtype = dtype
    split = _images(config)
    with (
      numerics.fixed(dtype),
      jax.default_matmul_precision(products),
    ):
      trainer = SingleRun(config, splits.DataSet(split, split, split))
      metrics = [trainer.train(c) for c in trainer.train_chunks(0, 0, 5)]
      of_steps = [trainer.by_run(m)['loss'][0] for m in metrics]
    losses[f'{dtype} {products}'] = np.concatenate(of_steps).tolist()
    paths.replace(path, json.dumps(losses).encode())


def _train_runs(args: argparse.Namespace) -> None:
  """A run, the same again, and with images of the host; and one to resume."""
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
  """Trains a run, or goes on with it, and leaves its parameters.

  Args:
    args: of the process.
    name: of the file; of `host`, the images are kept by the host.
    workdir: in the folder.
    stop_after: so many dispatches.
  """
  config = _config(args)
  split = _images(config)
  if name != 'host':
    split = splits.DeviceSplit(split)
  dispatches = itertools.count(1)
  state = train.train_and_evaluate(
    config,
    pathlib.Path(args.folder) / workdir,
    splits.DataSet(split, split, split),
    progress.NullWriter(),
    stop=lambda: next(dispatches) == stop_after,
  )
  leaves = jax.device_get(jax.tree.leaves(state.params))
  state = np.concatenate([leaf.ravel() for leaf in leaves])
  np.savez(pathlib.Path(args.folder) / f'{name}.npz', state=state)


_CHILDREN = {
  'losses': _train_losses,
  'bits': _train_runs,
  'resumed': _resume,
}

if __name__ == '__main__':
  main()
