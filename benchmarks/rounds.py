"""Measures contenders in turns, so that what drifts on a machine cancels.

In each round every contender runs for about the same time, and each round
begins with another. Contenders are compared within a round; of the rounds the
median counts.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import os
import subprocess
import sys
import time

import numpy as np


@dataclasses.dataclass
class Contender:
  """Training steps that can be run.

  Attributes:
    name: of a row in a table.
    batch_size: images in a step.
    dtype: of the activations.
    run: makes so many training steps, and returns when they are done.
  """

  name: str
  batch_size: int
  dtype: str
  run: Callable[[int], None]


@dataclasses.dataclass
class Measured:
  """What was measured of a contender.

  Attributes:
    name: the contender's.
    batch_size: the contender's.
    dtype: the contender's.
    first_step_seconds: the first step's, compilation included.
    steps_per_round: how many steps it made in a round.
    step_seconds: a step's in each round.
  """

  name: str
  batch_size: int
  dtype: str
  first_step_seconds: float
  steps_per_round: int
  step_seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def milliseconds(self) -> float:
    """A step's, median of the rounds."""
    return 1000 * float(np.median(self.step_seconds))

  @property
  def images_per_second(self) -> float:
    """Median of the rounds."""
    return self.batch_size / float(np.median(self.step_seconds))


def add_flags(
  parser: argparse.ArgumentParser, num_rounds: int, seconds: float
) -> None:
  """Adds those that say how long to measure, and where it goes."""
  parser.add_argument(
    '--rounds',
    type=int,
    default=num_rounds,
    help=f'of which the median counts ({num_rounds})',
  )
  parser.add_argument(
    '--seconds',
    type=float,
    default=seconds,
    help=f'of each contender in each round, at least a step ({seconds:g})',
  )
  parser.add_argument('--output', help='JSON file for all that was measured')


def warm_up(contender: Contender, seconds: float) -> Measured:
  """Compiles a contender; finds out how many steps take so many seconds."""
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
  """Adds so many rounds to what `warm_up` returned for each contender."""
  pairs = list(zip(contenders, measured, strict=True))
  for index in range(num_rounds):
    first = index % len(pairs)
    for contender, result in pairs[first:] + pairs[:first]:
      steps = result.steps_per_round
      result.step_seconds.append(_time(contender, steps) / steps)


def speedup(measured: Measured, other: Measured) -> float:
  """How many times the other's images/s; median of the rounds' ratios."""
  times = np.array(measured.step_seconds), np.array(other.step_seconds)
  ratios = times[1] / times[0]
  return float(np.median(ratios)) * measured.batch_size / other.batch_size


@contextlib.contextmanager
def in_process(
  name: str,
  batch_size: int,
  dtype: str,
  command: Sequence[str],
  environment: Mapping[str, str],
) -> Iterator[Contender]:
  """A contender that another process runs, which calls `serve`.

  Args:
    name: the contender's.
    batch_size: the contender's.
    dtype: the contender's.
    command: starts the process.
    environment: variables that the process has beside this one's.

  Raises:
    ChildProcessError: when it runs, if the process has ended.
  """
  with subprocess.Popen(
    command,
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
        raise ChildProcessError(f'{name}: its process ended, see above.')

    # It has compiled nothing yet; but it has started, and made its images.
    answers('ready')
    try:
      yield Contender(name, batch_size, dtype, run)
    finally:
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def serve(contender: Contender) -> None:
  """Makes as many steps as each line of the input says; answers when done."""
  print('ready', flush=True)
  for line in sys.stdin:
    contender.run(int(line))
    print('done', flush=True)


def _time(contender: Contender, num_steps: int) -> float:
  start = time.perf_counter()
  contender.run(num_steps)
  return time.perf_counter() - start
