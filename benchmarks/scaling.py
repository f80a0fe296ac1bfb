"""The training step by batch, image, latent and number of devices.

  python benchmarks/scaling.py --output=scaling.json

Each table changes one setting of configs/celeba.py (batch 64, images of 64×64,
128 latent dimensions), and its rows are measured in turn (rounds.py). The
devices of the last table are virtual and share the cores of the machine, each
number of them in a process of its own: it shows the cost of dividing a batch,
not the gain of more devices.
"""

import argparse
import contextlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from benchmarks import jax_vae, results, rounds


def main() -> None:
  """Measures, prints a table for each setting, and writes JSON."""
  args = _arguments()
  config = jax_vae.make_config(args.quick)
  if args.serve:
    rounds.serve(jax_vae.training(str(jax.device_count()), config))
    return
  content = results.begin(args) | {'tables': {}}

  def measure(title, base, values, make):
    values = sorted({base, *values})
    with contextlib.ExitStack() as stack:
      contenders = [make(stack, value) for value in values]
      measured = rounds.measure(contenders, args)
    rows = [m.row(measured[values.index(base)]) for m in measured]
    content['tables'][title] = rows
    print(f'### {title}\n\n{_table(title, rows)}\n', flush=True)

  for title, key, values in (
    ('Batch size', 'train.batch_size', args.batch_sizes),
    ('Image size', 'data.image_size', args.image_sizes),
    ('Latent dimensions', 'model.latent_dim', args.latent_dims),
  ):

    def changed(_, value, key=key):
      own = config.copy_and_resolve_references()
      own.update_from_flattened_dict({key: value})
      return jax_vae.training(str(value), own)

    section, name = key.split('.')
    measure(title, config[section][name], values, changed)

  def on_devices(stack, count):
    flag = f'--xla_force_host_platform_device_count={count}'
    return stack.enter_context(
      rounds.in_process(
        str(count),
        config.train.batch_size,
        'float32',
        ['--quick'] * args.quick,
        {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': results.xla_flags(flag)},
      )
    )

  measure('Virtual devices', 1, args.device_counts, on_devices)
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  for flag, default, description in (
    ('--batch_sizes', '16,64,256,1024', 'separated by commas'),
    ('--image_sizes', '32,64,128', 'multiples of 32'),
    ('--latent_dims', '2,32,128,512', 'separated by commas'),
    ('--device_counts', '1,2,4,8', 'that divide the batch of 64'),
  ):
    parser.add_argument(
      flag,
      type=results.numbers,
      default=results.numbers(default),
      help=f'{description} ({default})',
    )
  rounds.add_flags(parser, num_rounds=5, seconds=2.0)
  # For the processes that this one starts.
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  return results.parse(
    parser,
    batch_sizes=[16],
    image_sizes=[32],
    latent_dims=[2],
    device_counts=[2],
    rounds=1,
    seconds=0.02,
  )


def _table(title: str, rows: list[dict[str, object]]) -> str:
  lines = [
    [
      row['name'],
      results.significant(row['images_per_second']),
      results.significant(row['milliseconds_per_step']),
      f'{row["speedup"]:.2f}',
    ]
    for row in rows
  ]
  header = [title, 'images/s', 'ms per step', 'images/s, relative']
  return results.table(header, lines)


if __name__ == '__main__':
  main()
