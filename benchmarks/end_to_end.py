"""Seconds per epoch of the whole loop at CelebA's size, and where they go.

  python benchmarks/end_to_end.py --output=benchmarks/end_to_end.json

`train.train_and_evaluate` runs as it is, by configs/celeba.py, with its
checkpoints, pictures and a validation each epoch, into a temporary folder
(TMPDIR says on which disk). Only the images are made up: uint8 in host memory,
smooth and of CelebA's number and size; nothing is decoded. Each mode has
processes of its own.

What is measured is noted from outside, around the functions that the loop
calls. All of them return before the devices are done, so a thread waits for an
output of each (one that is not donated) and notes when it was there. The
devices work in the order in which they were called. So, for each call,

  wait         max(0, called - all before it finished)
  computation  finished - max(called, all before it finished)

where the first call of each function, which traces and compiles it, begins
when it returns. What a call waits for by itself, such as the copying of its
images to the device, is part of its computation: it shows as the difference
between the modes.

  an epoch     from the end of the validation before it to the end of its own,
               on the devices; the first begins with the first call. Median of
               all but the first, unless that is the only one; compilation does
               not count.
  the wait's   waits over waits and computations, in all epochs but the first.
  share        If it is the only one: in its training, but for the first call.
  host         what the loop's thread did, means over all epochs. Most of it
               passes while the devices compute.
  first step   from the start of a process to the first metrics that it can
               read, those of its first dispatch, with an empty folder of
               JAX_COMPILATION_CACHE_DIR (cold) and with that once more (warm).
               Making the images up does not count.
"""

import argparse
from concurrent import futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import loop_recorder
from benchmarks import loop_summary
from benchmarks import results
from configs import celeba
from runs import progress
from runs import schema
import train
from vae import splits
from vae import training
from vae.errors import UserError

# What the flags are where they are not given.
_ON_ACCELERATOR = {'epochs': 3, 'batch_size': 64, **loop_summary.CELEBA}
_ON_CPU = {
  'epochs': 1,
  'batch_size': 64,
  'num_examples': 6_400,
  'num_validation': 640,
}
_QUICK = {
  'epochs': 2,
  'batch_size': 16,
  'num_examples': 160,
  'num_validation': 32,
  'steps_per_dispatch': 3,
  'quick': True,
}

# The data.


def make_images(count: int, size: int, seed: int) -> np.ndarray:
  """Smooth random blobs, with about the spectrum of photographs.

  Returns:
    uint8 [count, size, size, 3].
  """
  waves = 12
  frequencies = np.arange(waves)
  positions = (np.arange(size) + 0.5) / size
  basis = np.cos(np.pi * positions[:, None] * frequencies).astype(np.float32)
  squares = frequencies[:, None] ** 2 + frequencies**2
  amplitudes = 40 * (1 + squares.astype(np.float32)) ** -0.65
  images = np.empty((count, size, size, 3), np.uint8)

  def draw(start):
    part = images[start : start + block]
    rng = np.random.default_rng([seed, start])
    weights = rng.standard_normal((len(part), 3, waves, waves), np.float32)
    # Colours that go together.
    weights[:, 1:] = 0.4 * weights[:, 1:] + weights[:, :1]
    pixels = basis @ (amplitudes * weights) @ basis.T + 128
    pixels = np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
    part[...] = np.moveaxis(pixels, 1, -1)

  # As many at a time as stay in a core's cache.
  block = 64
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(draw, range(0, count, block)))
  return images


def make_data(settings: dict[str, Any], cache: str) -> splits.DataSet:
  """The made-up data set, kept where `cache` says."""
  kept = splits.DeviceSplit if cache == 'device' else lambda split: split
  size = make_config(settings).data.image_size
  train_split, validation = (
    kept(splits.ArraySplit(make_images(settings[name], size, seed)))
    for seed, name in enumerate(('num_examples', 'num_validation'))
  )
  return splits.DataSet(train_split, validation, validation)


# The processes.


def measure_loop(
  settings: dict[str, Any], cache: str, workdir: str
) -> dict[str, Any]:
  """Runs the loop; what `loop_summary.summarize` says of it."""
  data = make_data(settings, cache)
  with loop_recorder.recording() as recorder:
    train.train_and_evaluate(
      make_config(settings), workdir, data, progress.NullWriter()
    )
    end = time.perf_counter()
  return loop_summary.summarize(recorder, end, settings)


class _FirstMetricsError(Exception):
  """Ends a run that has made its first steps; says when."""


def measure_first_step(
  settings: dict[str, Any], cache: str, workdir: str
) -> dict[str, Any]:
  """Runs the loop up to the first metrics.

  Returns:
    `finished`, by the clock that all processes share, and how many seconds of
    this process do not count.
  """
  start = time.time()
  data = make_data(settings, cache)
  not_counted = time.time() - start
  make_train_steps = training.make_train_steps

  def make(*args):
    steps = make_train_steps(*args)

    def first_steps(*args):
      jax.device_get(steps(*args)[1])
      raise _FirstMetricsError(time.time())

    return first_steps

  try:
    with mock.patch.object(training, 'make_train_steps', make):
      train.train_and_evaluate(
        make_config(settings), workdir, data, progress.NullWriter()
      )
  except _FirstMetricsError as error:
    finished = error.args[0]
  return {'finished': finished, 'not_counted': not_counted}


def make_config(settings: dict[str, Any]):
  """configs/celeba.py, with what the flags say."""
  config = celeba.get_config()
  config.train.num_epochs = settings['epochs']
  config.train.batch_size = settings['batch_size']
  config.model.dtype = settings['dtype']
  config.train.steps_per_dispatch = settings['steps_per_dispatch']
  if settings['quick']:
    config.data.image_size = 16
    config.model.latent_dim = 4
    config.model.hidden_channels = (4, 8)
  schema.validate(config)
  schema.check_devices(config, jax.device_count())
  return config


def complete_settings(args: argparse.Namespace) -> dict[str, Any]:
  """The flags, and for those that were not given what suits the device."""
  settings = _ON_CPU if jax.default_backend() == 'cpu' else _ON_ACCELERATOR
  settings = {
    'dtype': 'float32',
    'steps_per_dispatch': 0,
    'quick': False,
    **settings,
  }
  if args.quick:
    settings |= _QUICK
  given = {name: getattr(args, name) for name in settings}
  settings |= {name: v for name, v in given.items() if v is not None}
  if settings['num_examples'] < settings['batch_size']:
    raise UserError('--num_examples must be at least --batch_size.')
  return settings


def run_child(args: argparse.Namespace) -> None:
  """Measures one thing, and leaves it in a file for the parent."""
  results.check_devices()
  settings = complete_settings(args)
  measure = {'loop': measure_loop, 'first_step': measure_first_step}[args.only]
  with tempfile.TemporaryDirectory(prefix='end_to_end_') as workdir:
    result = measure(settings, args.cache[0], workdir)
  result['settings'] = settings
  result['platform'] = jax.default_backend()
  pathlib.Path(args.result).write_text(json.dumps(result))


def start_child(
  arguments: list[str], cache: str, only: str, environment: dict[str, str]
) -> dict[str, Any]:
  """Measures in a process of its own, which tells its progress on stderr.

  A device belongs to one process at a time, so this one leaves it alone.
  """
  with tempfile.TemporaryDirectory(prefix='end_to_end_') as folder:
    path = pathlib.Path(folder) / 'result.json'
    command = [sys.executable, __file__, *arguments]
    command += [f'--cache={cache}', f'--only={only}', f'--result={path}']
    print(f'--cache={cache}: {only} …', file=sys.stderr, flush=True)
    start = time.time()
    child = subprocess.run(
      command, stdout=sys.stderr, env=os.environ | environment
    )
    if child.returncode:
      sys.exit(f'end_to_end: --cache={cache} --only={only} failed, see above.')
    result = json.loads(path.read_text())
  if only == 'first_step':
    result['seconds'] = result['finished'] - start - result['not_counted']
  return result


def measure_mode(
  arguments: list[str], cache: str, loop_only: bool
) -> dict[str, Any]:
  """The loop, and the time to the first step without and with a cache."""
  result = start_child(arguments, cache, 'loop', {})
  if loop_only:
    return result
  with tempfile.TemporaryDirectory(prefix='end_to_end_') as folder:
    environment = {
      'JAX_COMPILATION_CACHE_DIR': folder,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    for state in ('cold', 'warm'):
      first = start_child(arguments, cache, 'first_step', environment)
      result[f'first_step_{state}'] = first['seconds']
  return result


# The flags.


def _caches(text: str) -> list[str]:
  caches = text.split(',')
  for cache in caches:
    if cache not in loop_summary.TARGET_SHARES:
      raise argparse.ArgumentTypeError(
        f'{cache!r} is neither of {", ".join(loop_summary.TARGET_SHARES)}'
      )
  return caches


def _count(text: str) -> int:
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r} is no number from 1 on')
  return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--cache',
    type=_caches,
    default='device,host',
    help='where the images are kept; more than one: each in turn '
    '(default: device,host)',
  )
  add(
    '--epochs',
    type=_count,
    help='from two on, the first does not count (default: 3; on a CPU 1)',
  )
  add(
    '--num_examples',
    type=_count,
    help="training images (default: CelebA's 162,770; on a CPU 6,400)",
  )
  add(
    '--num_validation',
    type=_count,
    help="validation images (default: CelebA's 19,867; on a CPU 640)",
  )
  add('--batch_size', type=_count, help='global (default: 64)')
  add(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='config.model.dtype (default: float32)',
  )
  add(
    '--steps_per_dispatch',
    type=_count,
    help='config.train.steps_per_dispatch (default: as the loop chooses)',
  )
  add(
    '--loop_only',
    action='store_true',
    help='leave out the seconds to the first step',
  )
  add('--output', help='JSON file for all that was measured')
  add(
    '--quick',
    action='store_true',
    help='two epochs of ten batches of a tiny network: whether it runs at all',
  )
  # For the processes that this one starts.
  add('--only', choices=('loop', 'first_step'), help=argparse.SUPPRESS)
  add('--result', help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
  """Measures each mode; prints a table, and writes the JSON."""
  args = parse(arguments)
  if args.only:
    run_child(args)
    return
  if args.quick:
    results.compile_quickly()
  modes = {}
  for cache in args.cache:
    modes[cache] = measure_mode(arguments, cache, args.loop_only)
    results.save(args.output, {'machine': None, 'modes': modes})
  # Only now, when nobody else needs the devices.
  facts = results.machine()
  print(
    results.describe(facts),
    loop_summary.heading(next(iter(modes.values()))),
    loop_summary.table(modes),
    loop_summary.waits(modes),
    sep='\n\n',
  )
  results.write(args.output, {'machine': facts, 'modes': modes})


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except UserError as error:
    sys.exit(f'end_to_end: {error}')
