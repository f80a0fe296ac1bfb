"""Sources of images, one module each, found by name.

A source is a module with a function `find(data)`, which gets `config.data` and
returns an `EncodedSplit` for each of 'train', 'validation' and 'test': images
before they are decoded, in files or in memory.
"""

from __future__ import annotations  # Annotations would import it.

from collections.abc import Callable, Iterable, Sequence
import hashlib
import os
import sys

from etils import epath
import fsspec
import ml_collections
import numpy as np

from runs import tf
from vae import paths, registry
from vae.errors import shown, UserError
from vae.splits import Labels

SPLITS = ('train', 'validation', 'test')

# Folders that macOS's archives and Synology's disks add.
_SYSTEM_NAMES = ('__MACOSX', '@eaDir')

# Objects of a bucket that are fetched at a time.
_FETCHED_AT_ONCE = 64


def find(data: ml_collections.ConfigDict) -> dict[str, EncodedSplit]:
  """Finds the train, validation and test split that `config.data` describes.

  Raises:
    UserError: if there is no such source, or data is missing or damaged.
  """
  find_splits = registry.find('data', data.source, 'find')
  try:
    return find_splits(data)
  except OSError as error:
    raise UserError(
      f'config.data.dir is {shown(data.dir)!r}; '
      f'{shown(error.filename or "it")} cannot be read '
      f'({error.strerror or shown(error)}).'
    ) from error


class EncodedSplit:
  """Base class of a source's splits.

  A subclass sets `num_examples` and overrides `items`, and `open` if an item is
  not yet an image.
  """

  num_examples: int
  # Images that are opened at a time.
  threads = (
    len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
  )

  def items(self, indices: np.ndarray) -> tf.data.Dataset:
    """One item for each of `indices`, in this order."""
    raise NotImplementedError

  def open(self, item: tf.Tensor) -> tf.Tensor:
    """An item's image: a file's bytes, or uint8 [height, width, channels]."""
    return item

  def labels(self) -> Labels | None:
    """Reads the labels of all images; None if there are none."""
    return None

  def name(self, index: int) -> str:
    """An image's name in messages."""
    return f'example {index}'

  def fingerprint(self) -> str | None:
    """A digest that changes with the images; None: keep none on disk."""
    return None

  def names_digest(self, indices: np.ndarray) -> str | None:
    """A digest of the names of these images, wherever they lie."""
    return digest(*map(self.name, indices))

  def read(
    self, indices: np.ndarray, decode: Callable[[tf.Tensor], tf.Tensor]
  ) -> tf.data.Dataset:
    """Pairs of a position in `indices`, ascending, and a decoded image.

    Images that cannot be opened or decoded are left out.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = self.threads
    options.threading.max_intra_op_parallelism = 1

    @tf.autograph.experimental.do_not_convert  # Which takes seconds.
    def decoded(position, item):
      return position, decode(self.open(item))

    images = self.items(indices).enumerate()
    images = images.map(decoded, 2 * self.threads, deterministic=True)
    return images.ignore_errors().with_options(options)

  def content(self, index: int) -> bytes:
    """The bytes of an image file; raises a tf.errors.OpError."""
    [item] = self.items(np.array([index]))
    return self.open(item).numpy()


class MemorySplit(EncodedSplit):
  """Images in host memory."""

  def __init__(
    self, images: Sequence[bytes] | np.ndarray, labels: Labels | None = None
  ):
    """Copies images: files' bytes, or uint8 [n, height, width, channels]."""
    self._images, self._labels = tf.constant(images), labels
    self.num_examples = len(images)

  def items(self, indices):
    return tf.data.Dataset.from_tensor_slices(np.asarray(indices, np.int64))

  def open(self, item):
    return tf.gather(self._images, item)

  def labels(self):
    return self._labels


class FileSplit(EncodedSplit):
  """Images that are a file each, on a disk or in a bucket."""

  def __init__(
    self,
    folder: epath.PathLike,
    names: Sequence[str],
    read_labels: Callable[[], Labels | None] = lambda: None,
  ):
    """Lists the files, whose paths are relative to the folder."""
    self._folder, self.labels = str(folder), read_labels
    self.num_examples = len(names)
    # Bytes, as some file systems' names are no UTF-8.
    self._names = np.array([os.fsencode(name) for name in names], object)
    if paths.is_remote(folder):
      self.threads = _FETCHED_AT_ONCE

  def items(self, indices):
    top = os.fsencode(self._folder)
    found = [os.path.join(top, name) for name in self._names[indices]]
    return tf.data.Dataset.from_tensor_slices(tf.constant(found, tf.string))

  def open(self, item):
    if paths.is_remote(self._folder):
      # TensorFlow's own client makes a new connection for each object.
      return tf.numpy_function(_fetch, [item], tf.string)
    return tf.io.read_file(item)

  def name(self, index):
    return os.path.join(self._folder, os.fsdecode(self._names[index]))

  def fingerprint(self):
    return files_digest(self._folder, self._names)

  def names_digest(self, indices):
    return digest(*self._names[indices])


def _fetch(path: bytes) -> bytes:
  path = np.asarray(path, object).item()  # Outside a graph it is an array.
  return fsspec.filesystem('gcs').cat_file(os.fsdecode(path))


def files_digest(folder: str, names: Iterable[bytes]) -> str | None:
  """A digest of files' paths, sizes and times; None if one is missing.

  In a bucket, generations stand for sizes and times.
  """
  if paths.is_remote(folder):
    generations = paths.list_generations(folder)
    names = map(os.fsdecode, names)
    return digest(folder, *((name, generations.get(name)) for name in names))
  hashed, folder = hashlib.sha256(), os.fsencode(os.path.abspath(folder))
  for name in names:
    path = os.path.join(folder, name)
    try:
      facts = os.stat(path)
    except OSError:
      return None
    hashed.update(b'%s\n%d\n%d\n' % (path, facts.st_size, facts.st_mtime_ns))
  return hashed.hexdigest()


def digest(*parts: object) -> str:
  """A short digest of the parts, in this order."""
  hashed = hashlib.sha256()
  for part in parts:
    data = part if isinstance(part, bytes) else repr(part).encode()
    hashed.update(len(data).to_bytes(8, 'big') + data)
  return hashed.hexdigest()[:20]


def is_hidden(name: str) -> bool:
  """Whether a file or folder of this name is not data."""
  return name.startswith('.') or name in _SYSTEM_NAMES


def some(names: Sequence[str]) -> str:
  """The first few names, and the number of the others."""
  more = len(names) - 3
  first = ', '.join(map(shown, names[:3]))
  return first + (f' and {more} more' if more > 0 else '')
