"""Training with its workdir in a bucket, beside one on a disk.

  python benchmarks/bucket.py --output=bucket.json

The bucket is the tests' server on this machine, as slow as a real one: each
answer takes 50 ms, and an object takes one write per second. The two train in
turn, with metrics, and with pictures and a checkpoint at each validation. The
speed is taken between the first and the last row of metrics, so that it
includes all waits of the loop.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import end_to_end, jax_vae, results
from runs import metric_writer
from tests import bucket_server
import train
from vae import paths, splits


class _TimedWriter(metric_writer.MetricWriter):
  """A writer that keeps the step and the time of each row of training."""

  def __init__(self, workdir):
    super().__init__(workdir)
    self.rows = []

  def write_scalars(self, step, scalars):
    super().write_scalars(step, scalars)
    if 'train/loss' in scalars:
      self.rows.append((step, time.monotonic()))


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  content = results.begin(args)
  config = jax_vae.make_config(args.quick)
  config.train.num_epochs = args.epochs
  config.train.log_every_steps = 10
  size = config.data.image_size
  images = end_to_end.make_images(args.num_examples, size, seed=0)
  split = splits.ArraySplit(images)
  validation = splits.ArraySplit(images[: max(1, len(images) // 10)])
  data = splits.DataSet(split, validation, validation)
  with (
    tempfile.TemporaryDirectory(prefix='bucket_') as folder,
    bucket_server.serve_in_process() as server,
  ):
    os.environ.update(server.environment())
    server.set_faults(latency_ms=50, writes_per_second=1)
    places = {'disk': paths.expand(folder), 'bucket': 'gs://bucket'}
    speeds = {place: [] for place in places}
    for index in range(-1, args.rounds):  # The first only compiles.
      order = list(places)[:: 1 if index % 2 else -1]
      for place in order:
        workdir = paths.expand(places[place]) / f'run_{index}'
        speed = _images_per_second(config, data, workdir)
        if index >= 0:
          speeds[place].append(speed)
  ratio = np.median(np.divide(speeds['bucket'], speeds['disk']))
  rows = [
    [place, results.significant(np.median(values))]
    for place, values in speeds.items()
  ]
  print(results.table(['workdir', 'images/s'], rows))
  print(f'bucket / disk, median of the rounds: {ratio:.3f}')
  content |= {'images_per_second': speeds, 'ratio': float(ratio)}
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument('--rounds', type=int, default=3, help='(3)')
  parser.add_argument('--epochs', type=int, default=3, help='of a run (3)')
  parser.add_argument(
    '--num_examples', type=int, default=3_200, help='of an epoch (3200)'
  )
  return results.parse(parser, rounds=1, epochs=2, num_examples=160)


def _images_per_second(config, data, workdir) -> float:
  writer = _TimedWriter(workdir)
  train.train_and_evaluate(config, workdir, data, writer)
  writer.close()
  (first, start), (last, end) = writer.rows[0], writer.rows[-1]
  return (last - first) * config.train.batch_size / (end - start)


if __name__ == '__main__':
  main()
