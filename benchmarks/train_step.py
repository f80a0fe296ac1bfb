"""Images a second of the training step, beside plain Flax and PyTorch.

  python benchmarks/train_step.py --output=train_step.json

The network is that of configs/celeba.py, the images are on the device, and all
take turns in one process (rounds.py). First it is shown that they compute the
same (same_network.py). On a GPU it is also told how close each comes to what
the memory allows (bandwidth.py).

float32 is that of each framework's default matrix products: on a GPU JAX uses
TF32 for it, and PyTorch where a variant says so, and for convolutions.
"""

import argparse
import dataclasses
import gc
import os
import pathlib
import sys

# JAX would take three quarters of a GPU's memory at once, and PyTorch needs
# some; read when JAX first asks for its devices.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from benchmarks import bandwidth
from benchmarks import jax_vae
from benchmarks import results
from benchmarks import rounds
from benchmarks import same_network
from configs import celeba
from vae import splits

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
  results.check_devices()
  on_gpu = jax.default_backend() == 'gpu'
  _check(args, on_gpu)
  config = celeba.get_config()
  if args.quick:
    config.data.image_size = 16
    config.model.latent_dim = 4
    config.model.hidden_channels = (4, 8)
  facts = results.machine()
  results.warn_of_other_work(facts)
  print(results.describe(facts), end='\n\n', flush=True)
  differences = same_network.check(config, with_torch=not args.without_torch)
  copied = 2**20 if args.quick else 2**30 if on_gpu else 2**28
  bytes_per_second = bandwidth.copy_bandwidth(copied)
  print(f'Memory is copied at {bytes_per_second / 1e9:,.1f} GB/s.', flush=True)

  content = {
    'machine': facts,
    'settings': vars(args),
    'differences': differences,
    'copy_bytes_per_second': bytes_per_second,
    'batch_sizes': {},
  }
  for batch_size in args.batch_sizes:
    measured, failures = _measure(args, config, batch_size, on_gpu)
    # The next batch size needs the memory.
    gc.collect()
    if not args.without_torch:
      torch_vae.release()
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
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--batch_sizes',
    type=lambda text: [int(number) for number in text.split(',')],
    default=[64, 256, 1024],
    help='separated by commas (64,256,1024)',
  )
  rounds.add_flags(parser, num_rounds=7, seconds=2.0)
  parser.add_argument(
    '--without_torch', action='store_true', help='only plain Flax beside it'
  )
  parser.add_argument(
    '--without_plain', action='store_true', help='only PyTorch beside it'
  )
  parser.add_argument(
    '--torch_variants',
    type=lambda text: text.split(','),
    help='separated by commas, each of words of torch_vae.py: '
    '"compiled,TF32 channels-last max-autotune compiled" (those of the '
    'platform)',
  )
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a tiny network, batch 8, one short round: whether it runs at all',
  )
  args = parser.parse_args()
  if args.quick:
    results.compile_quickly()
    args.batch_sizes, args.rounds, args.seconds = [8], 1, 0.02
    args.torch_variants = args.torch_variants or ['eager', 'channels-last']
  return args


def _check(args: argparse.Namespace, on_gpu: bool) -> None:
  """Ends with a line that says what to do, if something is missing."""
  message = None
  if jax.local_device_count() != 1:
    message = (
      f'JAX sees {jax.local_device_count()} devices, and PyTorch is to have as '
      'many: choose one, as with CUDA_VISIBLE_DEVICES=0.'
    )
  elif not args.without_torch:
    if torch_vae is None:
      message = (
        'There is no PyTorch: pip install -r benchmarks/requirements.txt, or '
        '--without_torch.'
      )
    elif on_gpu and not torch_vae.torch.cuda.is_available():
      message = (
        'PyTorch does not see the GPU: install its CUDA build, or '
        'JAX_PLATFORMS=cpu, or --without_torch.'
      )
    elif unknown := {
      word
      for variant in args.torch_variants or ()
      for word in variant.split()
      if word not in torch_vae.WORDS
    }:
      message = (
        f'--torch_variants: no {", ".join(sorted(unknown))}; there are '
        f'{", ".join(torch_vae.WORDS)}.'
      )
  if message:
    print(message, file=sys.stderr)
    sys.exit(2)


def _measure(
  args: argparse.Namespace, config, batch_size: int, on_gpu: bool
) -> tuple[list[rounds.Measured], dict[str, str]]:
  """All contenders at a batch size; and why those failed that did."""
  max_steps = jax_vae.steps_per_dispatch()
  pixels = jax_vae.random_images(config, batch_size, max_steps)
  split = splits.DeviceSplit(splits.ArraySplit(pixels))
  pixels = pixels[: jax_vae.NUM_BATCHES * batch_size]
  contenders, measured, failures = [], [], {}

  def enter(contender):
    measured.append(rounds.warm_up(contender, args.seconds))
    contenders.append(contender)
    print(
      f'{contender.name}: compiled after '
      f'{measured[-1].first_step_seconds:.1f} s.',
      file=sys.stderr,
    )

  for dtype in ('float32', 'bfloat16') if on_gpu else ('float32',):
    typed = config.copy_and_resolve_references()
    typed.model.dtype = dtype
    label = dtype
    if on_gpu and dtype == 'float32':
      label = 'float32 at default precision (TF32)'
    name = f'{_OURS}, {label}'
    enter(jax_vae.training_steps(name, typed, split, batch_size, max_steps))
    if not args.without_plain:
      enter(
        jax_vae.plain_steps(f'plain Flax, {label}', typed, pixels, batch_size)
      )
  if not args.without_torch:
    device = 'cuda' if on_gpu else 'cpu'
    default = torch_vae.GPU_VARIANTS if on_gpu else torch_vae.CPU_VARIANTS
    for variant in args.torch_variants or default:
      # The others go on without one that has no compiler, say.
      try:
        enter(
          torch_vae.contender(
            variant, device, config, pixels, jax_vae.NUM_BATCHES
          )
        )
      except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        failures[f'PyTorch, {variant}'] = lines[0]
  rounds.alternate(contenders, measured, args.rounds)
  return measured, failures


def _row(
  config,
  measured: rounds.Measured,
  everyone: list[rounds.Measured],
  bytes_per_second: float,
) -> dict[str, object]:
  """What the table and the JSON say of a contender."""
  row = dataclasses.asdict(measured)
  row['images_per_second'] = measured.images_per_second
  row['speedup_of'] = {
    ours.name: rounds.speedup(ours, measured)
    for ours in everyone
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
    f'{name.removeprefix(_OURS + ", ")} here: times as fast' for name in ours
  ]
  if on_gpu:
    header += ['of the bandwidth bound', 'of it, all fused']
  lines = []
  for row in rows:
    images_per_second = row['images_per_second']
    cells = [
      row['name'],
      results.significant(images_per_second),
      results.significant(1000 * row['batch_size'] / images_per_second),
      f'{row["first_step_seconds"]:.1f}',
      *(f'{row["speedup_of"][name]:.2f}' for name in ours),
    ]
    if on_gpu:
      cells += [f'{part:.0%}' for part in row['of_bandwidth_bound'].values()]
    lines.append(cells)
  return results.table(header, lines)


if __name__ == '__main__':
  main()
