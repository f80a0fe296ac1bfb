"""Images per second of each data.cache, beside a PyTorch DataLoader.

  python benchmarks/input_pipeline.py --data_dir=celeba --output=input.json

All cut the central 148×148 out of JPEG files of 178×218, resize it to 64×64,
antialiased, and deliver batches of 64 in a shuffled order; the DataLoader, with
Pillow, also mirrors the images (in this codebase the training step does). All
take turns in one process (rounds.py). An epoch has --num_images: links to the
files, each repeated, so that the start of an epoch weighs as with CelebA.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import random
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from PIL import Image

from benchmarks import results, rounds
from configs import celeba
from data import cartoon_faces
import input_pipeline
from runs import schema
from vae import devices, splits

_STEPS_PER_CHUNK = 10

# Cartoon faces, if no data is given.
_NUM_DRAWN = 1000


class Faces:
  """A map-style data set of image files, decoded by Pillow."""

  def __init__(self, paths: list[pathlib.Path], crop_size: int, size: int):
    """Opens nothing yet."""
    self._paths, self._crop_size, self._size = paths, crop_size, size

  def __len__(self):
    return len(self._paths)

  def __getitem__(self, index):
    image = Image.open(self._paths[index]).convert('RGB')
    side = self._crop_size
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((self._size, self._size), Image.BILINEAR)
    if random.random() < 0.5:
      image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return np.moveaxis(np.array(image), -1, 0)


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  content = results.begin(args)
  with tempfile.TemporaryDirectory() as folder:
    files = args.data_dir or _draw_faces(pathlib.Path(folder, 'drawn'))
    repeated = _repeat(files, pathlib.Path(folder, 'data'), args.num_images)
    measured = rounds.measure(_contenders(repeated, args.workers), args)
  rows = [one.row(measured[0]) for one in measured]
  lines = [
    [
      row['name'],
      results.significant(row['images_per_second']),
      f'{row["speedup"]:.2f}',
    ]
    for row in rows
  ]
  header = ['', 'images/s', f'of the DataLoader, {args.workers} workers']
  print(results.table(header, lines))
  results.write(args.output, content | {'contenders': rows})


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument(
    '--data_dir', help="a folder of CelebA's layout (by default cartoon faces)"
  )
  parser.add_argument(
    '--num_images', type=int, default=20_000, help='in an epoch (20,000)'
  )
  parser.add_argument(
    '--workers',
    type=int,
    default=os.cpu_count(),
    help="the DataLoader's (the number of cores)",
  )
  rounds.add_flags(parser, num_rounds=5, seconds=2.0)
  return results.parse(parser, num_images=200, rounds=1, seconds=0.0)


def _draw_faces(folder: pathlib.Path) -> pathlib.Path:
  """Writes cartoon faces as JPEG files; returns the folder."""
  (folder / 'img_align_celeba').mkdir(parents=True)
  factors = cartoon_faces.sample_factors('benchmark', _NUM_DRAWN)
  for index, values in enumerate(factors):
    labels = dict(zip(cartoon_faces.FACTORS, map(int, values), strict=True))
    image = cartoon_faces.encode_jpeg(cartoon_faces.render(labels))
    path = folder / 'img_align_celeba' / f'{index:06}.jpg'
    path.write_bytes(image.getvalue())
  return folder


def _repeat(
  files: pathlib.Path | str, folder: pathlib.Path, num_images: int
) -> pathlib.Path:
  """Links images in CelebA's layout, each as often as it takes.

  Args:
    files: has the images in `img_align_celeba/`.
    folder: to be made.
    num_images: for training; two more are for validation and test.
  """
  source = pathlib.Path(files).expanduser().resolve() / 'img_align_celeba'
  (folder / 'img_align_celeba').mkdir(parents=True)
  paths = itertools.cycle(sorted(source.glob('*.jpg')))
  rows = []
  for index in range(num_images + 2):
    name = f'{index:06}.jpg'
    (folder / 'img_align_celeba' / name).symlink_to(next(paths))
    rows.append(f'{name} {max(0, index - num_images + 1)}\n')
  (folder / 'list_eval_partition.txt').write_text(''.join(rows))
  return folder


def _contenders(folder: pathlib.Path, workers: int) -> list[rounds.Contender]:
  """The DataLoader with workers first, as the others are compared with it."""
  try:
    import torch
  except ModuleNotFoundError:
    print(
      'error: PyTorch is not installed; pip install -r '
      'benchmarks/requirements.txt.',
      file=sys.stderr,
    )
    sys.exit(2)
  config = celeba.get_config()
  config.data.dir, config.data.decoded_dir = str(folder), ''
  config.data.crop_size = 148
  schema.validate(config)
  batch_size = config.train.batch_size

  def load(cache):
    config.data.cache = cache
    with contextlib.redirect_stdout(None):
      split = input_pipeline.load(config).train
      next(split.batches(np.arange(1), 1))  # Decodes, if it is not done yet.
    return split

  streamed = load('none')
  num_images = streamed.num_examples // batch_size * batch_size
  paths = sorted((folder / 'img_align_celeba').iterdir())[:num_images]

  def dataloader(num_workers):
    loader = torch.utils.data.DataLoader(
      Faces(paths, config.data.crop_size, config.data.image_size),
      batch_size=batch_size,
      shuffle=True,
      drop_last=True,
      num_workers=num_workers,
      persistent_workers=num_workers > 0,
      # A fork would lack JAX's threads.
      multiprocessing_context='forkserver' if num_workers else None,
    )

    def run(num_epochs):
      for _ in range(num_epochs):
        for _ in loader:
          pass

    return run

  @jax.jit
  def gather(images, indices):
    return images[indices]

  def epochs(split):
    stored = splits.stored_images(split)

    def run(num_epochs):
      for epoch in range(num_epochs):
        for chunk in splits.train_chunks(
          *(split, 0, epoch, 0, batch_size, _STEPS_PER_CHUNK),
          devices.Topology(),
        ):
          if stored is not None:
            for batch in chunk.batches.images[0]:
              gather(stored, batch).block_until_ready()

    return run

  def decode(num_epochs):
    for _ in range(num_epochs):
      load('host')

  return [
    rounds.Contender(name, num_images, 'uint8', run)
    for name, run in (
      (f'DataLoader, {workers} workers', dataloader(workers)),
      ('DataLoader, no workers', dataloader(0)),
      ('cache=none: decoded each epoch', epochs(streamed)),
      ('cache=host, first epoch: decoded and kept', decode),
      ('cache=host, other epochs', epochs(load('host'))),
      ('cache=device, gathered there', epochs(load('device'))),
    )
  ]


if __name__ == '__main__':
  main()
