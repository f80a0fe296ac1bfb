"""Runs of a sweep, beside a run by itself.

  python benchmarks/population.py --output=population.json

The network of configs/celeba.py in batches of 64, measured in turn (rounds.py):

  one run    as `train.py` trains it, on one device
  in turn    members of a sweep, of different β, one after another on one
             device: all share a compiled program, so that only the first waits
             for it
  N devices  a population with one member on each of N devices; on a CPU they
             are virtual, in a process of their own, and share its cores

A step of a population is a step of each member, and the time of a run is that
of its step: 1 is as fast as a run by itself.
"""

import argparse
import contextlib
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from benchmarks import jax_vae, results, rounds
from vae.population import Population


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  results.check_devices()
  if args.serve:
    rounds.serve(_together(args, jax.device_count()))
    return
  content = results.begin(args)
  with contextlib.ExitStack() as stack:
    contenders = []
    if jax.device_count() == 1:
      contenders += [_alone(args), _in_turn(args)]
    if jax.default_backend() == 'cpu':
      counts = args.device_counts
      contenders += [stack.enter_context(_virtual(args, n)) for n in counts]
    elif jax.device_count() > 1:
      contenders += [_together(args, n) for n in (1, jax.device_count())]
    measured = rounds.measure(contenders, args)
  content['rows'] = [one.row(measured[0]) for one in measured]
  header = ['', 'ms per step', 'time of a run', 'images/s', 'first step, s']
  lines = [
    [
      row['name'],
      results.significant(row['milliseconds_per_step']),
      f'{one.milliseconds / measured[0].milliseconds:.2f}',
      results.significant(row['images_per_second']),
      f'{row["first_step_seconds"]:.1f}',
    ]
    for one, row in zip(measured, content['rows'], strict=True)
  ]
  print(results.table(header, lines))
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument(
    '--members', type=int, default=4, help='one after another (4)'
  )
  parser.add_argument(
    '--device_counts',
    type=results.numbers,
    default=[2, 4],
    help='of virtual devices, separated by commas (2,4)',
  )
  parser.add_argument(
    '--dtype', default='float32', help='float32, bfloat16 (float32)'
  )
  rounds.add_flags(parser, num_rounds=5, seconds=2.0)
  # For the processes that this one starts.
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  return results.parse(
    parser, members=2, device_counts=[2], rounds=1, seconds=0.02
  )


def _configs(args: argparse.Namespace, count: int) -> list:
  configs = [jax_vae.make_config(args.quick) for _ in range(count)]
  for index, config in enumerate(configs):
    config.objective.beta = 0.25 * 2**index
    config.model.dtype = args.dtype
  return configs


def _alone(args: argparse.Namespace) -> rounds.Contender:
  (config,) = _configs(args, 1)
  return jax_vae.training('one run', config)


def _in_turn(args: argparse.Namespace) -> rounds.Contender:
  """Members that take turns, one for each call; the first call has them all.

  The seconds of its first step are those of the members after the first.
  """
  max_steps = jax_vae.steps_per_dispatch()
  configs = _configs(args, args.members)
  data = jax_vae.make_data(configs[0], max_steps)
  first, *others = (
    jax_vae.dispatches(Population([config], data), max_steps)
    for config in configs
  )
  start = time.perf_counter()
  first(1)
  print(
    f'in turn: first step of the first member {time.perf_counter() - start:.1f}'
    ' s',
    file=sys.stderr,
  )
  members = [first, *others]

  def run(num_steps):
    members.append(members.pop(0))
    members[0](num_steps)

  batch_size = configs[0].train.batch_size
  return rounds.Contender(
    f'in turn, {args.members}', batch_size, args.dtype, run
  )


def _together(args: argparse.Namespace, count: int) -> rounds.Contender:
  max_steps = jax_vae.steps_per_dispatch()
  configs = _configs(args, count)
  population = Population(configs, jax_vae.make_data(configs[0], max_steps))
  return rounds.Contender(
    f'{count} devices',
    count * configs[0].train.batch_size,
    args.dtype,
    jax_vae.dispatches(population, max_steps),
  )


def _virtual(
  args: argparse.Namespace, count: int
) -> contextlib.AbstractContextManager[rounds.Contender]:
  flag = f'--xla_force_host_platform_device_count={count}'
  batch_size = jax_vae.make_config(args.quick).train.batch_size
  return rounds.in_process(
    f'{count} devices',
    count * batch_size,
    args.dtype,
    ['--quick'] * args.quick + [f'--dtype={args.dtype}'],
    {'XLA_FLAGS': results.xla_flags(flag)},
  )


if __name__ == '__main__':
  main()
