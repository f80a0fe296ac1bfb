"""A folder of images: its splits and its classes, by the names alone."""

from collections.abc import Iterator
import functools
import hashlib
import os

from etils import epath
import numpy as np

from data import (
  EncodedSplit,
  FileSplit,
  image_files,
  is_hidden,
  some,
  SPLITS,
)
from runs import progress
from vae import paths
from vae.errors import shown, UserError
from vae.splits import Labels

# Names of folders at the top, in lower case, and the split that each holds.
_SPLIT_NAMES = {
  **dict.fromkeys(('train', 'training'), 'train'),
  **dict.fromkeys(('val', 'valid', 'validation', 'dev'), 'validation'),
  **dict.fromkeys(('test', 'testing'), 'test'),
}

# Share of the training images that a missing split is given.
_HELD_OUT = 0.1


def find(data) -> dict[str, EncodedSplit]:
  """Lists the images in `data.dir` as three splits; prints what is left out.

  Folders called train, val and test (see `_SPLIT_NAMES`) at the top are the
  splits. A missing validation or test split is cut from the training images;
  without such folders, all images are training images. Classes are the
  sub-folders, of the splits or of the folder, if every image is in one.

  Raises:
    UserError: if there are too few images, or the names do not separate the
      training images from the others.
  """
  folder = existing_folder(data.dir)
  files = list(_walk(folder))
  images = [name for name in files if _is_image(name)]
  split_folders = _find_splits(folder, images)
  parts = {
    split: [name for name in images if _folder(name) == top]
    for split, top in split_folders.items()
  } or {'train': images}
  if left_out := sorted(set(files).difference(*parts.values())):
    progress.say(
      f'left out of {shown(folder)}: {len(left_out):,} files that are hidden, '
      f'no images, or in no split ({some(left_out)})'
    )
  parts = _cut_missing(folder, parts)
  for split, names in parts.items():
    top = split_folders.get(split)
    place = f'of {shown(top)}/' if top else 'chosen by the hashes of the names'
    progress.say(f'{split}: {len(names):,} images {place}')
  labels = _labels(parts, level=1 if split_folders else 0)
  return {
    split: FileSplit(folder, names, functools.partial(labels.get, split))
    for split, names in parts.items()
  }


def existing_folder(directory: str) -> epath.Path:
  """The folder `config.data.dir`; raises a UserError if there is none."""
  folder = epath.Path(directory).expanduser()
  if not folder.is_dir():
    raise UserError(
      f'config.data.dir is {shown(directory)}; there is no such folder.'
    )
  return folder


def _walk(top: epath.Path) -> Iterator[str]:
  """Relative paths of the files below a folder, each real folder once."""
  if paths.is_remote(top):
    yield from paths.list_files(top)
    return

  def fail(error):  # `os.walk` would skip a folder that it cannot list.
    raise error

  seen = set()  # Links may form a loop.
  for root, folders, files in os.walk(top, onerror=fail, followlinks=True):
    real = os.path.realpath(root)
    if real in seen:
      folders.clear()
      continue
    seen.add(real)
    # Real folders before links to them.
    folders.sort(key=lambda name: (os.path.islink(f'{root}/{name}'), name))
    place = os.path.relpath(root, top)
    yield from (os.path.normpath(os.path.join(place, name)) for name in files)


def _is_image(name: str) -> bool:
  hidden = any(map(is_hidden, name.split(os.sep)))
  return name.lower().endswith(image_files.SUFFIXES) and not hidden


def _find_splits(folder: epath.Path, images: list[str]) -> dict[str, str]:
  """Finds the folders at the top that are splits, by split; may be empty."""
  tops = sorted({_folder(name) for name in images})
  found = [top for top in tops if top.lower() in _SPLIT_NAMES]
  by_split = {_SPLIT_NAMES[top.lower()]: top for top in found}
  if len(by_split) < len(found) or (found and 'train' not in by_split):
    raise UserError(
      f'{shown(folder)} holds {", ".join(found)}; there must be one folder for '
      'train, and at most one each for val and test. Rename those of classes.'
    )
  if len(found) == 1 and set(tops) - {'', *found}:
    progress.say(f'{found[0]}/ is a class, as there is no val/ or test/.')
    return {}
  for top in () if found else tops:
    below = {_folder(name, 1) for name in images if _folder(name) == top}
    if len(names := sorted(n for n in below if n.lower() in _SPLIT_NAMES)) > 1:
      raise UserError(
        f'{shown(folder / top)} holds {", ".join(names)}, which must not be '
        f'mixed; name it with --config.data.dir={shown(folder / top)}.'
      )
  return by_split


def _cut_missing(
  folder: epath.Path, parts: dict[str, list[str]]
) -> dict[str, list[str]]:
  """All splits, sorted; the missing ones are cut from the training images.

  The hash of an image's name is a number in [0, 1): below 0.1 the image is in
  the first missing split, below 0.2 in the second, else in the train split,
  whatever other images there are. A split that would be empty, as in a folder
  of a few dozen images, gets the one image with the nearest hash.
  """
  missing = [split for split in SPLITS if split not in parts]
  images = sorted(parts['train'], key=_hash)
  if len(images) <= len(missing):
    raise UserError(
      f'{shown(folder)} holds {len(images)} images to train on '
      f'({" ".join(image_files.SUFFIXES)}); {len(missing) + 1} splits need at '
      f'least {len(missing) + 1}.'
    )
  hashes = list(map(_hash, images))
  parts, start = dict(parts), 0
  for index, split in enumerate(missing):
    end = int(np.searchsorted(hashes, _HELD_OUT * (index + 1)))
    last = len(images) - (len(missing) - index)
    end = min(max(end, start + 1), last)
    parts[split], start = images[start:end], end
  parts['train'] = images[start:]
  return {split: sorted(parts[split]) for split in SPLITS}


def _hash(name: str) -> float:
  """A number in [0, 1) that depends on a name alone."""
  digest = hashlib.sha256(os.fsencode(name)).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def _labels(
  parts: dict[str, list[str]], level: int
) -> dict[str, Labels | None]:
  """Classes by the folders at this level; None unless all images have one."""
  images = sum(parts.values(), [])
  classes = sorted({_folder(name, level) for name in images})
  outside = [name for name in images if not _folder(name, level)]
  if len(classes) > 1 and outside:
    progress.say(
      f'no classes: {len(outside):,} of {len(images):,} images are in no '
      f'sub-folder, such as {shown(outside[0])}'
    )
  if len(classes) == 1 or outside:
    return dict.fromkeys(parts)
  indices = {name: index for index, name in enumerate(classes)}
  labels = {}
  for split, names in parts.items():
    values = [[indices[_folder(name, level)]] for name in names]
    values = np.array(values, np.int32)
    labels[split] = Labels(('class',), values, {'class': classes})
  return labels


def _folder(name: str, level: int = 0) -> str:
  """The folder at a level of a relative path; empty if it has none there."""
  folders = name.split(os.sep)[:-1]
  return folders[level] if len(folders) > level else ''
