"""CelebA in a folder, as the official or Kaggle's archive unpacks.

The images are files; a list says which are train, validation and test, and
another one, which may be missing, which attributes each face has.
"""

from collections.abc import Iterator
import functools
import os

from etils import epath
import numpy as np

from datasets.encoded import EncodedSplit
from datasets.encoded import FileSplit
from datasets.encoded import some
from datasets.encoded import SPLITS
from vae.errors import UserError
from vae.splits import Labels

# Where the archives put the images and the lists, relative to the folder that
# they are unpacked in.
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
_ATTRIBUTES = ('list_attr_celeba.txt', 'list_attr_celeba.csv')

_CSV_HEADER = ['image_id', 'partition']

# How the list of attributes says no and yes, and the class of each.
_CLASSES = {'-1': 0, '1': 1}


def find(folder: epath.Path) -> dict[str, EncodedSplit] | None:
  """The splits of the CelebA in a folder, or None if it is not there.

  Raises:
    UserError: what is missing, or wrong with the list of the splits.
  """
  images = [folder / d for d in _IMAGES if (folder / d).is_dir()]
  partitions = [folder / f for f in _PARTITIONS if (folder / f).exists()]
  if not images:
    return None
  if not partitions:
    raise UserError(
      f'{folder} holds the images of CelebA but no list_eval_partition.txt '
      'or .csv, which says what is train, validation and test; get it from '
      'the same place, or split at random with --config.data.source=folder.'
    )
  files = _list_images(images[0], partitions[0])
  return {
    split: FileSplit(
      [str(images[0] / name) for name in names],
      functools.partial(_find_attributes, folder, partitions[0].parent, names),
    )
    for split, names in files.items()
  }


def _list_images(
  images: epath.Path, partition: epath.Path
) -> dict[str, list[str]]:
  """File names by split, all of which exist."""
  files = _read_partition(partition)
  # One listing is much faster than asking for each of 202,599 files.
  present = {path.name for path in images.iterdir()}
  missing = [
    name for names in files.values() for name in names if name not in present
  ]
  if missing:
    raise UserError(
      f'{partition} names {len(missing)} files that are not in {images}: '
      f'{some(missing)}.'
    )
  return files


def _read_partition(path: epath.Path) -> dict[str, list[str]]:
  """File names by split, of the official list or Kaggle's .csv."""
  files = {split: [] for split in SPLITS}
  for number, row in _read_rows(path):
    if row == _CSV_HEADER:
      continue
    # A name with a folder in it could lead out of the images' folder.
    if (
      len(row) != 2
      or row[1] not in ('0', '1', '2')
      or os.path.basename(row[0]) != row[0]
    ):
      raise UserError(
        f'{path}, line {number}: {" ".join(row)!r}; it must be a file name '
        'and 0 (train), 1 (validation) or 2 (test).'
      )
    files[SPLITS[int(row[1])]].append(row[0])
  return files


def _find_attributes(
  folder: epath.Path, beside: epath.Path, images: list[str]
) -> Labels | None:
  """The attributes of these images, or None if there is no list of them."""
  for place in (beside, folder, folder / 'Anno'):
    for name in _ATTRIBUTES:
      if (place / name).exists():
        return _read_attributes(place / name, images)
  return None


def _read_attributes(path: epath.Path, images: list[str]) -> Labels:
  """Reads the official list of attributes or Kaggle's .csv.

  Args:
    path: of the list.
    images: file names.

  Returns:
    The attributes, 0 (no) or 1 (yes), in the order of `images`.

  Raises:
    UserError: the line, or the images, with which something is wrong.
  """
  rows = _read_rows(path)
  names = _read_attribute_names(path, rows)
  values = {}
  for number, row in rows:
    # Bytes, since a list has eight million values.
    try:
      classes = bytes(map(_CLASSES.__getitem__, row[1:]))
    except KeyError:
      classes = b''
    if len(classes) != len(names):
      raise UserError(
        f'{path}, line {number}: it must be a file name and -1 or 1 for each '
        f'of {len(names)} attributes; get the list anew.'
      )
    values[row[0]] = classes
  missing = [image for image in images if image not in values]
  if missing:
    raise UserError(
      f'{path} lacks the attributes of {len(missing)} images: '
      f'{some(missing)}; get the list anew.'
    )
  table = np.frombuffer(b''.join(map(values.get, images)), np.uint8)
  return Labels(names, table.reshape(-1, len(names)).astype(np.int32))


def _read_attribute_names(
  path: epath.Path, rows: Iterator[tuple[int, list[str]]]
) -> tuple[str, ...]:
  """Takes the head of a list off its rows."""
  _, head = next(rows, (1, ['']))
  if path.suffix == '.csv':
    names = head[1:] if head[0] == 'image_id' else []
    wanted = 'line 1 must be image_id and the names of the attributes'
  else:
    counts = len(head) == 1 and head[0].isdecimal()
    names = next(rows, (2, []))[1] if counts else []
    wanted = (
      'line 1 must be the number of images, line 2 the names of the attributes'
    )
  if not names:
    raise UserError(f'{path}: {wanted}; get the list anew.')
  return tuple(names)


def _read_rows(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
  """Line numbers, from 1, and cells of a .csv's or a text's lines."""
  try:
    text = path.read_bytes().decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path} cannot be read as text: {error}.') from error
  separator = ',' if path.suffix == '.csv' else None
  for number, line in enumerate(text.splitlines(), start=1):
    row = [cell.strip(' \t"') for cell in line.split(separator)]
    if any(row):
      yield number, row
