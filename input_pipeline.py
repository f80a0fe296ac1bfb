"""Images for training and evaluation, through tf.data.

Images of a source (`data.find`) are decoded, cut to a central square and
resized once, into uint8. There is no randomness here: the order of the examples
comes as indices (`vae.splits`), and random changes of an image are part of the
training step.
"""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import functools
import math
import os
import pathlib
import shutil
import tempfile
import time
import zlib

import numpy as np

import data
from data import image_files
from data.image_files import Crop
from runs import processes, progress, schema, tf
from vae import conditioning, devices, splits
from vae.errors import UserError

# Images of a batch when a whole split is decoded.
_BATCH_SIZE = 256

# Bytes that decoded images leave free on the disk.
_MARGIN = 1 << 30


def load(
  config, decode: Collection[str] = ('train', 'validation')
) -> splits.DataSet:
  """Loads the splits that a complete and valid `config` describes.

  Unless `config.data.cache` is none, the images of the splits in `decode` are
  decoded now, those of others when they are first read.

  Raises:
    UserError: if data is missing, damaged or too large.
  """
  settings = schema.resolved(config).data
  found = data.find(settings)
  _check_sizes(config, found)
  crop = Crop(settings.crop_size, settings.image_size, settings.channels)
  num_examples = sum(split.num_examples for split in found.values())
  cache = _choose_cache(settings.cache, num_examples, crop.image_shape)
  loaded = {}
  for name in data.SPLITS:
    loaded[name] = ImageSplit(
      *(name, found[name], crop, cache != 'none', settings.decoded_dir),
      settings.binarize,
    )
    if settings.skip_corrupt:
      loaded[name].skip_corrupt()
  _check_sizes(config, loaded)
  for split in loaded.values():
    conditioning.labels_of(config, split)  # A mistake, before the decoding.
  for name in decode if cache != 'none' else ():
    _ = loaded[name].images
  if cache == 'device':
    loaded = {name: splits.DeviceSplit(s) for name, s in loaded.items()}
  return splits.DataSet(**loaded)


def _check_sizes(config, found) -> None:
  for name, split in found.items():
    if not split.num_examples:
      raise UserError(
        f'the {name} split of {config.data.dir or config.data.source} has no '
        'images.'
      )
  if found['train'].num_examples < config.train.batch_size:
    raise UserError(
      f'config.train.batch_size is {config.train.batch_size}, but the train '
      f'split has only {found["train"].num_examples} images.'
    )


class ImageSplit:
  """A split that is decoded whenever it is read, or once into host memory."""

  def __init__(
    self,
    name: str,
    source: data.EncodedSplit,
    crop: Crop,
    cached: bool,
    decoded_dir: str,
    binarize: str,
  ):
    """Describes the split; nothing is read.

    If it is `cached`, examples stay in host memory, and in `decoded_dir` (if
    that is not empty) between runs. `binarize` is as `config.data.binarize`.
    """
    fingerprint = source.fingerprint() if cached and decoded_dir else None
    self._folder = os.path.expanduser(decoded_dir) if fingerprint else None
    self._name, self._source, self._crop = name, source, crop
    self._key = data.digest(
      image_files.DECODING, tf.version(), crop, fingerprint
    )
    self._cached, self._binarize = cached, binarize
    self._is_binary = binarize in ('fixed', 'threshold')
    self._indices = np.arange(source.num_examples)
    self.image_shape = crop.image_shape

  @property
  def num_examples(self) -> int:
    return len(self._indices)

  def batches(self, indices, batch_size):
    if self._cached:
      return splits.ArraySplit(self.images).batches(indices, batch_size)
    if self._is_binary:
      return self._stream_binary(indices, batch_size)
    return self._stream(indices, batch_size)

  @functools.cached_property
  def _labels(self) -> splits.Labels | None:
    return self._source.labels()

  def labels(self):
    labels = self._labels
    if labels is None:
      return None
    return dataclasses.replace(labels, values=labels.values[self._indices])

  def names_digest(self):
    return self._source.names_digest(self._indices)

  @functools.cached_property
  def images(self) -> np.ndarray:
    """All images, uint8 [num_examples, height, width, channels]."""
    start = time.monotonic()
    images = self._kept(self._name, self._decode)
    progress.say(
      f'{self._name}: {len(images):,} decoded images in '
      f'{time.monotonic() - start:.1f}s, {images.nbytes / 1e6:,.0f} MB'
    )
    if self._is_binary:
      for start in range(0, len(images), _BATCH_SIZE):
        part = slice(start, start + _BATCH_SIZE)
        self._make_binary(images[part], self._indices[part])
    return images

  def _stream_binary(self, indices, batch_size):
    done = 0
    for images in self._stream(indices, batch_size):
      images = np.array(images)
      self._make_binary(images, self._indices[indices[done:]])
      done += len(images)
      yield images

  def _make_binary(self, images: np.ndarray, indices: np.ndarray) -> None:
    """Makes grey values 0 or 255, in place."""
    if self._binarize == 'threshold':
      images[...] = np.where(images < 128, 0, 255)
    else:
      # The same in every run: a function of the split and the position.
      for image, index in zip(images, indices, strict=False):
        seed = np.random.SeedSequence([*self._name.encode(), int(index)])
        draws = np.random.Philox(seed).random_raw(image.size) % 255
        image[...] = np.where(draws.reshape(image.shape) < image, 255, 0)

  def _decode(self) -> np.ndarray:
    progress.say(f'{self._name}: decoding {self.num_examples:,} images …')
    images = np.empty((self.num_examples, *self.image_shape), np.uint8)
    batches = self._stream(np.arange(self.num_examples), _BATCH_SIZE)
    for index, batch in enumerate(batches):
      images[index * _BATCH_SIZE :][: len(batch)] = batch
    return images

  def skip_corrupt(self) -> None:
    """Leaves out the images that cannot be decoded, and counts them."""
    corrupt = self._kept(f'{self._name}_corrupt', self._find_corrupt)
    if len(corrupt):
      progress.warn(
        f'{self._name}: skipped {len(corrupt)} of {self.num_examples} images '
        f'that cannot be decoded: {self._names(corrupt)}'
      )
      self._indices = np.delete(self._indices, corrupt)
      self._key = data.digest(self._key, corrupt.tobytes())

  def _find_corrupt(self) -> np.ndarray:
    progress.say(f'{self._name}: looking for corrupt images …')
    sound = [p for p, _ in self._read(self._indices, _BATCH_SIZE)]
    return np.setdiff1d(self._indices, np.concatenate([[], *sound]))

  def _kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of an earlier run, or one that is made and kept."""
    if not self._folder:
      return make()
    path = pathlib.Path(self._folder, f'{name}_{self._key}.npy')
    array = read_array(path)
    if array is None:
      array = make()
      keep_array(path, array)
    return array

  def _read(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of positions in `indices` and of the images there."""
    examples = self._source.read(indices, self._crop.decode)
    return examples.batch(batch_size).prefetch(2).as_numpy_iterator()

  def _stream(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    indices = self._indices[indices]
    done, positions = 0, np.array([], int)
    for positions, images in self._read(indices, batch_size):
      if positions[-1] != done + len(images) - 1:
        break
      yield images
      done += len(images)
    if done == len(indices):
      return
    expected = np.arange(done, min(done + batch_size, len(indices)))
    corrupt = indices[np.setdiff1d(expected, positions)]
    try:
      reason = image_files.why_undecodable(self._source.content(corrupt[0]))
    except tf.errors.OpError as error:
      reason = error.message.rpartition('; ')[2]
    raise UserError(
      f'{self._names(corrupt)} cannot be decoded '
      f'({"the first: " if len(corrupt) > 1 else ""}{reason}); replace it and '
      'run the same command again, or leave such images out with '
      '--config.data.skip_corrupt=True (a run that has checkpoints needs '
      'another --workdir for that).'
    )

  def _names(self, indices: np.ndarray) -> str:
    return data.some([self._source.name(index) for index in indices])


def read_array(path: pathlib.Path) -> np.ndarray | None:
  """Reads what `keep_array` has written; None if it is absent or damaged."""
  try:
    with path.open('rb') as file:
      array = np.lib.format.read_array(file, allow_pickle=False)
      return array if file.read() == _checksum(array) else None
  except Exception:  # A damaged head can claim anything.
    return None


def keep_array(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes an array for the next run, or warns if it cannot be written.

  A checksum follows it: a bit that flips on the disk would go into training
  unseen.
  """
  folder = path.parent
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < array.nbytes + _MARGIN:
      raise OSError('the disk is almost full')
    for old in folder.glob('*.partial'):
      if time.time() - old.stat().st_mtime > 24 * 3600:  # A killed process's.
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(suffix='.partial', dir=folder) as partial:
      complete = pathlib.Path(partial, path.name)
      with complete.open('wb') as file:
        np.save(file, array, allow_pickle=False)
        file.write(_checksum(array))
      complete.replace(path)
  except OSError as error:
    progress.warn(
      f'note: decoded images are not kept in {folder} '
      f'({error.strerror or error}); name another folder with '
      '--config.data.decoded_dir, or none.'
    )


def _checksum(array: np.ndarray) -> bytes:
  about = repr((array.dtype.str, array.shape, array.flags.c_contiguous))
  content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return zlib.crc32(content, zlib.crc32(about.encode())).to_bytes(4, 'big')


def _choose_cache(
  cache: str, num_examples: int, image_shape: tuple[int, int, int]
) -> str:
  """The place of so many decoded images: none, host or device."""
  if cache == 'none':
    return cache
  # One program for all processes needs one place, so the least of them counts.
  on_device = devices.free_memory()
  free = {
    'host': devices.least_of_all(processes.free_memory()),
    'device': math.inf,
  }
  if on_device is not None:
    free['device'] = devices.least_of_all(on_device)
  need = {
    'host': num_examples * math.prod(image_shape),
    'device': num_examples * math.prod(splits.tiled_shape(image_shape)),
  }
  if cache != 'auto':
    if need[cache] > free[cache]:
      raise UserError(
        f'config.data.cache is {cache}, but the images take '
        f'{need[cache] / 1e9:.1f} GB and there are {free[cache] / 1e9:.1f} GB '
        'free; use none or auto.'
      )
    return cache
  if need['host'] >= free['host'] / 2:
    return 'none'
  # A device without memory of its own gains nothing by a copy. Half of what is
  # free is left to the batch: compiled for a TPU, training on CelebA takes
  # 2.00 GB for the images, and 0.20 GB for a batch of 128 on a chip.
  if on_device is not None and need['device'] < free['device'] / 2:
    return 'device'
  return 'host'
