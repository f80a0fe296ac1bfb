"""A folder of images: its splits and its classes, by the names alone."""

import collections
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import hashlib
import os

from etils import epath
import numpy as np

from data import image_files
from data.encoded import EncodedSplit
from data.encoded import FileSplit
from data.encoded import is_hidden
from data.encoded import SPLITS
from runs import progress
from vae.errors import shown
from vae.errors import UserError
from vae.paths import is_remote
from vae.paths import list_files
from vae.splits import Labels

# Names of folders at the top, in lower case, and the split that each holds.
_SPLIT_NAMES = {
  'train': 'train',
  'training': 'train',
  'val': 'validation',
  'valid': 'validation',
  'validation': 'validation',
  'dev': 'validation',
  'test': 'test',
  'testing': 'test',
}

# Share of the training images that a missing split is given.
_HELD_OUT = 0.1


def find(folder: epath.Path) -> dict[str, EncodedSplit]:
  """Lists the images of a folder as a train, a validation and a test split.

  Folders called train, val and test (see `_SPLIT_NAMES`) at the top are the
  splits. A missing validation or test split is cut from the training images;
  without such folders, all images are training images. Classes are the
  sub-folders, of the splits or of the folder, if every image is in one. Prints
  what is left out.

  Args:
    folder: local or in a bucket.

  Raises:
    UserError: if there are too few images, or the names do not say which of
      them are to be trained on.
  """
  paths, left_out = _list_images(folder, _SPLIT_NAMES)
  split_folders = _find_splits(folder, paths)
  if not split_folders and any(
    _folder(p).lower() in _SPLIT_NAMES for p in paths
  ):
    # A class has the name of a split, and a link to it would repeat its images.
    paths, left_out = _list_images(folder, {})
  if split_folders:
    parts = {
      split: [path for path in paths if _folder(path) == name]
      for split, name in split_folders.items()
    }
    beside = [p for p in paths if _folder(p) not in split_folders.values()]
    if beside:
      left_out.append(
        f'images beside the folders of the splits: {len(beside):,} '
        f'({_counts(_folder(path) or "in no folder" for path in beside)})'
      )
  else:
    parts = {'train': paths}
  if left_out:
    progress.say(f'left out of {shown(folder)}: {"; ".join(left_out)}')
  missing = [split for split in SPLITS if split not in parts]
  if len(parts['train']) <= len(missing):
    raise UserError(
      f'{shown(folder / split_folders.get("train", ""))} holds '
      f'{len(parts["train"])} images ({" ".join(image_files.SUFFIXES)}); '
      f'{len(missing) + 1} splits need at least {len(missing) + 1}.'
    )
  parts |= _cut(parts['train'], missing)
  if split_folders:
    _say_splits(folder, split_folders, missing)
  level = 1 if split_folders else 0
  classes = _classes(sum(parts.values(), []), level)
  return {
    split: FileSplit(
      folder,
      sorted(parts[split]),
      functools.partial(_read_labels, sorted(parts[split]), level, classes),
    )
    for split in SPLITS
  }


# Which files there are.


def _list_images(
  folder: epath.Path, split_names: Mapping[str, str]
) -> tuple[list[str], list[str]]:
  """Lists the images' relative paths, and counts the other files in words."""
  images, others, repeated, num_hidden = [], [], [], 0
  for root, folders, files in _walk(str(folder), split_names, repeated):
    visible = [name for name in folders if not is_hidden(name)]
    num_hidden += len(folders) - len(visible)
    folders[:] = visible
    place = os.path.relpath(root, folder)
    for name in files:
      if is_hidden(name):
        num_hidden += 1
      elif name.lower().endswith(image_files.SUFFIXES):
        images.append(os.path.normpath(os.path.join(place, name)))
      else:
        others.append(_kind(os.path.join(root, name)))
  left_out = []
  if others:
    left_out.append(
      f'files that are no images: {len(others):,} ({_counts(others)})'
    )
  if repeated:
    left_out.append(f'links to folders that are listed: {len(repeated):,}')
  if num_hidden:
    left_out.append(f'hidden files and folders: {num_hidden:,}')
  return images, left_out


def _walk(
  top: str, split_names: Mapping[str, str], repeated: list[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
  """Walks a folder as `os.walk` does, and follows links to folders.

  Links come after all real folders, and each folder is visited once per split,
  as links may form a loop or lead to one folder twice.

  Args:
    top: the folder.
    split_names: the split of each name of a folder in it, in lower case.
    repeated: gets the links to folders that were visited before.

  Yields:
    A folder's path, and the names of the folders and of the files in it.
  """
  if is_remote(top):
    yield from _walk_names(top, list_files(top))
    return
  seen = {(split, _identity(top)) for split in SPLITS}
  waiting = collections.deque([top])
  while waiting:
    for root, folders, files in os.walk(waiting.popleft(), onerror=_raise):
      head = os.path.relpath(root, top).split(os.sep)[0]
      key = (split_names.get(head.lower()), _identity(root))
      if key in seen:
        folders.clear()
        repeated.append(root)
        continue
      seen.add(key)
      folders.sort()
      yield root, folders, files
      paths = [os.path.join(root, name) for name in folders]
      waiting.extend(filter(os.path.islink, paths))


def _walk_names(
  top: str, names: Iterable[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
  """As `os.walk`, from the names of all files, relative to the folder."""
  folders, files = collections.defaultdict(set), collections.defaultdict(list)
  for name in names:
    place, name = os.path.split(name)
    files[place].append(name)
    while place:
      parent, folder = os.path.split(place)
      folders[parent].add(folder)
      place = parent
  waiting = collections.deque([''])
  while waiting:
    place = waiting.popleft()
    visited = sorted(folders[place])
    yield os.path.join(top, place), visited, files[place]
    waiting.extend(os.path.join(place, folder) for folder in visited)


def _identity(folder: str) -> tuple[int, int]:
  facts = os.stat(folder)
  return facts.st_dev, facts.st_ino


def _raise(error: OSError) -> None:
  # `os.walk` would skip a folder that it cannot list.
  raise error


def _kind(path: str) -> str:
  """The suffix of a file that is no image, or a word in its place."""
  if os.path.islink(path) and not os.path.exists(path):
    return 'broken link'
  return os.path.splitext(path)[1].lower() or 'without suffix'


def _counts(kinds: Iterable[str]) -> str:
  """Such as `.txt 2, .csv 1`: the commonest first, the rest together."""
  counts = collections.Counter(sorted(kinds)).most_common()
  listed = [f'{shown(kind, 30)} {count:,}' for kind, count in counts[:5]]
  if rest := sum(count for _, count in counts[5:]):
    listed.append(f'others {rest:,}')
  return ', '.join(listed)


# Splits.


def _find_splits(folder: epath.Path, paths: list[str]) -> dict[str, str]:
  """Finds the folders at the top that are splits, by split; may be empty.

  Raises:
    UserError: if the names do not say which images are to be trained on.
  """
  tops = sorted({_folder(path) for path in paths})
  found = {}
  for name in tops:
    split = _SPLIT_NAMES.get(name.lower())
    if split in found:
      raise UserError(
        f'{shown(folder)} holds {found[split]}/ and {name}/, and both are the '
        f'{split} split; leave one.'
      )
    if split:
      found[split] = name
  if found and 'train' not in found:
    raise UserError(
      f'{shown(folder)} holds {" and ".join(found.values())}/ and no train/; '
      'call the folder of the training images train/, or give these other '
      'names if they are classes.'
    )
  others = [name for name in tops if name and name not in found.values()]
  if len(found) == 1 and others:
    progress.say(
      f'{shown(folder)}: {found["train"]}/ is a class, as '
      f'{shown(others[0])}/ is beside it and no val/ or test/.'
    )
    return {}
  if not found:
    _check_no_splits_below(folder, paths)
  return found


def _check_no_splits_below(folder: epath.Path, paths: list[str]) -> None:
  """Refuses split folders one level below the top: they would be mixed."""
  names = collections.defaultdict(set)
  for path in paths:
    if _folder(path, 1).lower() in _SPLIT_NAMES:
      names[_folder(path)].add(_folder(path, 1))
  for top, found in sorted(names.items()):
    if len({_SPLIT_NAMES[name.lower()] for name in found}) > 1:
      listed = ' and '.join(f'{shown(top)}/{name}/' for name in sorted(found))
      raise UserError(
        f'{shown(folder)} holds {listed}; splits must be at the top: '
        f'--config.data.dir={shown(folder / top)}.'
      )


def _cut(paths: list[str], missing: Sequence[str]) -> dict[str, list[str]]:
  """Cuts the missing splits, a tenth each, from the training images.

  The hash of an image's name is a number in [0, 1): below 0.1 the image is in
  the first missing split, below 0.2 in the second, else in the train split,
  whatever other images there are. A split that would be empty, as in a folder
  of a few dozen images, gets the one image with the nearest hash.

  Args:
    paths: of the images, more than `missing`.
    missing: the splits to be cut.

  Returns:
    The images of the missing splits, and those that are left for training.
  """
  paths = sorted(paths, key=_hash)
  hashes = list(map(_hash, paths))
  parts, start = {}, 0
  for index, split in enumerate(missing):
    end = int(np.searchsorted(hashes, _HELD_OUT * (index + 1)))
    last = len(paths) - (len(missing) - index)
    end = min(max(end, start + 1), last)
    parts[split], start = paths[start:end], end
  return parts | {'train': paths[start:]}


def _hash(path: str) -> float:
  """A number in [0, 1) that depends on a name alone."""
  digest = hashlib.sha256(os.fsencode(path)).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def _say_splits(
  folder: epath.Path, split_folders: dict[str, str], missing: list[str]
) -> None:
  found = [
    f'{split} is {split_folders[split]}/'
    for split in SPLITS
    if split in split_folders
  ]
  cut = [
    f'{split} is a tenth of {split_folders["train"]}/, by the hashes of the '
    'names'
    for split in missing
  ]
  progress.say(f'splits of {shown(folder)}: {"; ".join(found + cut)}')


# Classes.


def _classes(paths: list[str], level: int) -> list[str]:
  """The classes' names; empty if an image has none, or all have the same."""
  outside = [path for path in paths if not _folder(path, level)]
  classes = {_folder(path, level) for path in paths} - {''}
  if classes and outside:
    progress.say(
      f'no classes: {len(outside):,} of {len(paths):,} images are in no '
      f'sub-folder, such as {shown(outside[0])}'
    )
  return sorted(classes) if len(classes) > 1 and not outside else []


def _read_labels(
  paths: list[str], level: int, classes: list[str]
) -> Labels | None:
  if not classes:
    return None
  indices = {name: index for index, name in enumerate(classes)}
  values = [[indices[_folder(path, level)]] for path in paths]
  return Labels(('class',), np.array(values, np.int32), {'class': classes})


def _folder(path: str, level: int = 0) -> str:
  """The folder at a level of a relative path; empty if it has none there."""
  folders = path.split(os.sep)[:-1]
  return folders[level] if len(folders) > level else ''
