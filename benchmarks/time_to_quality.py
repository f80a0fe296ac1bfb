"""Seconds from the command to a validation loss, for ways to train a VAE.

  python benchmarks/time_to_quality.py --output=quality.json
  python benchmarks/time_to_quality.py -- --config.data.dir=CELEBA_FOLDER

The target is the validation loss that PyTorch-VAE's network reaches by the
article's schedule (torch_training.py): the mean over the seeds of the loss
after the last epoch, in the article's units, MSE + 0.00025 · KL. The contenders
train on the same images, with the article's network but for the open division,
each seed in a process of its own, in turn:

  PyTorch, eager      PyTorch-VAE with the article's schedule
  PyTorch, compiled   the same by `torch.compile`
  article             main.py with configs/celeba.py, the same schedule
  fast                main.py with configs/celeba_fast.py
  fast, PyTorch       the same initialisation and schedule in PyTorch
  open                main.py with the fastest model of no more parameters

Clocks, both up to the line of the first validation whose loss is the target or
less:

  seconds             from the start of the process
  training            from the line before the first step, with compilation

Before it is measured, each contender runs for an epoch, so that decoded images
and compiled programs are on the disk; JAX's programs, in a cache of their own.
A seed that misses the target has no time; its row says how many did. The ELBO
at the optimal σ is that of the last validation: a loss can be low because its
weights are those of no likelihood.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import results
from configs import celeba

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_KLD_WEIGHT = 0.00025

_SCRIPT = 'benchmarks/torch_training.py'
_ARTICLE, _FAST = (
  '--config=configs/celeba.py',
  '--config=configs/celeba_fast.py',
)
# A linear network of 2.4 million parameters, the article's has 3.9 million.
_LINEAR = '--config.model.hidden_channels=()', '--config.model.latent_dim=64'
_CONTENDERS = {
  'PyTorch, eager': (_SCRIPT, _ARTICLE),
  'PyTorch, compiled': (_SCRIPT, _ARTICLE, '--compile'),
  'article': ('main.py', _ARTICLE),
  'fast': ('main.py', _FAST),
  'fast, PyTorch': (_SCRIPT, _FAST),
  'open': ('main.py', _FAST, *_LINEAR),
}
_BASE = 'PyTorch, eager'
_QUICK = (
  '--config.data.image_size=16',
  '--config.model.hidden_channels=(8, 8)',
  '--config.model.latent_dim=4',
  '--config.train.batch_size=8',
)

# Lines of the contenders: before the first step, and of a validation.
_BEGINS = 'Compiling …', 'Training …'
_EPOCH = re.compile(r'epoch \d+.*val|seed \d+, epoch')
_VALUE = r'\b{} ([\d.]+)'


@dataclasses.dataclass
class Training:
  """What a process printed, in seconds since its start.

  Attributes:
    dimensions: the numbers of an image.
    begins: time of the first step.
    seconds: times of the validations.
    losses: their losses, in the article's units.
    elbos: their ELBOs at the optimal σ, nats per image.
  """

  dimensions: int
  begins: float = math.nan
  seconds: list[float] = dataclasses.field(default_factory=list)
  losses: list[float] = dataclasses.field(default_factory=list)
  elbos: list[float] = dataclasses.field(default_factory=list)

  def read(self, seconds: float, line: str) -> None:
    """Takes a line that was printed at a time."""
    if line.startswith(_BEGINS) and math.isnan(self.begins):
      self.begins = seconds
    elif _EPOCH.search(line):
      mse, kl = (
        float(re.search(_VALUE.format(name), line)[1]) for name in ('mse', 'kl')
      )
      self.seconds.append(seconds)
      self.losses.append(mse + _KLD_WEIGHT * kl)
      distortion = self.dimensions / 2 * math.log(2 * math.pi * math.e * mse)
      self.elbos.append(-distortion - kl)

  def time_to(self, target: float) -> float:
    """Seconds to the first validation that is at least as good, or infinity."""
    found = zip(self.seconds, self.losses, strict=True)
    return next((time for time, loss in found if loss <= target), math.inf)


def main() -> None:
  """Trains the contenders in turn, prints a table, and writes JSON."""
  args = _arguments()
  content = results.begin(args)
  trainings: dict[str, list[Training]] = {name: [] for name in args.contenders}
  with tempfile.TemporaryDirectory() as folder:
    for name in trainings:
      print(f'{name}: warms up.', flush=True)
      _train(name, args, 0, 1, folder)
    names = list(trainings)
    for seed in args.seeds:
      for name in names:
        trainings[name].append(_train(name, args, seed, args.epochs, folder))
        last = trainings[name][-1]
        print(
          f'{name}, seed {seed}: {last.losses[-1]:.5f} after '
          f'{last.seconds[-1]:.1f}s',
          flush=True,
        )
      names = names[1:] + names[:1]  # Each round begins with another one.
  target = args.target or float(
    np.mean([training.losses[-1] for training in trainings[_BASE]])
  )
  print(f'\nTarget: {target:.5f}\n')
  print(_table(trainings, target))
  rows = {
    name: [dataclasses.asdict(training) for training in found]
    for name, found in trainings.items()
  }
  results.write(args.output, content | {'target': target, 'trainings': rows})


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument(
    'flags',
    nargs='*',
    default=['--config.data.source=cartoon_faces'],
    help='of all contenders, behind --; by default for the embedded faces. '
    'objective.beta is 0.000125 times the numbers of an image.',
  )
  parser.add_argument(
    '--epochs', type=int, default=20, help="of the article's schedule (20)"
  )
  parser.add_argument(
    '--seeds',
    type=results.numbers,
    default=list(range(5)),
    help='separated by commas (0,1,2,3,4)',
  )
  parser.add_argument(
    '--target', type=float, help='the validation loss, if it is known'
  )
  parser.add_argument(
    '--contenders',
    type=lambda text: text.split('; '),
    default=list(_CONTENDERS),
    help=f'separated by "; " ({"; ".join(_CONTENDERS)})',
  )
  args = results.parse(parser, epochs=1, seeds=[0])
  if _BASE not in args.contenders and not args.target:
    parser.error(f'without {_BASE!r} the --target must be given.')
  return args


def _train(
  name: str, args: argparse.Namespace, seed: int, num_epochs: int, folder: str
) -> Training:
  """Runs a contender, and reads what it prints as it comes."""
  script, *flags = _CONTENDERS[name]
  if _ARTICLE in flags or num_epochs == 1:
    flags.append(f'--config.train.num_epochs={num_epochs}')
  flags += args.flags
  if args.quick:
    flags += _QUICK
  if script == 'main.py':
    workdir = tempfile.mkdtemp(dir=folder)
    flags += [f'--config.seed={seed}', f'--workdir={workdir}']
  else:
    flags.append(f'--seeds={seed}')
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(pathlib.Path(folder, 'programs')),
    'TORCHINDUCTOR_CACHE_DIR': str(pathlib.Path(folder, 'inductor')),
  }
  training, start = Training(_dimensions(flags)), time.monotonic()
  with subprocess.Popen(
    [sys.executable, script, *flags],
    cwd=_ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    for line in process.stdout:
      training.read(time.monotonic() - start, line)
  if process.returncode:
    raise SystemExit(f'{name} ended with status {process.returncode}.')
  return training


def _dimensions(flags: Sequence[str]) -> int:
  """The numbers of an image, by the flags and else by configs/celeba.py."""
  size = dict(celeba.get_config().data)
  size |= dict(re.findall(r'--config\.data\.(\w+)=(\d+)', ' '.join(flags)))
  return int(size['image_size']) ** 2 * int(size['channels'])


def _table(trainings: dict[str, list[Training]], target: float) -> str:
  rows = []
  for name, found in trainings.items():
    times = np.array([training.time_to(target) for training in found])
    starts = np.array([training.begins for training in found])
    last = [training.losses[-1] for training in found]
    elbos = [training.elbos[-1] for training in found]
    reached = np.isfinite(times)
    cells = ['–', '–', '–']
    if reached.any():
      cells[:2] = _spread(times[reached]), _spread((times - starts)[reached])
      if base := _base_times(trainings, target):
        cells[2] = f'{np.median(base) / np.median(times):.1f}'
    rows.append(
      [
        *(name, f'{reached.sum()} of {len(found)}', *cells),
        *(_spread(last, 5), _spread(elbos)),
      ]
    )
  header = [
    '',
    'reached',
    'seconds',
    'of training',
    'times faster',
    'last loss',
    'its ELBO at the optimal σ, nats',
  ]
  return results.table(header, rows)


def _base_times(trainings, target) -> list[float]:
  """Seconds of PyTorch's trainings; all of them, if they miss the target."""
  return [
    min(training.time_to(target), training.seconds[-1])
    for training in trainings.get(_BASE, [])
  ]


def _spread(values: Sequence[float], digits: int = 1) -> str:
  """Mean and standard deviation."""
  deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
  return f'{np.mean(values):.{digits}f} ± {deviation:.{digits}f}'


if __name__ == '__main__':
  main()
