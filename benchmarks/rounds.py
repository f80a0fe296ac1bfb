"""Measures contenders in turn, so that the drift of a machine cancels.

In each round every contender runs for about the same time, and each round
begins with another contender. Contenders are compared within a round; the
median over the rounds counts.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import subprocess
import sys
import time

import numpy as np


@dataclasses.dataclass
class Contender:
  """Training steps to be measured.

  Attributes:
    name: of its row in a table.
    batch_size: images in a step.
    dtype: of the activations.
    run: makes a number of training steps, and returns when they are done.
  """

  name: str
  batch_size: int
  dtype: str
  run: Callable[[int], None]


@dataclasses.dataclass
class Measured:
  """Measurements of a contender.

  Attributes:
    name: the contender's.
    batch_size: the contender's.
    dtype: the contender's.
    first_step_seconds: of the first step, compilation included.
    steps_per_round: number of steps in a round.
    step_seconds: per step, of each round.
  """

  name: str
  batch_size: int
  dtype: str
  first_step_seconds: float
  steps_per_round: int
  step_seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def milliseconds(self) -> float:
    """Per step, median of the rounds."""
    return 1000 * float(np.median(self.step_seconds))

  @property
  def images_per_second(self) -> float:
    """Median of the rounds."""
    return 1000 * self.batch_size / self.milliseconds

  def row(self, base: 'Measured') -> dict[str, object]:
    """The contender's row of a table, as JSON."""
    return {
      **dataclasses.asdict(self),
      'images_per_second': self.images_per_second,
      'milliseconds_per_step': self.milliseconds,
      'speedup': speedup(self, base),
    }


def add_flags(
  parser: argparse.ArgumentParser, num_rounds: int, seconds: float
) -> None:
  """Adds the flags of the rounds, with their defaults."""
  parser.add_argument(
    '--rounds', type=int, default=num_rounds, help=f'({num_rounds})'
  )
  parser.add_argument(
    '--seconds',
    type=float,
    default=seconds,
    help=f'of a contender in a round, at least a step ({seconds:g})',
  )


def measure(
  contenders: Sequence[Contender], args: argparse.Namespace
) -> list[Measured]:
  """Warms all contenders up, and measures them in turn."""
  measured = [warm_up(contender, args.seconds) for contender in contenders]
  alternate(contenders, measured, args.rounds)
  return measured


def warm_up(contender: Contender, seconds: float) -> Measured:
  """Compiles a contender, and counts its steps in a number of seconds."""
  first = _time(contender, 1)
  steps, elapsed = 1, _time(contender, 1)
  while elapsed < seconds / 2:
    steps *= 2
    elapsed = _time(contender, steps)
  return Measured(
    contender.name,
    contender.batch_size,
    contender.dtype,
    first_step_seconds=first,
    steps_per_round=max(1, round(seconds * steps / elapsed)),
  )


def alternate(
  contenders: Sequence[Contender],
  measured: Sequence[Measured],
  num_rounds: int,
) -> None:
  """Adds rounds to the results of `warm_up`, one for each contender."""
  pairs = list(zip(contenders, measured, strict=True))
  for index in range(num_rounds):
    first = index % len(pairs)
    for contender, result in pairs[first:] + pairs[:first]:
      steps = result.steps_per_round
      result.step_seconds.append(_time(contender, steps) / steps)


def speedup(measured: Measured, other: Measured) -> float:
  """Ratio of images/s to the other's, median over the rounds."""
  ratios = np.divide(other.step_seconds, measured.step_seconds)
  return float(np.median(ratios)) * measured.batch_size / other.batch_size


@contextlib.contextmanager
def in_process(
  name: str,
  batch_size: int,
  dtype: str,
  flags: Sequence[str],
  environment: Mapping[str, str],
) -> Iterator[Contender]:
  """A contender in a process of its own: this script, which calls `serve`.

  Args:
    name: the contender's.
    batch_size: the contender's.
    dtype: the contender's.
    flags: of the script, beside `--serve`.
    environment: variables that the process has beside this one's.

  Raises:
    ChildProcessError: when it runs, if the process has ended.
  """
  with subprocess.Popen(
    [sys.executable, sys.argv[0], '--serve', *flags],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, **environment},
  ) as process:

    def answers(word):
      lines = iter(process.stdout.readline, '')
      return any(line == f'{word}\n' for line in lines)

    def run(num_steps):
      with contextlib.suppress(BrokenPipeError):
        print(num_steps, file=process.stdin, flush=True)
      if not answers('done'):
        raise ChildProcessError('its process ended, see above.')

    # It has started and made its images, and compiled nothing yet.
    answers('ready')
    try:
      yield Contender(name, batch_size, dtype, run)
    finally:
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def serve(contender: Contender) -> None:
  """Makes as many steps as each line of standard input has, and answers."""
  print('ready', flush=True)
  for line in sys.stdin:
    contender.run(int(line))
    print('done', flush=True)


def _time(contender: Contender, num_steps: int) -> float:
  start = time.perf_counter()
  contender.run(num_steps)
  return time.perf_counter() - start
