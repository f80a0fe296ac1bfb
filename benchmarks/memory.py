"""Memory of a training process: its peak, and whether it grows.

  python benchmarks/memory.py --output=memory.json

Peak: the training step of configs/celeba.py at one batch size, this codebase's
and PyTorch's, each in a process of its own, with a few batches of noise. The
highest resident memory that Linux counted (VmHWM), and what the process had
before it made its network.

Growth: main.py trains the same network on a folder of made-up images, with a
validation, pictures and a checkpoint at each epoch, and its resident memory is
read at each validation's line.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import PIL.Image

from benchmarks import end_to_end, jax_vae, results
from vae.trainer import Trainer

_OURS = 'this codebase'
_VARIANTS = _OURS, 'eager', 'channels-last', 'compiled'
_STEPS = 3
# Images of an epoch, and of the validation.
_NUM_IMAGES = 640, 64
_FIRST_EPOCH = 5


def main() -> None:
  """Measures, prints tables, and writes JSON."""
  args = _arguments()
  if args.variant:
    print(json.dumps(_train(args)))
    return
  content = results.begin(args)
  variants = _VARIANTS[: 1 if args.without_torch else None]
  peaks = {variant: _in_process(variant, args) for variant in variants}
  rows = [
    [
      name if name == _OURS else f'PyTorch, {name}',
      *(f'{found[key]:,.0f}' for key in ('before', 'peak')),
      f'{found["peak"] / peaks[_OURS]["peak"]:.2f}',
    ]
    for name, found in peaks.items()
  ]
  print(f'Batches of {args.batch_size}:\n')
  print(results.table(['', 'MB before', 'MB at most', 'of ours'], rows))
  memory = _soak(args)
  first, last = memory[min(_FIRST_EPOCH, len(memory)) - 1], memory[-1]
  print(
    f'\nMemory at epoch {_FIRST_EPOCH}: {first:,.0f} MB, at epoch '
    f'{len(memory)}: {last:,.0f} MB ({last / first - 1:+.2%}).'
  )
  results.write(args.output, content | {'peaks': peaks, 'epochs': memory})


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument('--batch_size', type=int, default=1024, help='(1024)')
  parser.add_argument('--epochs', type=int, default=50, help='(50)')
  parser.add_argument(
    '--without_torch', action='store_true', help='leave PyTorch out'
  )
  # For the processes that this one starts.
  parser.add_argument('--variant', help=argparse.SUPPRESS)
  return results.parse(parser, batch_size=8, epochs=2)


def _in_process(variant: str, args: argparse.Namespace) -> dict[str, float]:
  command = [
    *(sys.executable, __file__, f'--variant={variant}'),
    *(f'--batch_size={args.batch_size}', *['--quick'] * args.quick),
  ]
  output = subprocess.check_output(command, text=True)
  return json.loads(output.splitlines()[-1])


def _train(args: argparse.Namespace) -> dict[str, float]:
  """Makes training steps; the memory of this process in MB."""
  config = jax_vae.make_config(args.quick)
  config.train.batch_size = args.batch_size
  if args.variant == _OURS:
    before = _megabytes('self', 'VmRSS')
    data = jax_vae.make_data(config, jax_vae.NUM_BATCHES)
    run = jax_vae.dispatches(Trainer(config, data), jax_vae.NUM_BATCHES)
  else:
    from benchmarks import torch_vae

    before = _megabytes('self', 'VmRSS')
    run = torch_vae.contender(args.variant, 'cpu', config).run
  for _ in range(_STEPS):
    run(1)
  return {'before': before, 'peak': _megabytes('self', 'VmHWM')}


def _soak(args: argparse.Namespace) -> list[float]:
  """Resident memory of a run in MB, at each of its validations."""
  config = jax_vae.make_config(args.quick)
  with tempfile.TemporaryDirectory() as folder:
    for index, name in enumerate(('train', 'val')):
      path = pathlib.Path(folder, 'images', name)
      path.mkdir(parents=True)
      count, size = _NUM_IMAGES[index], config.data.image_size
      for i, image in enumerate(end_to_end.make_images(count, size, index)):
        PIL.Image.fromarray(image).save(path / f'{i:04}.png')
    command = [
      *(sys.executable, 'main.py', '--config=configs/celeba.py'),
      *('--config.data.source=folder', f'--config.data.dir={folder}/images'),
      f'--config.data.decoded_dir={folder}/decoded',
      f'--config.data.image_size={config.data.image_size}',
      f'--config.model.hidden_channels={config.model.hidden_channels}',
      f'--config.train.num_epochs={args.epochs}',
      f'--workdir={folder}/run',
    ]
    memory = []
    with subprocess.Popen(
      command,
      cwd=pathlib.Path(__file__).resolve().parents[1],
      stdout=subprocess.PIPE,
      text=True,
    ) as process:
      for line in process.stdout:
        if re.match(r'epoch \d+/\d+ +val', line):
          memory.append(_megabytes(process.pid, 'VmRSS'))
  if process.returncode:
    raise SystemExit(f'main.py ended with status {process.returncode}.')
  return memory


def _megabytes(process: int | str, name: str) -> float:
  """A line of /proc/…/status."""
  status = pathlib.Path(f'/proc/{process}/status').read_text()
  return int(re.search(rf'{name}:\s+(\d+) kB', status)[1]) / 1e3


if __name__ == '__main__':
  main()
