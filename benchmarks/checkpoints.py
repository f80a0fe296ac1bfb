"""The cost of checkpoints for the training loop.

  python benchmarks/checkpoints.py --output=checkpoints.json

The networks of the configs, trained in dispatches as `train.py` makes them,
without checkpoints and with one after each dispatch, written and read back;
measured in turn (rounds.py). The difference is the cost of a checkpoint, and
its share is that of one every `checkpoint.every_minutes`.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import jax_vae, results, rounds
from configs import celeba, faces
from vae.checkpoints import CheckpointWriter
from vae.trainer import Trainer

_CONFIGS = {'faces': faces, 'celeba': celeba}


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  content = results.begin(args)
  rows = [_measure(name, args) for name in _CONFIGS]
  lines = [
    [
      row['config'],
      results.significant(row['milliseconds_per_step']),
      results.significant(row['milliseconds_per_checkpoint']),
      f'{row["share"]:.3%}',
    ]
    for row in rows
  ]
  header = ['config', 'ms per step', 'ms per checkpoint', 'share of the loop']
  print(results.table(header, lines))
  results.write(args.output, content | {'rows': rows})


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument(
    '--folder', help='of the checkpoints; by default a temporary folder'
  )
  rounds.add_flags(parser, num_rounds=7, seconds=4.0)
  return results.parse(parser, rounds=1, seconds=0.02)


def _measure(name: str, args: argparse.Namespace) -> dict[str, object]:
  """A config's row of the table, as JSON."""
  config = _CONFIGS[name].get_config()
  if args.quick:
    config.update(jax_vae.make_config(quick=True))
  max_steps = jax_vae.steps_per_dispatch()
  with (
    tempfile.TemporaryDirectory(dir=args.folder) as folder,
    CheckpointWriter(folder) as writer,
  ):
    contenders = [
      _contender(config, max_steps, None),
      _contender(config, max_steps, writer),
    ]
    measured = [rounds.warm_up(c, args.seconds) for c in contenders]
    for one in measured:
      # Whole dispatches, so that each has its checkpoint.
      one.steps_per_round += -one.steps_per_round % max_steps
    rounds.alternate(contenders, measured, args.rounds)
  seconds = np.subtract(measured[1].step_seconds, measured[0].step_seconds)
  cost = float(np.median(seconds)) * max_steps
  return {
    'config': name,
    'milliseconds_per_step': measured[0].milliseconds,
    'milliseconds_per_checkpoint': 1000 * cost,
    'share': cost / (60 * config.checkpoint.every_minutes),
    'rounds': [one.step_seconds for one in measured],
  }


def _contender(
  config, max_steps: int, writer: CheckpointWriter | None
) -> rounds.Contender:
  trainer = Trainer(config, jax_vae.make_data(config, max_steps))
  numbers = itertools.count(1)

  def save():
    (state,) = trainer.states(trainer.snapshot())
    writer.save(next(numbers), state)

  train = jax_vae.dispatches(trainer, max_steps, writer and save)

  def run(num_steps):
    train(num_steps)
    if writer is not None:
      writer.finish()

  return rounds.Contender(
    'saving' if writer else 'plain',
    config.train.batch_size,
    config.model.dtype,
    run,
  )


if __name__ == '__main__':
  main()
