"""What saving costs the loop.

  python benchmarks/checkpoints.py --output=checkpoints.json

The networks of the configs, with their batch, trained in dispatches as
`train.py` makes them; the same with a checkpoint after each dispatch, written
and read back; measured in turns (rounds.py). The difference is what a
checkpoint costs, and its share is that of one for every
`checkpoint.every_minutes`. Then the last one is read back alone, in time and in
processor time, which other work on the machine does not change.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from vae.single import SingleRun

from benchmarks import jax_vae
from benchmarks import results
from benchmarks import rounds
from configs import celeba
from configs import faces
from vae import model as models
from vae import optimizers
from vae import splits
from vae import training
from vae.checkpoints import Checkpoints
from vae.checkpoints import CheckpointWriter

_CONFIGS = {'faces': faces, 'celeba': celeba}


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  facts = results.machine()
  results.warn_of_other_work(facts)
  print(results.describe(facts), flush=True)
  rows = [_measure(name, args) for name in _CONFIGS]
  header = [
    'config',
    'ms per step',
    'ms per checkpoint',
    'share of the loop',
    'ms to read back',
    'processor ms',
    'share of a processor',
  ]
  lines = [
    [
      row['config'],
      results.significant(row['milliseconds_per_step']),
      results.significant(row['milliseconds_per_checkpoint']),
      f'{row["share"]:.3%}',
      results.significant(row['milliseconds_to_read_back']),
      results.significant(row['processor_milliseconds_to_read_back']),
      f'{row["read_back_share"]:.3%}',
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
    '--folder', help='where checkpoints go; by default a temporary folder'
  )
  rounds.add_flags(parser, num_rounds=7, seconds=4.0)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='tiny networks, one short round: whether it runs at all',
  )
  args = parser.parse_args()
  if args.quick:
    results.compile_quickly()
    args.rounds, args.seconds = 1, 0.02
  return args


def _measure(name: str, args: argparse.Namespace) -> dict[str, object]:
  """What the table and the JSON say of a config."""
  config = _CONFIGS[name].get_config()
  if args.quick:
    config.data.image_size = 16
    config.model.hidden_channels = (4, 8)
    config.train.batch_size = 8
  max_steps = jax_vae.steps_per_dispatch()
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    with CheckpointWriter(folder) as writer:
      contenders = [
        _contender(config, max_steps, None),
        _contender(config, max_steps, writer),
      ]
      measured = [rounds.warm_up(c, args.seconds) for c in contenders]
      for one in measured:
        # Whole dispatches, so that each has its checkpoint.
        one.steps_per_round += -one.steps_per_round % max_steps
      rounds.alternate(contenders, measured, args.rounds)
    read_back, of_processors = _time_reading(config, folder, args.rounds)
  seconds = np.array(measured[1].step_seconds) - measured[0].step_seconds
  cost = float(np.median(seconds)) * max_steps
  return {
    'config': name,
    'milliseconds_per_step': measured[0].milliseconds,
    'milliseconds_per_checkpoint': 1000 * cost,
    'share': cost / (60 * config.checkpoint.every_minutes),
    'milliseconds_to_read_back': 1000 * read_back,
    'processor_milliseconds_to_read_back': 1000 * of_processors,
    'read_back_share': of_processors / (60 * config.checkpoint.every_minutes),
  }


def _time_reading(config, folder: str, num_rounds: int) -> tuple[float, float]:
  """Reads the last checkpoint back, as its writer does.

  Returns:
    Seconds, and seconds of all processors; medians.
  """
  saved = Checkpoints(folder)
  step = saved.latest_step()
  model = models.from_config(config)
  state = training.abstract_state(model, optimizers.Optimizer())
  seconds = []
  for _ in range(num_rounds):
    start = time.perf_counter(), time.process_time()
    saved.restore(state, step)
    end = time.perf_counter(), time.process_time()
    seconds.append(np.subtract(end, start))
  return tuple(np.median(seconds, axis=0).tolist())


def _contender(
  config, max_steps: int, writer: CheckpointWriter | None
) -> rounds.Contender:
  pixels = jax_vae.random_images(config, config.train.batch_size, max_steps)
  split = splits.DeviceSplit(splits.ArraySplit(pixels))
  trainer = SingleRun(config, splits.DataSet(split, split, split))
  numbers = itertools.count(1)

  def run(num_steps):
    while num_steps > 0:
      # An epoch of the images is one dispatch.
      (chunk,) = trainer.train_chunks(0, 0, max_steps)
      chunk.num_batches = min(num_steps, chunk.num_batches)
      metrics = trainer.train(chunk)
      num_steps -= chunk.num_batches
      if writer is not None:
        (state,) = trainer.states(trainer.snapshot())
        writer.save(next(numbers), state)
    jax.block_until_ready(metrics)
    if writer is not None:
      writer.finish()

  label = 'plain' if writer is None else 'saving'
  dtype = config.model.dtype
  return rounds.Contender(label, config.train.batch_size, dtype, run)


if __name__ == '__main__':
  main()
