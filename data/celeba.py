"""CelebA in a folder, as the official or Kaggle's archive unpacks.

The images are files; a list says which are train, validation and test, and
another one, which may be missing, which attributes each face has.
"""

from collections.abc import Iterator
import functools
import io

from etils import epath
import numpy as np

from data.encoded import EncodedSplit
from data.encoded import FileSplit
from data.encoded import is_hidden
from data.encoded import some
from data.encoded import SPLITS
from runs import progress
from vae import ordinary_files
from vae.errors import shown
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

# How lists of attributes say no and yes, and the class of each.
_CLASSES = {'-1': 0, '0': 0, '1': 1}


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
      f'{shown(folder)} holds the images of CelebA but no '
      'list_eval_partition.txt or .csv, which says what is train, validation '
      'and test; get it from the same place, or split at random with '
      '--config.data.source=folder.'
    )
  files = _list_images(images[0], partitions[0])
  return {
    split: FileSplit(
      images[0],
      names,
      functools.partial(_find_attributes, folder, partitions[0].parent, names),
    )
    for split, names in files.items()
  }


def _list_images(
  images: epath.Path, partition: epath.Path
) -> dict[str, list[str]]:
  """File names by split, all of which exist; prints what is not listed."""
  files = _read_partition(partition)
  # One listing is much faster than asking for each of 202,599 files.
  present = {path.name for path in images.iterdir()}
  missing = [
    name for names in files.values() for name in names if name not in present
  ]
  if missing:
    raise UserError(
      f'{shown(partition)} names {len(missing)} files that are not in '
      f'{shown(images)}: '
      f'{some(missing)}.'
    )
  listed = {name for names in files.values() for name in names}
  left_out = [name for name in sorted(present - listed) if not is_hidden(name)]
  if left_out:
    progress.say(
      f'left out of {shown(images)}: files that {partition.name} does not '
      f'name: {len(left_out):,} ({some(left_out)})'
    )
  return files


def _read_partition(path: epath.Path) -> dict[str, list[str]]:
  """File names by split, of the official list or Kaggle's .csv."""
  files = {split: [] for split in SPLITS}
  lines = {}
  for number, row in _read_rows(path):
    if row == _CSV_HEADER:
      continue
    if len(row) != 2 or row[1] not in ('0', '1', '2') or not _is_name(row[0]):
      raise UserError(
        f"{shown(path)}, line {number}: '{shown(' '.join(row), 80)}'; it must "
        'be a file name and 0 (train), 1 (validation) or 2 (test).'
      )
    name = row[0]
    _check_new(name, lines, path, number)
    files[SPLITS[int(row[1])]].append(name)
  if not lines:
    raise UserError(f'{shown(path)} names no images; get the list anew.')
  return files


def _is_name(name: str) -> bool:
  """Whether it names a file in a folder, and does not lead out of it."""
  return name not in ('', '.', '..') and not set(name) & set('/\\\0')


def _check_new(
  name: str, lines: dict[str, int], path: epath.Path, number: int
) -> None:
  """Enters the line that names an image, which must be the only one.

  An image of two splits would be trained on and tested with.
  """
  first = lines.setdefault(name, number)
  if first != number:
    raise UserError(
      f'{shown(path)}, line {number}: {shown(name, 80)} is in line {first} '
      'too; leave each image in one line.'
    )


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
  values, lines = {}, {}
  for number, row in rows:
    # Bytes, since a list has eight million values.
    try:
      classes = bytes(map(_CLASSES.__getitem__, row[1:]))
    except KeyError:
      classes = b''
    if len(classes) != len(names):
      raise UserError(
        f'{shown(path)}, line {number}: it must be a file name and -1, 0 '
        f'or 1 for each of {len(names)} attributes; get the list anew.'
      )
    _check_new(row[0], lines, path, number)
    values[row[0]] = classes
  missing = [image for image in images if image not in values]
  if missing:
    raise UserError(
      f'{shown(path)} lacks the attributes of {len(missing)} images: '
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
    counts = len(head) == 1 and head[0].isdecimal() and head[0].isascii()
    names = next(rows, (2, []))[1] if counts else []
    wanted = (
      'line 1 must be the number of images, line 2 the names of the attributes'
    )
  if not names or len(set(names)) != len(names):
    raise UserError(f'{shown(path)}: {wanted}, each once; get the list anew.')
  return tuple(names)


def _read_rows(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
  """Line numbers, from 1, and cells of a .csv's or a text's lines."""
  try:
    text = ordinary_files.read(path).decode('utf-8-sig')
  except OSError as error:
    raise UserError(
      f'{shown(path)} cannot be read ({error.strerror or error}).'
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(
      f'{shown(path)} is no text in UTF-8 ({error.reason} at byte '
      f'{error.start:,}); save it as such, or get the list anew.'
    ) from error
  separator = ',' if path.suffix == '.csv' else None
  # Ends lines where editors do, be they of Unix, Windows or an old Mac.
  lines = io.StringIO(text, newline=None)
  for number, line in enumerate(lines, start=1):
    row = [cell.strip(' \t"\n') for cell in line.split(separator)]
    if any(row):
      yield number, row
