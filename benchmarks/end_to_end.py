"""Seconds per epoch of the whole training loop at CelebA's size, and its parts.

  python benchmarks/end_to_end.py --output=benchmarks/end_to_end.json

`train.train_and_evaluate` runs as it is, by configs/celeba.py with checkpoints,
pictures and a validation each epoch, into a temporary folder (TMPDIR chooses
the disk). Only the images are made up: uint8 in host memory, smooth, of
CelebA's number and size; nothing is decoded. Each mode has processes of its
own.

The functions that the loop calls are recorded from outside (loop_recorder.py).
The devices work in the order of the calls. So, for each call,

  wait         max(0, called - all before it finished)
  computation  finished - max(called, all before it finished)

and the first call of each function, which traces and compiles it, begins when
it returns. Waits within a call, as for the copy of its images to the device,
are part of its computation: they show as the difference between the modes.

  an epoch     from the end of the validation before it to the end of its own,
               on the devices; the first begins with the first call. Median of
               all but the first, unless that is the only one, without
               compilation.
  share        waits over waits and computations, in all epochs but the first;
               if that is the only one, in its training after the first call.
  host         work of the loop's thread, mean over all epochs; most of it
               passes while the devices compute.
  first step   from the start of a process to the first metrics that it can
               read, those of its first dispatch, with an empty
               JAX_COMPILATION_CACHE_DIR (cold) and with the same again (warm),
               without the making of images.
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

from benchmarks import jax_vae, loop_recorder, loop_summary, results
from runs import progress, schema
import train
from vae import splits, steps

# The flags that are not given, by platform.
_ON_ACCELERATOR = {'epochs': 3, **loop_summary.CELEBA}
_ON_CPU = {'epochs': 1, 'num_examples': 6_400, 'num_validation': 640}


def make_images(count: int, size: int, seed: int) -> np.ndarray:
  """Smooth random images, with about the spectrum of photographs.

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
    # Correlates the colours.
    weights[:, 1:] = 0.4 * weights[:, 1:] + weights[:, :1]
    pixels = basis @ (amplitudes * weights) @ basis.T + 128
    pixels = np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
    part[...] = np.moveaxis(pixels, 1, -1)

  # As many at a time as stay in a core's cache.
  block = 64
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(draw, range(0, count, block)))
  return images


def main() -> None:
  """Measures each mode; prints a table, and writes JSON."""
  args = _arguments()
  if args.only:
    _measure_here(args)
    return
  modes = {}
  for cache in args.cache:
    modes[cache] = _measure_mode(args, cache)
    results.save(args.output, {'machine': None, 'modes': modes})
  # Only now, as a device belongs to one process at a time.
  content = results.begin(args) | {'modes': modes}
  print(loop_summary.heading(next(iter(modes.values()))), end='\n\n')
  print(loop_summary.table(modes))
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  add = parser.add_argument
  add(
    '--cache',
    type=lambda text: text.split(','),
    default=list(loop_summary.TARGET_SHARES),
    help='where the images are kept, separated by commas (device,host)',
  )
  add('--epochs', type=int, help='from two on, the first is left out (CPU: 1)')
  add('--num_examples', type=int, help="for training (CelebA's; CPU: 6,400)")
  add('--num_validation', type=int, help="validation (CelebA's; CPU: 640)")
  add('--batch_size', type=int, default=64, help='global (64)')
  add('--dtype', default='float32', help='float32, bfloat16 (float32)')
  add('--steps_per_dispatch', type=int, default=0, help="(the loop's choice)")
  add('--loop_only', action='store_true', help='without the first step')
  # For the processes that this one starts.
  add('--only', choices=('loop', 'first_step'), help=argparse.SUPPRESS)
  add('--result', help=argparse.SUPPRESS)
  return results.parse(
    parser,
    epochs=2,
    batch_size=16,
    num_examples=160,
    num_validation=32,
    steps_per_dispatch=3,
  )


def _measure_mode(args: argparse.Namespace, cache: str) -> dict[str, Any]:
  """The loop, and the time to the first step without and with a cache."""
  result = _start(cache, 'loop', {})
  if args.loop_only:
    return result
  with tempfile.TemporaryDirectory(prefix='end_to_end_') as folder:
    environment = {
      'JAX_COMPILATION_CACHE_DIR': folder,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    for state in ('cold', 'warm'):
      start = time.time()
      first = _start(cache, 'first_step', environment)
      seconds = first['finished'] - start - first['not_counted']
      result[f'first_step_{state}'] = seconds
  return result


def _start(
  cache: str, only: str, environment: dict[str, str]
) -> dict[str, Any]:
  """Measures in a process of its own."""
  with tempfile.TemporaryDirectory(prefix='end_to_end_') as folder:
    path = pathlib.Path(folder) / 'result.json'
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += [f'--cache={cache}', f'--only={only}', f'--result={path}']
    print(f'--cache={cache}: {only} …', file=sys.stderr, flush=True)
    child = subprocess.run(
      command, stdout=sys.stderr, env=os.environ | environment
    )
    if child.returncode:
      sys.exit(f'error: --cache={cache} --only={only} failed, see above.')
    return json.loads(path.read_text())


# The processes.


def _measure_here(args: argparse.Namespace) -> None:
  """Measures in this process, and writes the result for its parent."""
  results.check_devices()
  is_cpu = jax.default_backend() == 'cpu'
  for name, value in (_ON_CPU if is_cpu else _ON_ACCELERATOR).items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  measure = {'loop': _measure_loop, 'first_step': _measure_first_step}
  with tempfile.TemporaryDirectory(prefix='end_to_end_') as workdir:
    result = measure[args.only](args, workdir)
  result['settings'] = vars(args)
  result['platform'] = jax.default_backend()
  pathlib.Path(args.result).write_text(json.dumps(result))


def _measure_loop(args: argparse.Namespace, workdir: str) -> dict[str, Any]:
  config = _config(args)
  data = _data(args, config)
  with loop_recorder.recording() as recorder:
    train.train_and_evaluate(config, workdir, data, progress.Writer())
    end = time.perf_counter()
  return loop_summary.summarize(recorder, end, vars(args))


class _FirstMetricsError(Exception):
  """Ends a run after its first dispatch, with the time."""


def _measure_first_step(
  args: argparse.Namespace, workdir: str
) -> dict[str, Any]:
  """The time of the first metrics, and the seconds that the images took."""
  start = time.time()
  config = _config(args)
  data = _data(args, config)
  not_counted = time.time() - start
  make_train_steps = steps.make_train_steps

  def make(*args):
    train_steps = make_train_steps(*args)

    def first_steps(*args):
      jax.device_get(train_steps(*args)[1])
      raise _FirstMetricsError(time.time())

    return first_steps

  try:
    with mock.patch.object(steps, 'make_train_steps', make):
      train.train_and_evaluate(config, workdir, data, progress.Writer())
  except _FirstMetricsError as error:
    finished = error.args[0]
  return {'finished': finished, 'not_counted': not_counted}


def _config(args: argparse.Namespace):
  config = jax_vae.make_config(args.quick)
  config.train.num_epochs = args.epochs
  config.train.batch_size = args.batch_size
  config.model.dtype = args.dtype
  config.train.steps_per_dispatch = args.steps_per_dispatch
  schema.validate(config)
  return config


def _data(args: argparse.Namespace, config) -> splits.DataSet:
  size = config.data.image_size
  train_split, validation = (
    splits.ArraySplit(make_images(count, size, seed))
    for seed, count in enumerate((args.num_examples, args.num_validation))
  )
  if args.cache == ['device']:
    train_split, validation = map(splits.DeviceSplit, (train_split, validation))
  return splits.DataSet(train_split, validation, validation)


if __name__ == '__main__':
  main()
