"""Where the encoded images of a data set are: in a folder, or with TFDS.

Nothing is decoded here. Each data set is found, checked for completeness and
handed on as its three splits.
"""

import csv
import hashlib
import os
import re
import socket
from typing import Protocol

from etils import epath
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from datasets import cartoon_faces
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


def find(source: str, directory: str) -> dict[str, EncodedSplit]:
  """The train, validation and test split of a data set.

  Args:
    source: `config.data.source`.
    directory: `config.data.dir`.

  Raises:
    UserError: what is missing, or wrong with the data, and what to do.
  """
  if source == 'celeba':
    return _find_celeba(directory)
  if source == 'cartoon_faces':
    return _prepare_cartoon_faces(directory)
  return _list_folder(_existing_folder(directory))


def some(names: list[str]) -> str:
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
      f'{some(missing)}.'
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
