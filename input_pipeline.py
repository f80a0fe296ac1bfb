"""Images for training and evaluation, through tf.data.

Images of a source (`data.find`) are decoded, cut to a central square and
resized once, into uint8. There is no randomness here: the order of the examples
comes as indices (`vae.splits`), and random changes of an image are part of the
training step.
"""

from collections.abc import Collection, Iterator
import dataclasses
import functools
import math
import time

import data as sources

# isort: split
import numpy as np
import tensorflow as tf

from data import encoded, image_files
from data.decoded import DecodedStore
from data.encoded import EncodedSplit, SPLITS
from data.image_files import Crop
from runs import processes, progress, schema
from vae import devices, splits
from vae.errors import UserError

# The accelerators are JAX's alone.
tf.config.set_visible_devices([], 'GPU')
tf.config.set_visible_devices([], 'TPU')

# Images of a batch when a whole split is decoded.
_BATCH_SIZE = 256


def load(
  config, decode: Collection[str] = ('train', 'validation')
) -> splits.DataSet:
  """Loads the train, validation and test split that `config.data` describes.

  Args:
    config: complete and valid (`schema.validate`).
    decode: splits whose images are decoded now, unless `config.data.cache` is
      none; other splits are decoded when they are first read.

  Raises:
    UserError: if data is missing, damaged or too large.
  """
  settings = schema.resolved(config).data
  found = sources.find(settings)
  _check_sizes(config, found)
  crop = Crop(settings.crop_size, settings.image_size, settings.channels)
  num_examples = sum(split.num_examples for split in found.values())
  cache = _choose_cache(settings.cache, num_examples, crop.image_shape)
  store = DecodedStore('' if cache == 'none' else settings.decoded_dir)
  loaded = {}
  for name in SPLITS:
    split = ImageSplit(name, found[name], crop, store, cache != 'none')
    if settings.skip_corrupt:
      split.skip_corrupt()
    loaded[name] = split
  _check_sizes(config, loaded)
  for name in decode if cache != 'none' else ():
    _ = loaded[name].images
  if cache == 'device':
    loaded = {name: splits.DeviceSplit(s) for name, s in loaded.items()}
  return splits.DataSet(**loaded)


def _check_sizes(config, found) -> None:
  """Checks that no split is empty, and that there is a batch to train on."""
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
    source: EncodedSplit,
    crop: Crop,
    store: DecodedStore,
    cached: bool,
  ):
    """Describes the split; nothing is read.

    Args:
      name: the split's name in messages.
      source: the encoded images.
      crop: makes examples of them.
      store: keeps the examples between runs.
      cached: whether they stay in host memory.
    """
    fingerprint = source.fingerprint() if store.keeps else None
    self._name, self._source, self._crop = name, source, crop
    self._store = store if fingerprint else DecodedStore('')
    self._key = encoded.digest(
      image_files.DECODING, tf.__version__, crop, fingerprint
    )
    self._cached = cached
    self._indices = np.arange(source.num_examples)
    self.image_shape = crop.image_shape

  @property
  def num_examples(self) -> int:
    """Number of images."""
    return len(self._indices)

  def batches(self, indices, batch_size):
    if self._cached:
      return splits.ArraySplit(self.images).batches(indices, batch_size)
    return self._stream(indices, batch_size)

  def labels(self):
    labels = self._source.labels()
    if labels is None:
      return None
    return dataclasses.replace(labels, values=labels.values[self._indices])

  def names_digest(self):
    return self._source.names_digest(self._indices)

  @functools.cached_property
  def images(self) -> np.ndarray:
    """All images, uint8 [num_examples, height, width, channels]."""
    start, done = time.monotonic(), 'read'
    images = self._store.read(f'{self._name}_{self._key}')
    if images is None:
      progress.say(f'{self._name}: decoding {self.num_examples:,} images …')
      images = np.empty((self.num_examples, *self.image_shape), np.uint8)
      batches = self._stream(np.arange(self.num_examples), _BATCH_SIZE)
      for index, batch in enumerate(batches):
        images[index * _BATCH_SIZE :][: len(batch)] = batch
      self._store.write(f'{self._name}_{self._key}', images)
      done = 'decoded'
    progress.say(
      f'{self._name}: {done} {len(images):,} images in '
      f'{time.monotonic() - start:.1f}s, {images.nbytes / 1e6:,.0f} MB'
    )
    return images

  def skip_corrupt(self) -> None:
    """Leaves out the images that cannot be decoded, and counts them."""
    key = f'{self._name}_corrupt_{self._key}'
    corrupt = self._store.read(key)
    if corrupt is None:
      progress.say(f'{self._name}: looking for corrupt images …')
      sound = [p for p, _ in self._read(self._indices, _BATCH_SIZE)]
      corrupt = np.setdiff1d(self._indices, np.concatenate([[], *sound]))
      self._store.write(key, corrupt)
    if len(corrupt):
      progress.warn(
        f'{self._name}: skipped {len(corrupt)} of {self.num_examples} images '
        f'that cannot be decoded: {self._names(corrupt)}'
      )
      self._indices = np.delete(self._indices, corrupt)
      self._key = encoded.digest(self._key, corrupt.tobytes())

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
    return encoded.some([self._source.name(index) for index in indices])


def _choose_cache(
  cache: str, num_examples: int, image_shape: tuple[int, int, int]
) -> str:
  """The place of so many decoded images: none, host or device.

  Raises:
    UserError: if they do not fit into the place that `cache` names.
  """
  if cache == 'none':
    return cache
  # One program for all processes needs one place, so the least of them counts.
  host = devices.least_of_all(processes.free_memory())
  device = devices.free_memory()
  no_device = device is None
  free = {
    'host': host,
    'device': math.inf if no_device else devices.least_of_all(device),
  }
  need = {
    'host': num_examples * math.prod(image_shape),
    'device': num_examples * math.prod(splits.tiled_shape(image_shape)),
  }
  if cache == 'auto':
    if need['host'] >= free['host'] / 2:
      return 'none'
    # A device without memory of its own gains nothing by a copy. Half of what
    # is free is left to the batch: compiled for a TPU, training on CelebA takes
    # 2.00 GB for the images, and 0.20 GB for a batch of 128 on a chip.
    fits = not no_device and need['device'] < free['device'] / 2
    return 'device' if fits else 'host'
  if need[cache] > free[cache]:
    raise UserError(
      f'config.data.cache is {cache}, but the images take '
      f'{need[cache] / 1e9:.1f} GB and there are {free[cache] / 1e9:.1f} GB '
      'free; use none or auto.'
    )
  return cache
