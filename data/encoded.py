"""The encoded images of a split: a file each, or the records of TFDS.

Labels, where there are any, lie beside the images and are read on demand.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import errno
import hashlib
import os
import sys
from typing import Protocol

from etils import epath
import fsspec
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from data.decoded import digest
from vae import ordinary_files
from vae.errors import shown
from vae.errors import UserError
from vae.paths import is_remote
from vae.paths import list_generations
from vae.splits import Labels

SPLITS = ('train', 'validation', 'test')

# Folders that macOS's archives and Synology's disks add.
_SYSTEM_NAMES = ('__MACOSX', '@eaDir')

# That this process may use.
CORES = (
  len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
)

# Objects of a bucket that are waited for at a time.
_FETCHED_AT_ONCE = 64

# Files that are looked at together, before they are read.
_LOOKED_AT = 256

# Many images at a time use the cores; to share one's pixels out costs more than
# it gains, a quarter of the time.
tf.config.threading.set_intra_op_parallelism_threads(1)


class EncodedSplit(Protocol):
  """The encoded images of a split, before they are decoded."""

  num_examples: int

  def read(
    self, indices: np.ndarray, decode: Callable[[tf.Tensor], tf.Tensor]
  ) -> tf.data.Dataset:
    """The images at `indices`, in this order.

    Args:
      indices: of the images.
      decode: from encoded bytes, a scalar string, to an image.
    """

  def content(self, index: int) -> bytes:
    """The encoded bytes of an image.

    Raises:
      OSError: why they cannot be read, in words, as the error's `strerror`.
    """

  def labels(self) -> Labels | None:
    """Reads the labels of all images, in their order; None without any.

    Raises:
      UserError: what is wrong with them.
    """

  def name(self, index: int) -> str:
    """What to call an image in a message."""

  def unreadable(self) -> UserError:
    """The error where images fail to come and none of them is at fault."""

  def fingerprint(self) -> str | None:
    """Changes when an image does; None where that cannot be told quickly."""

  def names_digest(self, indices: np.ndarray) -> str:
    """Says which images are at `indices`, wherever the data lies."""


class FileSplit:
  """Images that are a file each."""

  def __init__(
    self,
    folder: epath.PathLike,
    names: Sequence[str],
    read_labels: Callable[[], Labels | None] = lambda: None,
  ):
    """Takes the images' files and what reads their labels.

    Args:
      folder: that they are in.
      names: of the files, relative to it.
      read_labels: as of `labels`.
    """
    # Bytes, as some file systems' names are no UTF-8.
    names = [os.fsencode(name) for name in names]
    folder = os.fsencode(str(folder))
    paths = [os.path.join(folder, name) for name in names]
    self._names = np.array(names, dtype=object)
    self._paths = np.array(paths, dtype=object)
    self._read_labels = read_labels
    self._folder = os.fsdecode(folder)
    self._remote = is_remote(self._folder)
    self.num_examples = len(names)

  def read(
    self, indices: np.ndarray, decode: Callable[[tf.Tensor], tf.Tensor]
  ) -> tf.data.Dataset:
    """See `EncodedSplit`."""
    paths = tf.data.Dataset.from_tensor_slices(
      tf.constant(self._paths[indices], tf.string)
    )
    if self._remote:
      # TensorFlow's own client connects anew for each object.
      return _with_options(
        paths.map(
          lambda path: decode(tf.numpy_function(_fetch, [path], tf.string)),
          _FETCHED_AT_ONCE,
          deterministic=True,
        ),
        _FETCHED_AT_ONCE,
      )
    # Just before they are read, as what a name stands for may change.
    paths = paths.batch(_LOOKED_AT).map(
      lambda some: tf.numpy_function(_only_files, [some], tf.string)
    )
    paths = paths.unbatch()
    # In one call each, which is a fifth faster than in two.
    return _with_options(
      paths.map(
        lambda path: decode(tf.io.read_file(path)),
        2 * CORES,
        deterministic=True,
      )
    )

  def content(self, index: int) -> bytes:
    """See `EncodedSplit`."""
    return ordinary_files.read(epath.Path(os.fsdecode(self._paths[index])))

  def labels(self) -> Labels | None:
    """See `EncodedSplit`."""
    return self._read_labels()

  def name(self, index: int) -> str:
    """See `EncodedSplit`."""
    return os.fsdecode(self._paths[index])

  def unreadable(self) -> UserError:
    """See `EncodedSplit`."""
    return UserError(
      f'images beside {shown(self.name(0))} could not be read for a moment; '
      'see what changes them, and run the same command again.'
    )

  def fingerprint(self) -> str | None:
    """See `EncodedSplit`: of names, sizes and times of change.

    Of objects in a bucket, of names and generations.
    """
    if self._remote:
      return _of_objects(self._folder, map(os.fsdecode, self._names))
    return _of_files(self._paths)

  def names_digest(self, indices: np.ndarray) -> str:
    """See `EncodedSplit`: of the names in the folder, in order."""
    return digest(*self._names[indices])


class TfdsSplit:
  """Images of a TFDS split, in the order of its files.

  Its records can only be read one after the other, so that any other order
  is taken from the encoded images in host memory (CelebA: 1.4 GB).
  """

  def __init__(
    self,
    builder: tfds.core.DatasetBuilder,
    split: str,
    label_feature: str,
    label_names: Iterable[str],
  ):
    """Takes the split and what of its examples are labels.

    Args:
      builder: of a data set that is prepared.
      split: its name.
      label_feature: the feature that is a dictionary of labels.
      label_names: its keys, in the order that the labels get; may be empty.
    """
    self._builder = builder
    self._split = split
    self._label_feature = label_feature
    self._label_names = tuple(label_names)
    self._encoded = None
    self.num_examples = builder.info.splits[split].num_examples

  def read(
    self, indices: np.ndarray, decode: Callable[[tf.Tensor], tf.Tensor]
  ) -> tf.data.Dataset:
    """See `EncodedSplit`."""
    if np.array_equal(indices, np.arange(self.num_examples)):
      encoded = self._read_in_order()
    else:
      if self._encoded is None:
        self._encoded = self._read_all(self._read_in_order())
      encoded = tf.data.Dataset.from_generator(
        lambda: (self._encoded[i] for i in indices),
        output_signature=tf.TensorSpec((), tf.string),
      )
    return _with_options(encoded.map(decode, 2 * CORES, deterministic=True))

  def content(self, index: int) -> bytes:
    """See `EncodedSplit`."""
    return self._read_all(self._read_in_order().skip(index).take(1))[0]

  def labels(self) -> Labels | None:
    """See `EncodedSplit`."""
    if not self._label_names:
      return None

    def values(example):
      labels = example[self._label_feature]
      return tf.stack(
        [tf.cast(labels[name], tf.int32) for name in self._label_names]
      )

    rows = self._read_all(self._examples().map(values))
    return Labels(self._label_names, rows)

  def unreadable(self) -> UserError:
    """See `EncodedSplit`."""
    return UserError(
      f'the records of the {self._split} split in '
      f'{shown(self._builder.data_dir)} are damaged; delete the folder and '
      'prepare it again.'
    )

  def _read_all(self, examples: tf.data.Dataset) -> np.ndarray:
    """What there is of each example, in order."""
    try:
      rows = list(examples.batch(1024).as_numpy_iterator())
    except tf.errors.OpError as error:
      raise self.unreadable() from error
    return np.concatenate(rows)

  def _read_in_order(self) -> tf.data.Dataset:
    return self._examples().map(lambda example: example['image'])

  def _examples(self) -> tf.data.Dataset:
    examples = self._builder.as_dataset(
      self._split,
      decoders={'image': tfds.decode.SkipDecoding()},
      read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    # A file that was cut between two records looks whole.
    return examples.apply(
      tf.data.experimental.assert_cardinality(self.num_examples)
    )

  def name(self, index: int) -> str:
    """See `EncodedSplit`."""
    return f'{self._builder.info.full_name} {self._split} example {index}'

  def fingerprint(self) -> str | None:
    """See `EncodedSplit`: of the files that hold the records."""
    files = self._builder.info.splits[self._split].filepaths
    if is_remote(self._builder.data_dir):
      folder = str(self._builder.data_dir)
      return _of_objects(folder, (os.path.basename(path) for path in files))
    return _of_files([os.fsencode(path) for path in files])

  def names_digest(self, indices: np.ndarray) -> str:
    """See `EncodedSplit`: of the data set's name and version, and positions."""
    return digest(self._builder.info.full_name, self._split, *indices.tolist())


def _fetch(path: bytes) -> bytes:
  """The content of an object in a bucket."""
  return fsspec.filesystem('gcs').cat_file(os.fsdecode(path))


def _only_files(paths: np.ndarray) -> np.ndarray:
  """The paths, with nothing instead of what cannot be read to its end."""
  return np.array([_if_file(path) for path in paths], object)


def _if_file(path: bytes) -> bytes:
  try:
    ordinary_files.check(path)
  except OSError as error:
    # What is not there, or not for this user, is for the reader to miss: it
    # may come back.
    if error.errno == errno.EINVAL:
      return os.fsencode(os.devnull)
  return path


def _with_options(
  images: tf.data.Dataset, num_threads: int = CORES
) -> tf.data.Dataset:
  """As many threads as cores, and one for each image: what decodes fastest."""
  options = tf.data.Options()
  options.autotune.enabled = False
  options.threading.private_threadpool_size = num_threads
  options.threading.max_intra_op_parallelism = 1
  return images.with_options(options)


def _of_files(paths: Iterable[bytes]) -> str | None:
  """A hash of names, sizes and times of change; None if a file is missing."""
  hashed = hashlib.sha256()
  for path in paths:
    try:
      facts = os.stat(path)
    except OSError:
      return None
    path = os.path.abspath(path)
    hashed.update(b'%s\n%d\n%d\n' % (path, facts.st_size, facts.st_mtime_ns))
  return hashed.hexdigest()


def _of_objects(folder: str, names: Iterable[str]) -> str:
  """A hash of the names and generations of objects in a bucket's folder."""
  generations = list_generations(folder)
  return digest(folder, *((name, generations.get(name)) for name in names))


def is_hidden(name: str) -> bool:
  """Whether a file or folder of this name is no data."""
  return name.startswith('.') or name in _SYSTEM_NAMES


def some(names: list[str]) -> str:
  """The first few names, and how many more there are."""
  more = len(names) - 3
  first = ', '.join(map(shown, names[:3]))
  return first + (f' and {more} more' if more > 0 else '')
