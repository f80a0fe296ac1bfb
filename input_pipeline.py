"""Images for training and evaluation, through tf.data.

Encoded bytes (data/sources.py) are decoded, cut to a central square and
resized once, into uint8. There is no randomness here: the order of the
examples comes as indices (vae/splits.py), and what changes an image at random
happens in the training step.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import time

import runs  # noqa: F401 (Sets the environment of TensorFlow.)

# isort: split
import numpy as np
import tensorflow as tf

from data import corrupt_images
from data import crops
from data import sources
from data.crops import Crop
from data.decoded import DecodedStore
from data.decoded import digest
from data.encoded import EncodedSplit
from data.encoded import SPLITS
from runs import memory
from runs import progress
from runs import schema
from vae import devices
from vae import splits
from vae import tiles
from vae.errors import UserError

# The accelerators are JAX's alone.
tf.config.set_visible_devices([], 'GPU')
tf.config.set_visible_devices([], 'TPU')

# Of a run; the state counts them in int32.
_MAX_STEPS = 2**31 - 1


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
      self._encoded.read(indices, self._crop.decode)
      .batch(batch_size)
      .prefetch(2)
    )
    delivered = 0
    iterator = batches.as_numpy_iterator()
    while True:
      try:
        images = next(iterator)
      except StopIteration:
        return
      except corrupt_images.FAILURES as error:
        suspects = indices[delivered : delivered + batch_size]
        corrupt = list(corrupt_images.find(self._encoded, suspects, self._crop))
        if not corrupt:
          raise self._encoded.unreadable() from error
        raise corrupt_images.as_user_error(
          self._encoded, corrupt, self._crop
        ) from error
      yield images
      delivered += len(images)

  def labels(self) -> splits.Labels | None:
    """See `splits.Split`."""
    return self._labels

  def names_digest(self) -> str:
    """See `splits.Split`."""
    return self._encoded.names_digest(self._indices)

  @functools.cached_property
  def _labels(self) -> splits.Labels | None:
    labels = self._encoded.labels()
    if labels is None:
      return None
    return dataclasses.replace(labels, values=labels.values[self._indices])


class CachedSplit:
  """A split that is decoded once, when first read, into host memory.

  Between runs the decoded images are kept on disk.
  """

  def __init__(
    self, streamed: StreamedSplit, label: str, store: DecodedStore, name: str
  ):
    """Takes the split, what to call it, and where and how it is kept."""
    self._streamed = streamed
    self._label = label
    self._store = store
    self._name = name
    self.num_examples = streamed.num_examples
    self.image_shape = streamed.image_shape

  @functools.cached_property
  def images(self) -> np.ndarray:
    """All images, uint8 [num_examples, height, width, channels]."""
    start = time.monotonic()
    shape = (self.num_examples, *self.image_shape)
    kept = self._store.read(self._name)
    whole = kept is not None and (kept.shape, kept.dtype) == (shape, np.uint8)
    images = kept if whole else self._decode()
    progress.say(
      f'{self._label}: {"read" if whole else "decoded"} {len(images):,} images '
      f'in {time.monotonic() - start:.1f}s, {images.nbytes / 1e6:,.0f} MB'
    )
    if not whole:
      self._store.write(self._name, images)
    return images

  def batches(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    """See `splits.Split`."""
    return splits.ArraySplit(self.images).batches(indices, batch_size)

  def labels(self) -> splits.Labels | None:
    """See `splits.Split`."""
    return self._streamed.labels()

  def names_digest(self) -> str:
    """See `splits.Split`."""
    return self._streamed.names_digest()

  def _decode(self) -> np.ndarray:
    progress.say(f'{self._label}: decoding {self.num_examples:,} images …')
    images = np.empty((self.num_examples, *self.image_shape), np.uint8)
    done = 0
    everything = np.arange(self.num_examples)
    for batch in self._streamed.batches(everything, batch_size=256):
      images[done : done + len(batch)] = batch
      done += len(batch)
    return images


def load(config) -> splits.DataSet:
  """The train, validation and test split that `config.data` describes.

  Finds the data, checks that it is complete, and reads no image yet, unless
  corrupt ones are to be skipped and so must be found first.

  Raises:
    UserError: what is missing, or wrong with the data, and what to do.
  """
  data = schema.resolved(config).data
  encoded = sources.find(data.source, data.dir)
  crop = Crop(data.crop_size, data.image_size, data.channels)
  num_examples = sum(split.num_examples for split in encoded.values())
  cache = _choose_cache(data.cache, num_examples, crop.image_shape)
  store = DecodedStore('' if cache == 'none' else data.decoded_dir)
  loaded = {
    split: _make_split(
      split,
      encoded[split],
      crop,
      cache,
      store,
      data.skip_corrupt,
    )
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
  _check_steps(config, loaded['train'])
  return splits.DataSet(**loaded)


def _check_steps(config, split: splits.Split) -> None:
  """Checks what a config says of steps, now that it is known how many.

  Raises:
    UserError: if they cannot be counted, or a dispatch of them is too large.
  """
  batch_size, num_epochs = config.train.batch_size, config.train.num_epochs
  num_steps = split.num_examples // batch_size * num_epochs
  if num_steps > _MAX_STEPS:
    raise UserError(
      f'config.train.num_epochs is {num_epochs}; with {split.num_examples} '
      f'images in batches of {batch_size} that is {num_steps:,} steps, and '
      f'they can be counted to {_MAX_STEPS:,}.'
    )
  if isinstance(split, splits.DeviceSplit):
    return
  steps = config.train.steps_per_dispatch
  num_images = min(steps * batch_size, split.num_examples)
  num_bytes = num_images * int(np.prod(split.image_shape))
  free = memory.free()
  if num_bytes > free:
    raise UserError(
      f'config.train.steps_per_dispatch is {steps}, but their images take '
      f'{num_bytes / 1e9:.1f} GB and there are {free / 1e9:.1f} GB free; '
      'lower it.'
    )


def _make_split(
  label: str,
  encoded: EncodedSplit,
  crop: Crop,
  cache: str,
  store: DecodedStore,
  skip_corrupt: bool,
) -> splits.Split:
  """One split, kept where `cache` says."""
  fingerprint = encoded.fingerprint() if store.keeps else None
  if fingerprint is None:
    store = DecodedStore('')
  identity = (crops.DECODING, tf.__version__, crop, fingerprint)
  indices = np.arange(encoded.num_examples)
  if skip_corrupt and len(indices):
    corrupt = _known_corrupt(label, encoded, crop, store, identity)
    if len(corrupt):
      progress.warn(
        f'{label}: skipped {len(corrupt)} of {len(indices)} images that cannot '
        f'be decoded: {corrupt_images.some_names(encoded, corrupt)}'
      )
      indices = np.delete(indices, corrupt)
  streamed = StreamedSplit(encoded, indices, crop)
  if cache == 'none':
    return streamed
  name = f'{label}_{digest(*identity, indices.tobytes())}'
  cached = CachedSplit(streamed, label, store, name)
  return splits.DeviceSplit(cached) if cache == 'device' else cached


def _known_corrupt(
  label: str,
  encoded: EncodedSplit,
  crop: Crop,
  store: DecodedStore,
  identity: tuple[object, ...],
) -> np.ndarray:
  """Indices of the images that cannot be decoded, kept between runs."""
  name = f'{label}_corrupt_{digest(*identity)}'
  corrupt = store.read(name)
  if corrupt is None:
    everything = np.arange(encoded.num_examples)
    found = corrupt_images.find(encoded, everything, crop)
    corrupt = np.array(list(found), np.int64)
    # What cannot be read today may be tomorrow, with the file as it was.
    if all(
      isinstance(error, corrupt_images.CORRUPT) for error in found.values()
    ):
      store.write(name, corrupt)
  return corrupt


def _choose_cache(
  cache: str, num_examples: int, image_shape: tuple[int, int, int]
) -> str:
  """Where so many decoded images are kept: none, host or device.

  Raises:
    UserError: if they do not fit where they are to be.
  """
  if cache == 'none':
    return cache
  # One program for all processes, so one place: what suits the least of them.
  free_on_host = devices.least_of_all(memory.free())
  on_host = num_examples * math.prod(image_shape)
  if cache == 'host':
    if on_host > free_on_host:
      raise UserError(
        f'config.data.cache is host, but the images take {on_host / 1e9:.1f} '
        f'GB and there are {free_on_host / 1e9:.1f} GB free; use none or auto.'
      )
    return cache
  free_on_device = devices.free_memory()
  if free_on_device is not None:
    free_on_device = devices.least_of_all(free_on_device)
  on_device = num_examples * math.prod(tiles.shape_of(image_shape))
  if cache == 'device':
    if free_on_device is not None and on_device > free_on_device:
      raise UserError(
        f'config.data.cache is device, but the images take '
        f'{on_device / 1e9:.1f} GB and the devices have '
        f'{free_on_device / 1e9:.1f} GB free each; use host or auto.'
      )
    return cache
  if on_host >= free_on_host / 2:
    return 'none'
  # What has no memory of its own gains nothing by a copy. Compiled for a TPU,
  # training on 162,770 images of configs/celeba.py takes their 2.00 GB once,
  # and beside them 0.20 GB for a batch of 128 on a chip, 0.49 GB for 256. Half
  # of what is free leaves the other half to the batch.
  fits = free_on_device is not None and on_device < free_on_device / 2
  return 'device' if fits else 'host'
