"""What a training step costs, by batch, image, latent and number of devices.

  python benchmarks/scaling.py --output=scaling.json

Each table changes one thing of configs/celeba.py (batch 64, images of 64×64,
128 latent dimensions), and its rows are measured in turns (rounds.py). The
devices of the last are virtual ones that share the cores of the machine, each
number of them in a process of its own: what it tells is what dividing a batch
costs, not what more devices gain.
"""

import argparse
from collections.abc import Sequence
import contextlib
import dataclasses
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from benchmarks import jax_vae
from benchmarks import results
from benchmarks import rounds
from configs import celeba
from vae import splits

# Of configs/celeba.py: what the others are compared with.
_BATCH_SIZE, _IMAGE_SIZE, _LATENT_DIM, _DEVICES = 64, 64, 128, 1


def main() -> None:
  """Measures, prints a table for each thing, and writes JSON."""
  args = _arguments()
  if args.serve:
    rounds.serve(_contender(args, str(jax.device_count())))
    return
  facts = results.machine()
  results.warn_of_other_work(facts)
  print(results.describe(facts), flush=True)
  content = {'machine': facts, 'settings': vars(args), 'tables': {}}

  def tell(title, values, baseline, contenders):
    measured = [rounds.warm_up(c, args.seconds) for c in contenders]
    rounds.alternate(contenders, measured, args.rounds)
    base = measured[list(values).index(baseline)]
    rows = [_row(m, base) for m in measured]
    content['tables'][title] = rows
    print(f'\n### {title}\n\n{_table(title, rows)}', flush=True)

  values = _with(args.batch_sizes, args.batch_size)
  contenders = [_contender(args, str(n), batch_size=n) for n in values]
  tell('Batch size', values, args.batch_size, contenders)

  values = _with(args.image_sizes, args.image_size)
  contenders = [_contender(args, f'{n}×{n}', image_size=n) for n in values]
  tell('Image size', values, args.image_size, contenders)

  values = _with(args.latent_dims, _LATENT_DIM)
  contenders = [_contender(args, str(n), latent_dim=n) for n in values]
  tell('Latent dimensions', values, _LATENT_DIM, contenders)

  values = _with(args.device_counts, _DEVICES)
  with contextlib.ExitStack() as stack:
    contenders = [stack.enter_context(_on_devices(args, n)) for n in values]
    tell('Virtual devices', values, _DEVICES, contenders)
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )

  def numbers(name, default, description):
    text = ','.join(str(number) for number in default)
    parser.add_argument(
      name,
      type=lambda text: [int(number) for number in text.split(',')],
      default=default,
      help=f'{description} ({text})',
    )

  numbers('--batch_sizes', [16, 64, 256, 1024], 'separated by commas')
  numbers('--image_sizes', [32, 64, 128], 'multiples of 32')
  numbers('--latent_dims', [2, 32, 128, 512], 'separated by commas')
  numbers('--device_counts', [1, 2, 4, 8], 'that divide the batch of 64')
  rounds.add_flags(parser, num_rounds=5, seconds=2.0)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a tiny network, batch 8, one short round: whether it runs at all',
  )
  # What this script calls itself with, for a number of devices.
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.batch_size, args.image_size = _BATCH_SIZE, _IMAGE_SIZE
  if args.quick:
    results.compile_quickly()
    args.batch_size, args.image_size = 8, 16
    args.batch_sizes, args.image_sizes = [16], [32]
    args.latent_dims, args.device_counts = [2], [2]
    args.rounds, args.seconds = 1, 0.02
  return args


def _with(values: Sequence[int], baseline: int) -> list[int]:
  return sorted({*values, baseline})


def _contender(
  args: argparse.Namespace,
  name: str,
  batch_size: int | None = None,
  image_size: int | None = None,
  latent_dim: int = _LATENT_DIM,
) -> rounds.Contender:
  """The training step with what is named changed, on all devices."""
  config = celeba.get_config()
  config.data.image_size = image_size or args.image_size
  config.model.latent_dim = latent_dim
  if args.quick:
    config.model.hidden_channels = (4, 8)
  batch_size = batch_size or args.batch_size
  max_steps = jax_vae.steps_per_dispatch()
  pixels = jax_vae.random_images(config, batch_size, max_steps)
  split = splits.DeviceSplit(splits.ArraySplit(pixels))
  return jax_vae.training_steps(name, config, split, batch_size, max_steps)


def _on_devices(
  args: argparse.Namespace, count: int
) -> contextlib.AbstractContextManager[rounds.Contender]:
  """A contender in a process that has so many virtual devices."""
  flags = os.environ.get('XLA_FLAGS', '')
  flags += f' --xla_force_host_platform_device_count={count}'
  return rounds.in_process(
    str(count),
    args.batch_size,
    'float32',
    [sys.executable, __file__, '--serve', *['--quick'] * args.quick],
    {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
  )


def _row(
  measured: rounds.Measured, baseline: rounds.Measured
) -> dict[str, object]:
  """What the table and the JSON say of a contender."""
  row = dataclasses.asdict(measured)
  row['images_per_second'] = measured.images_per_second
  row['milliseconds_per_step'] = measured.milliseconds
  row['images_per_second_relative'] = rounds.speedup(measured, baseline)
  return row


def _table(title: str, rows: list[dict[str, object]]) -> str:
  header = [title, 'images/s', 'ms per step', 'images/s, relative']
  lines = [
    [
      row['name'],
      results.significant(row['images_per_second']),
      results.significant(row['milliseconds_per_step']),
      f'{row["images_per_second_relative"]:.2f}',
    ]
    for row in rows
  ]
  return results.table(header, lines)


if __name__ == '__main__':
  main()
