"""Images per second of the training step, beside plain Flax and PyTorch.

  python benchmarks/train_step.py --output=train_step.json

The network is that of configs/celeba.py, the images are on the device, and the
contenders take turns (rounds.py), PyTorch's in processes of their own, after a
check that they compute the same (same_network.py). On a GPU the table has their
share of the memory's bound (bandwidth.py), too.

float32 is that of each framework's default matrix products: on a GPU JAX uses
TF32 for it; PyTorch does in convolutions, and in variants that name it.
"""

import argparse
import contextlib
import gc
import os
import pathlib
import sys

# JAX would take three quarters of a GPU's memory at once, and PyTorch needs
# some; read when JAX first asks for its devices.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from benchmarks import bandwidth, jax_vae, results, rounds, same_network

try:
  from benchmarks import torch_vae
except ModuleNotFoundError as error:
  if error.name != 'torch':
    raise
  torch_vae = None

_OURS = 'this codebase'


def main() -> None:
  """Measures, prints a table for each batch size, and writes JSON."""
  args = _arguments()
  if args.serve:
    config = jax_vae.make_config(args.quick)
    (config.train.batch_size,) = args.batch_sizes
    rounds.serve(torch_vae.contender(args.variant, args.device, config))
    return
  results.check_devices()
  on_gpu = jax.default_backend() == 'gpu'
  _check(args, on_gpu)
  config = jax_vae.make_config(args.quick)
  content = results.begin(args)
  differences = same_network.check(config, with_torch=not args.without_torch)
  copied = 2**20 if args.quick else 2**30 if on_gpu else 2**28
  bytes_per_second = bandwidth.copy_bandwidth(copied)
  print(f'Memory is copied at {bytes_per_second / 1e9:,.1f} GB/s.', flush=True)
  content |= {
    'differences': differences,
    'copy_bytes_per_second': bytes_per_second,
    'batch_sizes': {},
  }
  for batch_size in args.batch_sizes:
    config.train.batch_size = batch_size
    with contextlib.ExitStack() as stack:
      measured, failures = _measure(stack, args, config, on_gpu)
    gc.collect()  # The next batch size needs the memory.
    rows = [_row(config, m, measured, bytes_per_second) for m in measured]
    content['batch_sizes'][batch_size] = {
      'contenders': rows,
      'failed': failures,
    }
    print(f'\n### Batch size {batch_size}\n\n{_table(rows, on_gpu)}')
    for name, message in failures.items():
      print(f'\n{name} failed: {message}')
    sys.stdout.flush()
    results.save(args.output, content)
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument(
    '--batch_sizes',
    type=results.numbers,
    default=[64, 256, 1024],
    help='separated by commas (64,256,1024)',
  )
  rounds.add_flags(parser, num_rounds=7, seconds=2.0)
  parser.add_argument(
    '--without_torch', action='store_true', help='leave PyTorch out'
  )
  parser.add_argument(
    '--without_plain', action='store_true', help='leave plain Flax out'
  )
  parser.add_argument(
    '--torch_variants',
    type=lambda text: text.split(','),
    help='separated by commas, each of words of torch_vae.py, such as '
    '"eager,TF32 channels-last compiled" (those of the platform)',
  )
  # For the processes that this one starts.
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  parser.add_argument('--variant', help=argparse.SUPPRESS)
  parser.add_argument('--device', help=argparse.SUPPRESS)
  return results.parse(
    parser,
    batch_sizes=[8],
    rounds=1,
    seconds=0.02,
    torch_variants=['eager', 'channels-last'],
  )


def _check(args: argparse.Namespace, on_gpu: bool) -> None:
  """Exits with 2 and a line on standard error if something is missing."""
  message = None
  if jax.local_device_count() != 1:
    message = (
      f'JAX has {jax.local_device_count()} devices, PyTorch uses one; choose '
      'one, as with CUDA_VISIBLE_DEVICES=0.'
    )
  elif not args.without_torch:
    words = {w for v in args.torch_variants or () for w in v.split()}
    if torch_vae is None:
      message = (
        'PyTorch is not installed; pip install -r benchmarks/requirements.txt, '
        'or add --without_torch.'
      )
    elif on_gpu and not torch_vae.torch.cuda.is_available():
      message = (
        'PyTorch does not see the GPU; install its CUDA build, or set '
        'JAX_PLATFORMS=cpu, or add --without_torch.'
      )
    elif unknown := words - set(torch_vae.WORDS):
      message = (
        f'--torch_variants has {", ".join(sorted(unknown))}; its words are '
        f'{", ".join(torch_vae.WORDS)}.'
      )
  if message:
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def _measure(
  stack: contextlib.ExitStack, args: argparse.Namespace, config, on_gpu: bool
) -> tuple[list[rounds.Measured], dict[str, str]]:
  """All contenders at a batch size, and the errors of those that failed."""
  contenders, measured, failures = [], [], {}

  def enter(contender):
    measured.append(rounds.warm_up(contender, args.seconds))
    contenders.append(contender)
    seconds = measured[-1].first_step_seconds
    print(f'{contender.name}: first step {seconds:.1f} s', file=sys.stderr)

  for dtype in ('float32', 'bfloat16') if on_gpu else ('float32',):
    typed = config.copy_and_resolve_references()
    typed.model.dtype = dtype
    label = dtype
    if on_gpu and dtype == 'float32':
      label = 'float32 at default precision (TF32)'
    enter(jax_vae.training(f'{_OURS}, {label}', typed))
    if not args.without_plain:
      enter(jax_vae.plain(f'plain Flax, {label}', typed))
  if not args.without_torch:
    default = torch_vae.GPU_VARIANTS if on_gpu else torch_vae.CPU_VARIANTS
    for variant in args.torch_variants or default:
      # A process with CUDA graphs of both JAX and PyTorch crashes. And PyTorch
      # stops compiling the same lines, silently, after a few batch sizes.
      name = f'PyTorch, {variant}'
      contender = rounds.in_process(
        name,
        config.train.batch_size,
        'bfloat16' if 'bf16' in variant.split() else 'float32',
        [
          *['--quick'] * args.quick,
          f'--batch_sizes={config.train.batch_size}',
          f'--variant={variant}',
          f'--device={"cuda" if on_gpu else "cpu"}',
        ],
        {},
      )
      # A variant may lack its compiler; the others are measured all the same.
      try:
        enter(stack.enter_context(contender))
      except ChildProcessError as error:
        failures[name] = str(error)
  rounds.alternate(contenders, measured, args.rounds)
  return measured, failures


def _row(
  config,
  measured: rounds.Measured,
  others: list[rounds.Measured],
  bytes_per_second: float,
) -> dict[str, object]:
  """A contender's row of the table, as JSON."""
  row = measured.row(measured)
  del row['speedup']
  row['speedup_of'] = {
    ours.name: rounds.speedup(ours, measured)
    for ours in others
    if ours.name.startswith(_OURS)
  }
  row['of_bandwidth_bound'] = {}
  for name, fused in (('separate', False), ('fused', True)):
    moved = bandwidth.minimum_bytes(
      config, measured.batch_size, measured.dtype, fused
    )
    bound = moved / bytes_per_second
    row['of_bandwidth_bound'][name] = 1000 * bound / measured.milliseconds
  return row


def _table(rows: list[dict[str, object]], on_gpu: bool) -> str:
  ours = list(rows[0]['speedup_of'])
  header = ['', 'images/s', 'ms per step', 'first step, s']
  header += [
    f'times as fast: {name.removeprefix(_OURS + ", ")} here' for name in ours
  ]
  if on_gpu:
    header += ['of the bandwidth bound', 'of it, all fused']
  lines = []
  for row in rows:
    cells = [
      row['name'],
      results.significant(row['images_per_second']),
      results.significant(row['milliseconds_per_step']),
      f'{row["first_step_seconds"]:.1f}',
      *(f'{row["speedup_of"][name]:.2f}' for name in ours),
    ]
    if on_gpu:
      cells += [f'{part:.0%}' for part in row['of_bandwidth_bound'].values()]
    lines.append(cells)
  return results.table(header, lines)


if __name__ == '__main__':
  main()
