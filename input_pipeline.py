"""Images for training and evaluation: from TFDS or a folder, through tf.data.

Encoded bytes are decoded, cut to a central square and resized once, into
uint8. There is no randomness here: the order of the examples comes as indices
(vae/splits.py), and what changes an image at random happens in the training
step.
"""

from collections.abc import Iterator
import csv
import dataclasses
import hashlib
import os
import re
import socket
import sys
import time
from typing import Protocol

from etils import epath
import numpy as np
import psutil
import tensorflow as tf
import tensorflow_datasets as tfds

from datasets import cartoon_faces
from vae import splits
from vae.errors import UserError

SPLITS = ('train', 'validation', 'test')

_IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp')

# Where CelebA's official and Kaggle's archives put the images and the lists,
# relative to the folder that they are unpacked in.
_CELEBA_IMAGES = (
  'img_align_celeba/img_align_celeba',
  'img_align_celeba',
  'Img/img_align_celeba',
)
_CELEBA_LISTS = (
  'list_eval_partition.txt',
  'list_eval_partition.csv',
  'Eval/list_eval_partition.txt',
)

_CSV_HEADER = ['image_id', 'partition']

# Where Linux tells a container its limits.
_CGROUP = epath.Path('/sys/fs/cgroup')

_CELEBA_DRIVE = ('drive.google.com', 443)

_HOW_TO_GET_CELEBA = """\
{reason} Two ways to get CelebA:
  1. From Kaggle:
       kaggle datasets download -d jessicali9530/celeba-dataset
       unzip -q celeba-dataset.zip -d celeba
       python main.py --config=configs/celeba.py --config.data.dir=celeba
  2. With TFDS, on a machine that reaches the official drive (it often refuses):
       python -c "import tensorflow_datasets as tfds; tfds.load('celeb_a')"
       python main.py --config=configs/celeba.py
To train without any download: python main.py --config=configs/faces.py"""


class EncodedSplit(Protocol):
  """The encoded images of a split, before they are decoded."""

  num_examples: int

  def read(self, indices: np.ndarray) -> tf.data.Dataset:
    """Encoded images, scalar strings, at `indices`, in this order."""

  def name(self, index: int) -> str:
    """What to call an image in a message."""


class FileSplit:
  """Images that are a file each."""

  def __init__(self, paths: list[str]):
    # Bytes, as some file systems' names are no UTF-8.
    self._paths = np.array([os.fsencode(path) for path in paths], dtype=object)
    self.num_examples = len(paths)

  def read(self, indices: np.ndarray) -> tf.data.Dataset:
    """See `EncodedSplit`."""
    paths = tf.data.Dataset.from_tensor_slices(
      tf.constant(self._paths[indices], tf.string)
    )
    return paths.map(tf.io.read_file, tf.data.AUTOTUNE, deterministic=True)

  def name(self, index: int) -> str:
    """See `EncodedSplit`."""
    return os.fsdecode(self._paths[index])


class TfdsSplit:
  """Images of a TFDS split, in the order of its files.

  Its records can only be read one after the other, so that any other order
  is taken from the encoded images in host memory (CelebA: 1.4 GB).
  """

  def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
    self._builder = builder
    self._split = split
    self._encoded = None
    self.num_examples = builder.info.splits[split].num_examples

  def read(self, indices: np.ndarray) -> tf.data.Dataset:
    """See `EncodedSplit`."""
    if np.array_equal(indices, np.arange(self.num_examples)):
      return self._read_in_order()
    if self._encoded is None:
      self._encoded = list(self._read_in_order().as_numpy_iterator())
    return tf.data.Dataset.from_generator(
      lambda: (self._encoded[i] for i in indices),
      output_signature=tf.TensorSpec((), tf.string),
    )

  def _read_in_order(self) -> tf.data.Dataset:
    examples = self._builder.as_dataset(
      self._split,
      decoders={'image': tfds.decode.SkipDecoding()},
      read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    return examples.map(lambda example: example['image'])

  def name(self, index: int) -> str:
    """See `EncodedSplit`."""
    return f'{self._builder.info.full_name} {self._split} example {index}'


@dataclasses.dataclass(frozen=True)
class Crop:
  """How a decoded image becomes an example.

  Attributes:
    crop_size: side of the central square that is cut out; a smaller image
      gives its largest one.
    image_size: side that the square is resized to, bilinear, antialiased.
    channels: 3 or 1.
  """

  crop_size: int
  image_size: int
  channels: int

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of an example."""
    return (self.image_size, self.image_size, self.channels)

  def decode(self, encoded: tf.Tensor) -> tf.Tensor:
    """Encoded bytes to uint8 [image_size, image_size, channels]."""
    image = tf.cond(
      tf.io.is_jpeg(encoded),
      lambda: self._decode_jpeg(encoded),
      lambda: self._decode_other(encoded),
    )
    image = tf.image.resize(
      image, (self.image_size, self.image_size), antialias=True
    )
    image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
    return tf.ensure_shape(image, self.image_shape)

  def _decode_jpeg(self, encoded):
    # Only what lies in the window is decoded.
    shape = tf.io.extract_jpeg_shape(encoded)
    return tf.io.decode_and_crop_jpeg(
      encoded,
      self._window(shape[0], shape[1]),
      channels=self.channels,
      dct_method='INTEGER_ACCURATE',
    )

  def _decode_other(self, encoded):
    # Not every decoder makes grey of colour.
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    if self.channels == 1:
      image = tf.image.rgb_to_grayscale(image)
    shape = tf.shape(image)
    top, left, height, width = self._window(shape[0], shape[1])
    return image[top : top + height, left : left + width]

  def _window(self, height, width):
    side = tf.minimum(self.crop_size, tf.minimum(height, width))
    return (height - side) // 2, (width - side) // 2, side, side


class StreamedSplit:
  """A split that is decoded anew whenever it is read."""

  def __init__(self, encoded: EncodedSplit, indices: np.ndarray, crop: Crop):
    """Takes the `indices` of those encoded images that make up the split."""
    self._encoded = encoded
    self._indices = indices
    self._crop = crop
    self.num_examples = len(indices)
    self.image_shape = crop.image_shape

  def batches(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    """See `splits.Split`.

    Raises:
      UserError: names the images that cannot be decoded.
    """
    indices = self._indices[indices]
    batches = (
      self._encoded.read(indices)
      .map(self._crop.decode, tf.data.AUTOTUNE, deterministic=True)
      .batch(batch_size)
      .prefetch(tf.data.AUTOTUNE)
    )
    delivered = 0
    iterator = batches.as_numpy_iterator()
    while True:
      try:
        images = next(iterator)
      except StopIteration:
        return
      except tf.errors.OpError as error:
        suspects = indices[delivered : delivered + batch_size]
        corrupt = find_corrupt(self._encoded, suspects, self._crop)
        if not corrupt:  # It was not the images.
          raise
        raise _corrupt_error(self._encoded, corrupt) from error
      yield images
      delivered += len(images)


class CachedSplit:
  """A split that is decoded once, when first read, into host memory."""

  def __init__(self, streamed: StreamedSplit, label: str):
    """Takes the split and what to call it."""
    self._streamed = streamed
    self._label = label
    self._cache = None
    self.num_examples = streamed.num_examples
    self.image_shape = streamed.image_shape

  def batches(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    """See `splits.Split`."""
    if self._cache is None:
      self._cache = splits.ArraySplit(self._decode())
    return self._cache.batches(indices, batch_size)

  def _decode(self) -> np.ndarray:
    images = np.empty((self.num_examples, *self.image_shape), np.uint8)
    start, done = time.monotonic(), 0
    everything = np.arange(self.num_examples)
    for batch in self._streamed.batches(everything, batch_size=256):
      images[done : done + len(batch)] = batch
      done += len(batch)
    seconds = time.monotonic() - start
    print(
      f'{self._label}: decoded {done:,} images in {seconds:.1f}s, '
      f'{images.nbytes / 1e6:,.0f} MB',
      flush=True,
    )
    return images


def load(config) -> splits.DataSet:
  """The train, validation and test split that `config.data` describes.

  Finds the data, checks that it is complete, and reads no image yet, unless
  corrupt ones are to be skipped and so must be found first.

  Raises:
    UserError: what is missing, or wrong with the data, and what to do.
  """
  data = config.data
  if data.source == 'celeba':
    encoded = _find_celeba(data.dir)
  elif data.source == 'cartoon_faces':
    encoded = _prepare_cartoon_faces(data.dir)
  else:
    encoded = _list_folder(_existing_folder(data.dir))
  crop = Crop(data.crop_size, data.image_size, data.channels)
  num_examples = sum(split.num_examples for split in encoded.values())
  cached = _use_cache(data.cache, num_examples * int(np.prod(crop.image_shape)))
  loaded = {
    split: _make_split(split, encoded[split], crop, cached, data.skip_corrupt)
    for split in SPLITS
  }
  for name, split in loaded.items():
    if not split.num_examples:
      raise UserError(
        f'the {name} split of {data.dir or data.source} has no images.'
      )
  if loaded['train'].num_examples < config.train.batch_size:
    raise UserError(
      f'config.train.batch_size is {config.train.batch_size}, but the train '
      f'split has only {loaded["train"].num_examples} images.'
    )
  return splits.DataSet(**loaded)


def _make_split(
  name: str, encoded: EncodedSplit, crop: Crop, cached: bool, skip_corrupt: bool
) -> splits.Split:
  indices = np.arange(encoded.num_examples)
  if skip_corrupt and len(indices):
    corrupt = find_corrupt(encoded, indices, crop)
    if corrupt:
      print(
        f'{name}: skipped {len(corrupt)} of {len(indices)} images that cannot '
        f'be decoded: {_some_names(encoded, corrupt)}',
        file=sys.stderr,
      )
      indices = np.delete(indices, corrupt)
  streamed = StreamedSplit(encoded, indices, crop)
  return CachedSplit(streamed, name) if cached else streamed


def _use_cache(cache: str, num_bytes: int) -> bool:
  if cache == 'auto':
    return num_bytes < _free_memory() / 2
  return cache == 'host'


def _free_memory() -> int:
  """Bytes that this process may still take: the machine's, or its cgroup's."""
  free = psutil.virtual_memory().available
  try:
    limit = int(_CGROUP.joinpath('memory.max').read_text())
    used = int(_CGROUP.joinpath('memory.current').read_text())
  except (OSError, ValueError):  # No cgroup, or 'max'.
    return free
  return min(free, limit - used)


def find_corrupt(
  encoded: EncodedSplit, indices: np.ndarray, crop: Crop
) -> list[int]:
  """Those of `indices` whose images cannot be read or decoded."""

  def decodes(some):
    images = encoded.read(some).map(crop.decode, tf.data.AUTOTUNE)
    try:
      for _ in images:
        pass
    except tf.errors.OpError:
      return False
    return True

  # Most are sound: look at them in bulk, and one by one only where it fails.
  return [
    int(index)
    for chunk in np.array_split(indices, len(indices) // 256 + 1)
    if not decodes(chunk)
    for index in chunk
    if not decodes(chunk[chunk == index])
  ]


def _corrupt_error(encoded: EncodedSplit, corrupt: list[int]) -> UserError:
  return UserError(
    f'{_some_names(encoded, corrupt)} cannot be decoded; replace it, or skip '
    'such images with --config.data.skip_corrupt=True.'
  )


def _some_names(encoded: EncodedSplit, indices: list[int]) -> str:
  return _some([encoded.name(index) for index in indices])


def _some(names: list[str]) -> str:
  """The first few names, and how many more there are."""
  more = len(names) - 3
  return ', '.join(names[:3]) + (f' and {more} more' if more > 0 else '')


# CelebA.


def _find_celeba(directory: str) -> dict[str, EncodedSplit]:
  """CelebA as an unpacked archive or as TFDS has it, whichever is there."""
  if directory:
    folder = _existing_folder(directory)
    images = [folder / d for d in _CELEBA_IMAGES if (folder / d).is_dir()]
    lists = [folder / f for f in _CELEBA_LISTS if (folder / f).exists()]
    if images and lists:
      return _read_celeba_folder(images[0], lists[0])
    if images:
      raise UserError(
        f'{folder} holds the images of CelebA but no list_eval_partition.txt '
        'or .csv, which says what is train, validation and test; get it from '
        'the same place, or split at random with --config.data.source=folder.'
      )
  builder = _find_prepared('celeb_a', directory)
  if builder is not None:
    return _tfds_splits(builder)
  if directory:
    reason = (
      f'{directory} holds neither img_align_celeba/ with its '
      "list_eval_partition, nor TFDS's celeb_a."
    )
    raise UserError(_HOW_TO_GET_CELEBA.format(reason=reason))
  return _tfds_splits(_download_celeba())


def _read_celeba_folder(
  images: epath.Path, partition: epath.Path
) -> dict[str, EncodedSplit]:
  files = _read_partition(partition)
  # One listing is much faster than asking for each of 202,599 files.
  present = {path.name for path in images.iterdir()}
  missing = [
    name for names in files.values() for name in names if name not in present
  ]
  if missing:
    raise UserError(
      f'{partition} names {len(missing)} files that are not in {images}: '
      f'{_some(missing)}.'
    )
  return {
    split: FileSplit([str(images / name) for name in names])
    for split, names in files.items()
  }


def _read_partition(path: epath.Path) -> dict[str, list[str]]:
  """File names by split, of the official list or Kaggle's .csv."""
  try:
    text = path.read_bytes().decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path} cannot be read as text: {error}.') from error
  lines = text.splitlines()
  rows = csv.reader(lines) if path.suffix == '.csv' else map(str.split, lines)
  files = {split: [] for split in SPLITS}
  for number, row in enumerate(rows, start=1):
    row = [cell.strip() for cell in row]
    if not any(row) or row == _CSV_HEADER:
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


def _download_celeba() -> tfds.core.DatasetBuilder:
  """Has TFDS fetch CelebA, where that has a chance."""
  # Without a network TFDS retries for minutes; so ask first.
  try:
    socket.create_connection(_CELEBA_DRIVE, timeout=3).close()
  except OSError:
    reason = (
      f'CelebA is not in {tfds.core.constants.DATA_DIR}, and its official '
      'drive cannot be reached from here.'
    )
    raise UserError(_HOW_TO_GET_CELEBA.format(reason=reason)) from None
  builder = tfds.builder('celeb_a')
  try:
    builder.download_and_prepare()
  except Exception as error:  # Whatever it was, the ways out are the same.
    cause = str(error).strip().split('\n')[0]
    reason = f'TFDS could not download CelebA ({cause}).'
    raise UserError(_HOW_TO_GET_CELEBA.format(reason=reason)) from error
  return builder


# TFDS.


def _find_prepared(
  name: str, directory: str
) -> tfds.core.DatasetBuilder | None:
  """The newest prepared version of a TFDS data set, or None."""
  root = epath.Path(directory or tfds.core.constants.DATA_DIR).expanduser()
  versions = [
    path.parent
    for path in (root / name).glob('*/dataset_info.json')
    if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
  ]
  if not versions:
    return None
  newest = max(versions, key=lambda v: tuple(map(int, v.name.split('.'))))
  return tfds.builder_from_directory(newest)


def _prepare_cartoon_faces(directory: str) -> dict[str, EncodedSplit]:
  """The embedded data set; renders it if this machine has not yet."""
  builder = _find_prepared('cartoon_faces', directory)
  if builder is None:
    root = directory or tfds.core.constants.DATA_DIR
    print(f'Rendering the cartoon faces into {root} …', flush=True)
    tfds.disable_progress_bar()
    try:
      builder = cartoon_faces.CartoonFaces(data_dir=directory or None)
      builder.download_and_prepare()
    except OSError as error:
      # Another process may have been faster.
      builder = _find_prepared('cartoon_faces', directory)
      if builder is not None:
        return _tfds_splits(builder)
      raise UserError(
        f'the cartoon faces cannot be written to {root} '
        f'({error.strerror or error}); name a folder that can be written with '
        '--config.data.dir.'
      ) from error
  return _tfds_splits(builder)


def _tfds_splits(builder: tfds.core.DatasetBuilder) -> dict[str, EncodedSplit]:
  missing = [split for split in SPLITS if split not in builder.info.splits]
  if missing:
    raise UserError(
      f'{builder.data_dir} has no {missing[0]} split; delete the folder and '
      'prepare it again.'
    )
  return {split: TfdsSplit(builder, split) for split in SPLITS}


# A folder of images.


def _existing_folder(directory: str) -> epath.Path:
  folder = epath.Path(directory).expanduser()
  if not folder.is_dir():
    raise UserError(f'config.data.dir is {directory}; there is no such folder.')
  return folder


def _list_folder(folder: epath.Path) -> dict[str, EncodedSplit]:
  """All images below a folder: 80 % train, 10 % validation, 10 % test.

  Which is which depends on the names alone, through their hashes.
  """
  walk = tf.io.gfile.walk if '://' in str(folder) else os.walk
  names = (
    os.path.relpath(os.path.join(root, name), folder)
    for root, _, files in walk(str(folder))
    for name in files
    if name.lower().endswith(_IMAGE_SUFFIXES)
  )
  paths = sorted(
    names, key=lambda path: hashlib.sha256(os.fsencode(path)).digest()
  )
  if len(paths) < len(SPLITS):
    raise UserError(
      f'{folder} holds {len(paths)} images ({" ".join(_IMAGE_SUFFIXES)}); '
      'three splits need at least 3.'
    )
  held_out = max(1, len(paths) // 10)
  parts = {
    'train': paths[2 * held_out :],
    'validation': paths[:held_out],
    'test': paths[held_out : 2 * held_out],
  }
  return {
    split: FileSplit([str(folder / path) for path in sorted(part)])
    for split, part in parts.items()
  }
