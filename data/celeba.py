"""CelebA: the official or Kaggle's archive, unpacked, or TFDS's celeb_a.

In a folder the images are files; a list has the split of each, and another
list, which may be missing, the attributes of each face.
"""

from collections.abc import Iterator
import functools

from etils import epath
import numpy as np

from data import tfds
from data.encoded import EncodedSplit, FileSplit, is_hidden, some, SPLITS
from data.folder import existing_folder
from runs import progress
from vae.errors import shown, UserError
from vae.splits import Labels

# Places of the images and the lists, relative to the unpacked archive.
_IMAGES = (
  'img_align_celeba/img_align_celeba',
  'img_align_celeba',
  'Img/img_align_celeba',
)
_PARTITIONS = (
  'list_eval_partition.txt',
  'list_eval_partition.csv',
  'Eval/list_eval_partition.txt',
)
_ATTRIBUTES = tuple(
  f'{folder}list_attr_celeba.{suffix}'
  for folder in ('', 'Anno/', 'Eval/')
  for suffix in ('txt', 'csv')
)

# Classes of an attribute's values: no and yes.
_CLASSES = {'-1': 0, '0': 0, '1': 1}

_HOW_TO_GET_CELEBA = (
  'Get CelebA from Kaggle (kaggle datasets download -d '
  'jessicali9530/celeba-dataset && unzip -q celeba-dataset.zip -d celeba) and '
  'name the folder with --config.data.dir=celeba. --config=configs/faces.py '
  'needs no download.'
)


def find(data) -> dict[str, EncodedSplit]:
  """Finds CelebA in `data.dir`, or has TFDS download it.

  Raises:
    UserError: if it is not there, or a list is damaged.
  """
  if data.dir:
    folder = existing_folder(data.dir)
    for images in (folder / place for place in _IMAGES):
      if images.is_dir():
        return _find_files(folder, images)
  try:
    return tfds.make_splits(tfds.prepare('celeb_a', data.dir))
  except UserError as error:
    raise UserError(f'{error} {_HOW_TO_GET_CELEBA}') from error


def _find_files(
  folder: epath.Path, images: epath.Path
) -> dict[str, EncodedSplit]:
  partitions = [folder / f for f in _PARTITIONS if (folder / f).exists()]
  if not partitions:
    raise UserError(
      f'{shown(folder)} holds the images of CelebA but no '
      'list_eval_partition.txt or .csv with their splits; get it from the same '
      'place, or split at random with --config.data.source=folder.'
    )
  files = _read_partition(partitions[0])
  # One listing is much faster than asking for each of 202,599 files.
  present = {path.name for path in images.iterdir()}
  listed = [name for names in files.values() for name in names]
  if missing := [name for name in listed if name not in present]:
    raise UserError(
      f'{shown(partitions[0])} names {len(missing)} files that are not in '
      f'{shown(images)}: {some(missing)}.'
    )
  left_out = [n for n in sorted(present - set(listed)) if not is_hidden(n)]
  if left_out:
    progress.say(
      f'left out of {shown(images)}: files that {partitions[0].name} does not '
      f'name: {len(left_out):,} ({some(left_out)})'
    )
  return {
    split: FileSplit(
      images, names, functools.partial(_find_attributes, folder, names)
    )
    for split, names in files.items()
  }


def _read_partition(path: epath.Path) -> dict[str, list[str]]:
  """File names by split."""
  files, seen = {split: [] for split in SPLITS}, set()
  for number, row in _read_rows(path):
    if row == ['image_id', 'partition']:
      continue
    # An image of two splits would be trained on and tested with.
    valid = len(row) == 2 and row[1] in ('0', '1', '2') and '/' not in row[0]
    if not valid or row[0] in seen:
      raise UserError(
        f"{shown(path)}, line {number}: '{shown(' '.join(row), 80)}'; it must "
        'be a file name that is in no line before, and 0 (train), 1 '
        '(validation) or 2 (test).'
      )
    seen.add(row[0])
    files[SPLITS[int(row[1])]].append(row[0])
  return files


def _find_attributes(folder: epath.Path, images: list[str]) -> Labels | None:
  """Reads the attributes, 0 (no) or 1 (yes), in the order of `images`."""
  lists = [folder / f for f in _ATTRIBUTES if (folder / f).exists()]
  if not lists:
    return None
  path, values = lists[0], {}
  rows = list(_read_rows(path))
  if path.suffix == '.csv':
    head, rows = rows[:1], rows[1:]
    names = head[0][1][1:] if head else []
  else:  # The number of images comes first.
    head, rows = rows[:2], rows[2:]
    names = head[1][1] if head[1:] else []
  for number, row in rows:
    try:  # Bytes, since a list has eight million values.
      values[row[0]] = bytes(map(_CLASSES.__getitem__, row[1:]))
    except KeyError:
      values[row[0]] = b''
    if len(values[row[0]]) != len(names):
      raise UserError(
        f'{shown(path)}, line {number}: it must be a file name and -1, 0 or 1 '
        f'for each of {len(names)} attributes; get the list again.'
      )
  if missing := [image for image in images if image not in values]:
    raise UserError(
      f'{shown(path)} lacks the attributes of {len(missing)} images: '
      f'{some(missing)}; get the list again.'
    )
  table = np.frombuffer(b''.join(map(values.get, images)), np.uint8)
  return Labels(tuple(names), table.reshape(len(images), -1).astype(np.int32))


def _read_rows(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
  """Line numbers, from 1, and cells of a .csv's or a text's lines."""
  try:
    text = path.read_bytes().decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{shown(path)} cannot be read ({shown(reason)}); get the list again.'
    ) from error
  separator = ',' if path.suffix == '.csv' else None
  for number, line in enumerate(text.splitlines(), start=1):
    row = [cell.strip(' \t"') for cell in line.split(separator)]
    if any(row):
      yield number, row
