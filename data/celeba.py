"""CelebA: the official or Kaggle's archive, unpacked, or TFDS's celeb_a.

In a folder the images are files; a list has the split of each, and another
list, which may be missing, the attributes of each face.
"""

import functools
import io

from etils import epath
import numpy as np
import pandas as pd

from data import EncodedSplit, FileSplit, is_hidden, some, SPLITS
from data.folder import existing_folder
from runs import progress
from vae.errors import shown, UserError
from vae.splits import Labels

# Places of the images and of the lists, relative to the unpacked archive.
_IMAGES = (
  'img_align_celeba/img_align_celeba',
  'img_align_celeba',
  'Img/img_align_celeba',
)
_LISTS = ('', 'Anno', 'Eval')

_HOW_TO_GET_CELEBA = (
  'Get CelebA by "kaggle datasets download -d jessicali9530/celeba-dataset", '
  'unpack it and name the folder with --config.data.dir, or take '
  '--config=configs/faces.py, which needs no download.'
)


def find(data) -> dict[str, EncodedSplit]:
  """Finds CelebA in `data.dir`, or has TFDS download it."""
  if data.dir:
    folder = existing_folder(data.dir)
    for images in (folder / place for place in _IMAGES):
      if images.is_dir():
        return _find_files(folder, images)
  from data import tfds  # Takes half a second.

  try:
    return tfds.make_splits(tfds.prepare('celeb_a', data.dir))
  except UserError as error:
    raise UserError(f'{error} {_HOW_TO_GET_CELEBA}') from error


def _find_files(
  folder: epath.Path, images: epath.Path
) -> dict[str, EncodedSplit]:
  path = _find_list(folder, 'list_eval_partition')
  if path is None:
    raise UserError(
      f'{shown(folder)} holds no list_eval_partition.txt or .csv; get it from '
      'where the images are from, or add --config.data.source=folder.'
    )
  splits = _read_splits(path)
  # One listing is much faster than asking for each of 202,599 files.
  present = {image.name for image in images.iterdir()}
  if missing := [name for name in splits.index if name not in present]:
    raise UserError(
      f'{shown(path)} names {len(missing)} files that are not in '
      f'{shown(images)}: {some(missing)}.'
    )
  others = present.difference(splits.index)
  if others := sorted(name for name in others if not is_hidden(name)):
    progress.say(
      f'left out of {shown(images)}: {len(others):,} files that '
      f'{path.name} does not name ({some(others)})'
    )
  found = {}
  for number, split in enumerate(SPLITS):
    names = splits.index[splits == str(number)].to_list()
    read_labels = functools.partial(_read_attributes, folder, names)
    found[split] = FileSplit(images, names, read_labels)
  return found


def _find_list(folder: epath.Path, name: str) -> epath.Path | None:
  files = (f'{name}.txt', f'{name}.csv')
  places = (folder / place / file for place in _LISTS for file in files)
  return next((path for path in places if path.exists()), None)


def _read_splits(path: epath.Path) -> pd.Series:
  """The number of the split, as text, by the name of the file."""
  splits = _read_list(path, header=None, names=[0, 1], dtype=str)[1]
  splits = splits.drop('image_id', errors='ignore')  # The head of a .csv.
  # An image of two splits would be trained on and tested with.
  wrong = ~splits.isin(['0', '1', '2']) | splits.index.duplicated()
  if wrong.any():
    raise UserError(
      f'{shown(path)} does not have each file once, with 0 (train), 1 '
      f'(validation) or 2 (test): {some(splits.index[wrong])}.'
    )
  return splits


def _read_attributes(folder: epath.Path, images: list[str]) -> Labels | None:
  """Reads the attributes, 0 (no) or 1 (yes)."""
  path = _find_list(folder, 'list_attr_celeba')
  if path is None:
    return None
  # In a text the number of images comes first.
  table = _read_list(path, skiprows=int(path.suffix == '.txt'))
  table = table.apply(pd.to_numeric, errors='coerce')
  table = table[~table.index.duplicated()].reindex(images)
  wrong = ~table.isin([-1, 0, 1]).all(axis='columns')
  if table.empty:
    raise UserError(f'{shown(path)} names no attributes; get the list again.')
  if wrong.any():
    raise UserError(
      f'{shown(path)} lacks the attributes of {wrong.sum()} images: '
      f'{some(table.index[wrong])}; get the list again.'
    )
  values = (table.to_numpy() == 1).astype(np.int32)
  return Labels(tuple(table.columns), values)


def _read_list(path: epath.Path, **options) -> pd.DataFrame:
  """A table by the names of the files, of a .csv or a text with blanks."""
  try:
    return pd.read_csv(
      io.BytesIO(path.read_bytes()),
      sep=',' if path.suffix == '.csv' else r'\s+',
      index_col=0,
      encoding='utf-8-sig',
      **options,
    )
  except (OSError, ValueError) as error:
    raise UserError(
      f'{shown(path)} cannot be read ({shown(error)}); get the list again.'
    ) from error
