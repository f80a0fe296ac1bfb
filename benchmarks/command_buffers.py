"""Training with and without XLA's command buffers, which are CUDA graphs.

  python benchmarks/command_buffers.py --output=command_buffers.json

A GPU gets the kernels of a step one by one, or consecutive ones as one graph.
The network of configs/celeba.py is trained in dispatches, as `train.py` makes
them, with XLA's default graphs, without graphs, and with the loop over the
steps of a dispatch in the graph too. XLA reads its flags once, so each setting
has a process of its own; they are measured in turn (rounds.py). The others are
measured all the same if a setting fails.
"""

import argparse
import contextlib
import os
import pathlib
import sys

# The processes share the device's memory.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import jax_vae, results, rounds

# XLA's flag for each setting; the others are compared with the first.
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
    results.check_devices()
    config = jax_vae.make_config(args.quick)
    config.model.dtype = args.dtype
    config.train.batch_size = args.batch_size
    rounds.serve(jax_vae.training('', config))
    return
  measured, failures = _measure(args)
  # Only now, so that the first process had the device for itself.
  content = results.begin(args)
  rows = [one.row(measured[0]) for one in measured]
  lines = [
    [
      row['name'],
      results.significant(row['images_per_second']),
      results.significant(row['milliseconds_per_step']),
      f'{row["speedup"]:.2f}',
    ]
    for row in rows
  ]
  lines += [[name, why, '', ''] for name, why in failures.items()]
  header = ['command buffers', 'images/s', 'ms per step', 'times as fast']
  print(results.table(header, lines))
  results.write(args.output, content | {'rows': rows, 'failed': failures})


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument('--batch_size', type=int, default=64, help='(64)')
  parser.add_argument(
    '--dtype', default='bfloat16', help='float32, bfloat16 (bfloat16)'
  )
  rounds.add_flags(parser, num_rounds=5, seconds=1.0)
  # For the processes that this one starts.
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  return results.parse(parser, batch_size=8, rounds=1, seconds=0.02)


def _measure(
  args: argparse.Namespace,
) -> tuple[list[rounds.Measured], dict[str, str]]:
  """All settings that run, and the errors of those that failed."""
  flags = [f'--batch_size={args.batch_size}', f'--dtype={args.dtype}']
  flags += ['--quick'] * args.quick
  contenders, measured, failures = [], [], {}
  with contextlib.ExitStack() as stack:
    for name, flag in SETTINGS.items():
      # One after the other, as XLA chooses kernels by timing them.
      contender = stack.enter_context(
        rounds.in_process(
          name,
          args.batch_size,
          args.dtype,
          flags,
          {'XLA_FLAGS': results.xla_flags(flag)},
        )
      )
      try:
        measured.append(rounds.warm_up(contender, args.seconds))
        contenders.append(contender)
      except ChildProcessError as error:
        failures[name] = str(error)
    if not contenders:
      sys.exit('error: no setting of the command buffers runs, see above.')
    rounds.alternate(contenders, measured, args.rounds)
  return measured, failures


if __name__ == '__main__':
  main()
