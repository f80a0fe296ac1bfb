"""Training with and without XLA's command buffers, which are CUDA graphs.

  python benchmarks/command_buffers.py --output=command_buffers.json

A GPU is sent the kernels of a step one by one, or those that follow each other
as one graph. Here the network of configs/celeba.py is trained in dispatches, as
`train.py` makes them, with graphs as XLA has them by default, without any, and
with the loop over the steps of a dispatch in the graph too. XLA reads its flags
once, so each setting has a process of its own; they are measured in turns
(rounds.py). A setting that fails leaves the others alone.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys

# The processes share the device's memory.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import jax_vae
from benchmarks import results
from benchmarks import rounds
from configs import celeba
from vae import splits

# XLA's flag for each setting; the first is what the others are compared with.
_FLAG = '--xla_gpu_enable_command_buffer'
SETTINGS = {
  'default': '',
  'none': f'{_FLAG}=',
  'with the loop': f'{_FLAG}=+WHILE',
}


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  if args.serve:
    rounds.serve(_contender(args))
    return
  measured, failures = _measure(args)
  # Only now, so that the first process had the device for itself.
  facts = results.machine()
  rows = [_row(one, measured[0]) for one in measured]
  content = {
    'machine': facts,
    'settings': vars(args),
    'rows': rows,
    'failed': failures,
  }
  print(results.describe(facts), table(content), sep='\n\n')
  results.write(args.output, content)


def table(content: dict[str, object]) -> str:
  """Markdown of what was written as JSON."""
  header = ['command buffers', 'images/s', 'ms per step', 'times as fast']
  lines = [
    [
      row['name'],
      results.significant(row['images_per_second']),
      results.significant(row['milliseconds_per_step']),
      f'{row["speedup"]:.2f}',
    ]
    for row in content['rows']
  ]
  lines += [[name, why, '', ''] for name, why in content['failed'].items()]
  return results.table(header, lines)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--batch_size', type=int, default=64, help='(64)')
  parser.add_argument(
    '--dtype', default='bfloat16', help='float32, bfloat16 (bfloat16)'
  )
  rounds.add_flags(parser, num_rounds=5, seconds=1.0)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a tiny network, batch 8, one short round: whether it runs at all',
  )
  # For the processes that this one starts.
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.quick:
    results.compile_quickly()
    args.batch_size, args.rounds, args.seconds = 8, 1, 0.02
  return args


def _measure(
  args: argparse.Namespace,
) -> tuple[list[rounds.Measured], dict[str, str]]:
  """All settings that run; and why those failed that did."""
  contenders, measured, failures = [], [], {}
  with contextlib.ExitStack() as stack:
    for name, flag in SETTINGS.items():
      # One after the other: kernels are chosen by timing them.
      contender = stack.enter_context(_in_process(args, name, flag))
      try:
        measured.append(rounds.warm_up(contender, args.seconds))
        contenders.append(contender)
      except ChildProcessError as error:
        failures[name] = str(error)
    if not contenders:
      sys.exit('command_buffers: no setting runs, see above.')
    rounds.alternate(contenders, measured, args.rounds)
  return measured, failures


def _in_process(
  args: argparse.Namespace, name: str, flag: str
) -> contextlib.AbstractContextManager[rounds.Contender]:
  command = [sys.executable, __file__, '--serve', *['--quick'] * args.quick]
  command += [f'--batch_size={args.batch_size}', f'--dtype={args.dtype}']
  flags = f'{os.environ.get("XLA_FLAGS", "")} {flag}'
  return rounds.in_process(
    name, args.batch_size, args.dtype, command, {'XLA_FLAGS': flags}
  )


def _contender(args: argparse.Namespace) -> rounds.Contender:
  results.check_devices()
  config = celeba.get_config()
  config.model.dtype = args.dtype
  if args.quick:
    config.data.image_size = 16
    config.model.hidden_channels = (4, 8)
  max_steps = jax_vae.steps_per_dispatch()
  pixels = jax_vae.random_images(config, args.batch_size, max_steps)
  split = splits.DeviceSplit(splits.ArraySplit(pixels))
  return jax_vae.training_steps('', config, split, args.batch_size, max_steps)


def _row(
  measured: rounds.Measured, default: rounds.Measured
) -> dict[str, object]:
  """What the table and the JSON say of a setting."""
  return {
    **dataclasses.asdict(measured),
    'images_per_second': measured.images_per_second,
    'milliseconds_per_step': measured.milliseconds,
    'speedup': rounds.speedup(measured, default),
  }


if __name__ == '__main__':
  main()
