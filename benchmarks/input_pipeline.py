"""Images a second of each data.cache, beside a PyTorch DataLoader.

  python benchmarks/input_pipeline.py --data_dir=celeba --output=input.json

All cut the central 148×148 out of JPEG files of 178×218 and resize it to 64×64,
antialiased, and deliver batches of 64 in a shuffled order; the DataLoader with
Pillow, which also mirrors (here the training step does). All take turns in one
process (rounds.py). A pass goes through --num_images, each file as often as
that takes: the start of a pass weighs about as little as with CelebA.
"""

import argparse
import contextlib
import os
import pathlib
import random
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from PIL import Image

try:
  import torch
except ModuleNotFoundError:
  print(
    'There is no PyTorch: pip install -r benchmarks/requirements.txt.',
    file=sys.stderr,
  )
  sys.exit(2)

from benchmarks import results
from benchmarks import rounds
from configs import celeba
from data import cartoon_faces
from data import celeba as celeba_source
from data.decoded import DecodedStore
from data.encoded import FileSplit
from data.image_files import Crop
import input_pipeline
from runs import schema
from vae import devices
from vae import splits

_BATCH_SIZE = 64
_STEPS_PER_CHUNK = 10

# Where no data is named.
_NUM_DRAWN = 1000


class Faces(torch.utils.data.Dataset):
  """Image files, each opened, cut, resized and mirrored by Pillow."""

  def __init__(self, paths: list[str], crop: Crop):
    """Takes the files, and how they become examples."""
    self._paths = paths
    self._crop = crop

  def __len__(self):
    return len(self._paths)

  def __getitem__(self, index):
    image = Image.open(self._paths[index]).convert('RGB')
    side = self._crop.crop_size
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    size = self._crop.image_size
    image = image.resize((size, size), Image.BILINEAR)
    if random.random() < 0.5:
      image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def main() -> None:
  """Measures, prints a table, and writes JSON."""
  args = _arguments()
  facts = results.machine()
  print(results.describe(facts), end='\n\n', flush=True)
  with tempfile.TemporaryDirectory() as folder:
    data_dir = args.data_dir or _draw_faces(pathlib.Path(folder))
    contenders = _contenders(data_dir, args.num_images, args.workers)
    measured = [rounds.warm_up(c, args.seconds) for c in contenders]
    rounds.alternate(contenders, measured, args.rounds)
  rows = [
    {
      'name': m.name,
      'images_per_second': m.images_per_second,
      'of_the_dataloader': rounds.speedup(m, measured[0]),
      'pass_seconds': m.step_seconds,
    }
    for m in measured
  ]
  print(
    results.table(
      ['', 'images/s', f'of the DataLoader, {args.workers} workers'],
      [
        [
          row['name'],
          results.significant(row['images_per_second']),
          f'{row["of_the_dataloader"]:.2f}',
        ]
        for row in rows
      ],
    )
  )
  content = {'machine': facts, 'settings': vars(args), 'contenders': rows}
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--data_dir',
    help='CelebA, as config.data.dir names it (else cartoon faces are drawn)',
  )
  parser.add_argument(
    '--num_images', type=int, default=20_000, help='of a pass (20,000)'
  )
  parser.add_argument(
    '--workers',
    type=int,
    default=len(os.sched_getaffinity(0)),
    help="the DataLoader's (as many as cores)",
  )
  rounds.add_flags(parser, num_rounds=5, seconds=2.0)
  parser.add_argument(
    '--quick', action='store_true', help='one short round of a few images'
  )
  args = parser.parse_args()
  if args.quick:
    args.num_images, args.rounds, args.seconds = 200, 1, 0.0
  return args


def _draw_faces(folder: pathlib.Path) -> str:
  """Writes cartoon faces in CelebA's layout; a tenth is for validation."""
  (folder / 'img_align_celeba').mkdir()
  factors = cartoon_faces.sample_factors('benchmark', _NUM_DRAWN)
  rows = []
  for index, values in enumerate(factors):
    labels = dict(zip(cartoon_faces.FACTORS, map(int, values), strict=True))
    image = cartoon_faces.encode_jpeg(cartoon_faces.render(labels))
    name = f'{index + 1:06}.jpg'
    (folder / 'img_align_celeba' / name).write_bytes(image.getvalue())
    partition = {8: 1, 9: 2}.get(index % 10, 0)
    rows.append(f'{name} {partition}\n')
  (folder / 'list_eval_partition.txt').write_text(''.join(rows))
  return str(folder)


def _contenders(
  data_dir: str, num_images: int, workers: int
) -> list[rounds.Contender]:
  """The DataLoader with workers first: what the others are compared with."""
  data = schema.resolved(celeba.get_config()).data
  data.dir = data_dir
  encoded = celeba_source.find(data)['train']
  num_images = num_images // _BATCH_SIZE * _BATCH_SIZE
  indices = np.resize(np.arange(encoded.num_examples), num_images)
  paths = [encoded.name(index) for index in indices]
  crop = Crop(data.crop_size, data.image_size, data.channels)
  source = FileSplit('', paths)

  def split(cached):
    store = DecodedStore('')
    return input_pipeline.ImageSplit('train', source, crop, store, cached)

  @jax.jit
  def gather(images, indices):
    return images[indices]

  def dataloader(num_workers):
    loader = torch.utils.data.DataLoader(
      Faces(paths, crop),
      batch_size=_BATCH_SIZE,
      shuffle=True,
      drop_last=True,
      num_workers=num_workers,
      persistent_workers=num_workers > 0,
      # JAX has threads, which a forked process would miss.
      multiprocessing_context='forkserver' if num_workers else None,
    )

    def run(num_passes):
      for _ in range(num_passes):
        for _ in loader:
          pass

    return run

  def train(images):
    stored = splits.stored_images(images)

    def run(num_passes):
      for epoch in range(num_passes):
        for chunk in splits.train_chunks(
          *(images, 0, epoch, 0, _BATCH_SIZE, _STEPS_PER_CHUNK),
          devices.Topology(),
        ):
          if stored is not None:
            for batch in chunk.batches[0]:
              gather(stored, batch).block_until_ready()

    return run

  def decode(num_passes):
    for _ in range(num_passes):
      with contextlib.redirect_stdout(None):
        # A new one, as what it has decoded it keeps.
        _ = split(cached=True).images

  def contender(name, run):
    return rounds.Contender(name, num_images, 'uint8', run)

  return [
    contender(f'DataLoader, {workers} workers', dataloader(workers)),
    contender('DataLoader, none', dataloader(0)),
    contender('cache=none: decoded each epoch', train(split(cached=False))),
    contender('cache=host, the first epoch: decoded and kept', decode),
    contender('cache=host, others', train(split(cached=True))),
    contender(
      'cache=device, gathered there',
      train(splits.DeviceSplit(split(cached=True))),
    ),
  ]


if __name__ == '__main__':
  main()
