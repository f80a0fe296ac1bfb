"""A folder of images: its splits and its classes, by the names alone."""

import collections
from collections.abc import Iterator, Sequence
import functools
import hashlib
import os

from etils import epath
import numpy as np

from data import image_files
from data.encoded import EncodedSplit, FileSplit, is_hidden, SPLITS
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
  images, left_out = [], collections.Counter()
  for name in _walk(folder):
    if any(map(is_hidden, name.split(os.sep))):
      left_out['hidden'] += 1
    elif name.lower().endswith(image_files.SUFFIXES):
      images.append(name)
    else:
      left_out[os.path.splitext(name)[1].lower() or 'without suffix'] += 1
  split_folders = _find_splits(folder, images)
  parts = {
    split: [name for name in images if _folder(name) == top]
    for split, top in split_folders.items()
  } or {'train': images}
  if beside := len(images) - sum(map(len, parts.values())):
    left_out['images beside the splits'] = beside
  if left_out:
    kinds = ', '.join(
      f'{shown(kind, 30)} {count:,}' for kind, count in sorted(left_out.items())
    )
    progress.say(f'left out of {shown(folder)}: {shown(kinds)}')
  missing = [split for split in SPLITS if split not in parts]
  if len(parts['train']) <= len(missing):
    raise UserError(
      f'{shown(folder / split_folders.get("train", ""))} holds '
      f'{len(parts["train"])} images ({" ".join(image_files.SUFFIXES)}); '
      f'{len(missing) + 1} splits need at least {len(missing) + 1}.'
    )
  parts |= _cut(parts['train'], missing)
  for split, top in split_folders.items():
    progress.say(f'{split}: {len(parts[split]):,} images of {shown(top)}/')
  for split in missing if split_folders else ():
    progress.say(
      f'{split}: {len(parts[split]):,} images of {split_folders["train"]}/, a '
      'tenth by the hashes of the names'
    )
  level = 1 if split_folders else 0
  classes = _classes(sum(parts.values(), []), level)
  return {
    split: FileSplit(
      folder,
      sorted(parts[split]),
      functools.partial(_make_labels, sorted(parts[split]), level, classes),
    )
    for split in SPLITS
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


def _find_splits(folder: epath.Path, images: list[str]) -> dict[str, str]:
  """Finds the folders at the top that are splits, by split; may be empty."""
  tops = sorted({_folder(name) for name in images})
  found = {}
  for top in tops:
    split = _SPLIT_NAMES.get(top.lower())
    if split in found:
      raise UserError(
        f'{shown(folder)} holds {found[split]}/ and {top}/, and both are the '
        f'{split} split; leave one.'
      )
    if split:
      found[split] = top
  if found and 'train' not in found:
    raise UserError(
      f'{shown(folder)} holds {" and ".join(found.values())}/ and no train/; '
      'call the folder of the training images train/, or give these other '
      'names if they are classes.'
    )
  if len(found) == 1 and set(tops) - {'', found['train']}:
    progress.say(
      f'{shown(folder)}: {found["train"]}/ is a class, as other folders are '
      'beside it and no val/ or test/.'
    )
    return {}
  below = collections.defaultdict(set)
  for name in images:
    below[_folder(name)].add(_SPLIT_NAMES.get(_folder(name, 1).lower(), ''))
  for top, names in below.items():
    if not found and len(names - {''}) > 1:  # They would be mixed.
      raise UserError(
        f'{shown(folder / top)} holds the splits {", ".join(sorted(names))}; '
        f'name it with --config.data.dir={shown(folder / top)}.'
      )
  return found


def _cut(images: list[str], missing: Sequence[str]) -> dict[str, list[str]]:
  """Cuts the missing splits, a tenth each, from the training images.

  The hash of an image's name is a number in [0, 1): below 0.1 the image is in
  the first missing split, below 0.2 in the second, else in the train split,
  whatever other images there are. A split that would be empty, as in a folder
  of a few dozen images, gets the one image with the nearest hash.
  """
  images = sorted(images, key=_hash)
  hashes = list(map(_hash, images))
  parts, start = {}, 0
  for index, split in enumerate(missing):
    end = int(np.searchsorted(hashes, _HELD_OUT * (index + 1)))
    last = len(images) - (len(missing) - index)
    end = min(max(end, start + 1), last)
    parts[split], start = images[start:end], end
  return parts | {'train': images[start:]}


def _hash(name: str) -> float:
  """A number in [0, 1) that depends on a name alone."""
  digest = hashlib.sha256(os.fsencode(name)).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def _classes(images: list[str], level: int) -> list[str]:
  """The classes' names; empty if an image has none, or all have the same."""
  classes = {_folder(name, level) for name in images}
  outside = [name for name in images if not _folder(name, level)]
  if len(classes) > 1 and outside:
    progress.say(
      f'no classes: {len(outside):,} of {len(images):,} images are in no '
      f'sub-folder, such as {shown(outside[0])}'
    )
  return sorted(classes) if len(classes) > 1 and not outside else []


def _make_labels(
  images: list[str], level: int, classes: list[str]
) -> Labels | None:
  if not classes:
    return None
  indices = {name: index for index, name in enumerate(classes)}
  values = [[indices[_folder(name, level)]] for name in images]
  return Labels(('class',), np.array(values, np.int32), {'class': classes})


def _folder(name: str, level: int = 0) -> str:
  """The folder at a level of a relative path; empty if it has none there."""
  folders = name.split(os.sep)[:-1]
  return folders[level] if len(folders) > level else ''
