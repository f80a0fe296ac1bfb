"""What training many β at once costs, beside one run.

  python benchmarks/population.py --output=population.json

The network of configs/celeba.py (batch 64, images of 64×64 that are stored on
the devices), one run as `train.py` trains it and populations of several sizes
as `sweep.py` does, measured in turns (rounds.py). A step of a population is a
step of each member.
"""

import argparse
import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from vae.single import SingleRun

from benchmarks import jax_vae
from benchmarks import results
from benchmarks import rounds
from configs import celeba
from vae import splits
from vae.population import Population


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  facts = results.machine()
  results.warn_of_other_work(facts)
  print(results.describe(facts), flush=True)
  contenders = [
    _contender(args, count, dtype)
    for dtype in args.dtypes
    for count in _counts(args)
  ]
  measured = [rounds.warm_up(c, args.seconds) for c in contenders]
  rounds.alternate(contenders, measured, args.rounds)
  rows = []
  for dtype in args.dtypes:
    of_dtype = [m for m in measured if m.dtype == dtype]
    rows += [_row(m, of_dtype[0], args.batch_size) for m in of_dtype]
  header = ['runs', 'dtype', 'ms per step', 'time of one run', 'images/s']
  lines = [
    [
      str(row['runs']),
      row['dtype'],
      results.significant(row['milliseconds_per_step']),
      f'{row["time_relative"]:.2f}',
      results.significant(row['images_per_second']),
    ]
    for row in rows
  ]
  print(results.table(header, lines))
  content = {'machine': facts, 'settings': vars(args), 'rows': rows}
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--runs', default='2,4,8', help='that train together, by commas (2,4,8)'
  )
  parser.add_argument(
    '--dtypes', default='float32', help='float32, bfloat16 (float32)'
  )
  parser.add_argument('--batch_size', type=int, default=64, help='(64)')
  rounds.add_flags(parser, num_rounds=5, seconds=2.0)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a tiny network, batch 8, one short round: whether it runs at all',
  )
  args = parser.parse_args()
  args.dtypes = args.dtypes.split(',')
  if args.quick:
    results.compile_quickly()
    args.runs, args.batch_size = '2', 8
    args.rounds, args.seconds = 1, 0.02
  return args


def _counts(args: argparse.Namespace) -> list[int]:
  """Numbers of runs; the first is one, that the others are compared with."""
  return [1, *map(int, args.runs.split(','))]


def _contender(
  args: argparse.Namespace, count: int, dtype: str
) -> rounds.Contender:
  """So many runs of different β, as a sweep trains them."""
  max_steps = jax_vae.steps_per_dispatch()
  configs = [celeba.get_config() for _ in range(count)]
  for index, config in enumerate(configs):
    config.objective.beta = 0.25 * 2**index
    config.model.dtype = dtype
    config.train.batch_size = args.batch_size
    if args.quick:
      config.data.image_size = 16
      config.model.hidden_channels = (4, 8)
  pixels = jax_vae.random_images(configs[0], args.batch_size, max_steps)
  split = splits.DeviceSplit(splits.ArraySplit(pixels))
  data = splits.DataSet(split, split, split)
  if count == 1:
    trainer = SingleRun(configs[0], data)
  else:
    trainer = Population(configs, data)

  def run(num_steps):
    while num_steps:
      # An epoch of the images is one dispatch.
      (chunk,) = trainer.train_chunks(0, 0, max_steps)
      chunk.num_batches = min(num_steps, chunk.num_batches)
      metrics = trainer.train(chunk)
      num_steps -= chunk.num_batches
    jax.block_until_ready(metrics)

  return rounds.Contender(str(count), args.batch_size * count, dtype, run)


def _row(
  measured: rounds.Measured, one: rounds.Measured, batch_size: int
) -> dict[str, object]:
  """What the table and the JSON say of a contender."""
  count = measured.batch_size // batch_size
  return {
    'runs': count,
    **dataclasses.asdict(measured),
    'milliseconds_per_step': measured.milliseconds,
    'images_per_second': measured.images_per_second,
    'time_relative': count / rounds.speedup(measured, one),
  }


if __name__ == '__main__':
  main()
