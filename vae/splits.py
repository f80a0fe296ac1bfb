"""Splits of a data set, and the order in which training sees their examples.

The order depends on the seed and the epoch alone, not on the images' place, the
devices or a restart. Each dispatch is a chunk of several batches: images, or
their indices if the images are on the devices already (`DeviceSplit`).

On a TPU an array lies in tiles of 8 × 128 numbers of its last two axes, and a
program that picks images of other shapes first copies all into another layout.
As [num_images, 8·k, 128], with zeros behind the last pixel, each image is k
whole tiles and is picked in place.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vae import devices
from vae.devices import Topology

_TILE = (8, 128)


@dataclasses.dataclass(frozen=True)
class Labels:
  """Class indices of a split's examples: attributes, factors or classes.

  Attributes:
    names: of the labels, [num_labels].
    values: class indices from 0, int [num_examples, num_labels].
    classes: names of a label's classes, by the label's name, if they have any.
  """

  names: tuple[str, ...]
  values: np.ndarray
  classes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

  def class_names(self, label: str) -> list[str]:
    """The names of a label's classes; by default its name and a number."""
    if label in self.classes:
      return list(self.classes[label])
    values = self.values[:, self.names.index(label)]
    return [f'{label} {value}' for value in range(values.max() + 1)]


class Split(Protocol):
  """Images by their index."""

  num_examples: int
  image_shape: tuple[int, int, int]

  def batches(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    """The images at `indices`, uint8 [batch_size, height, width, channels].

    The last batch may have fewer.
    """

  def labels(self) -> Labels | None:
    """Reads the labels, if there are any; UserError if they are damaged."""

  def names_digest(self) -> str | None:
    """A digest of the images' names in order; None without names."""


@dataclasses.dataclass
class DataSet:
  """The splits of a data set; test images serve evaluation alone."""

  train: Split
  validation: Split
  test: Split

  def identity(self) -> dict[str, int | str]:
    """The number of images in each split of a run, and their names' digest."""
    seen = {'train': self.train, 'validation': self.validation}
    identity: dict[str, int | str] = {
      name: split.num_examples for name, split in seen.items()
    }
    for name, split in seen.items():
      if (digest := split.names_digest()) is not None:
        identity[f'{name}_names'] = digest
    return identity


class ArraySplit:
  """A split in host memory, uint8 [num_examples, height, width, channels]."""

  def __init__(self, images: np.ndarray, labels: Labels | None = None):
    self.images = images
    self.num_examples = len(images)
    self.image_shape = images.shape[1:]
    self.labels = lambda: labels
    self.names_digest = lambda: None

  def batches(self, indices, batch_size):
    for start in range(0, len(indices), batch_size):
      yield self.images[indices[start : start + batch_size]]


class DeviceSplit:
  """A split in host memory, copied to each of this process's devices.

  Batches go to the devices as indices.
  """

  def __init__(self, split: Any):
    self._split = split
    self.num_examples = split.num_examples
    self.image_shape = split.image_shape
    self.batches, self.labels = split.batches, split.labels
    self.names_digest = split.names_digest

  @functools.cached_property
  def tiles(self) -> jax.Array:
    """All images on the devices, uint8 [num_examples, 8·k, 128]."""
    return devices.replicate(pack_tiles(self._split.images))


def stored_images(split: Split) -> jax.Array | None:
  """`DeviceSplit.tiles`; None if the split's chunks hold images."""
  return split.tiles if isinstance(split, DeviceSplit) else None


def tiled_shape(image_shape: tuple[int, int, int]) -> tuple[int, int]:
  """The shape of an image in tiles, (8·k, 128)."""
  num_tiles = -(-math.prod(image_shape) // math.prod(_TILE))
  return _TILE[0] * num_tiles, _TILE[1]


def pack_tiles(images: np.ndarray) -> np.ndarray:
  """Images [n, height, width, channels] as tiles [n, 8·k, 128]."""
  flat = images.reshape(len(images), -1)
  shape = tiled_shape(images.shape[1:])
  missing = math.prod(shape) - flat.shape[1]
  if missing:
    flat = np.pad(flat, ((0, 0), (0, missing)))
  return flat.reshape(len(images), *shape)


def unpack_tiles(
  tiles: jax.Array, image_shape: tuple[int, int, int]
) -> jax.Array:
  """The inverse of `pack_tiles`."""
  flat = jnp.reshape(tiles, (len(tiles), -1))
  return flat[:, : math.prod(image_shape)].reshape(len(tiles), *image_shape)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """A permutation of the examples, [num_examples], for an epoch.

  It ranks raw random bits, which are the same in every version of NumPy, unlike
  a `permutation`.
  """
  bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
  return np.argsort(bits.random_raw(num_examples), kind='stable')


def spread(num_examples: int, at_most: int) -> np.ndarray:
  """Positions of at most so many examples, evenly spread over a split."""
  count = min(num_examples, at_most)
  return np.linspace(0, num_examples - 1, count).astype(int)


class Examples(NamedTuple):
  """Examples as the devices are sent them.

  Attributes:
    images: uint8 […, height, width, channels], or int32 indices […] of stored
      ones.
    labels: int32 […], if the model is conditioned on them.
  """

  images: Any
  labels: Any = None


@dataclasses.dataclass
class Chunk:
  """Several batches that go to the devices together.

  Attributes:
    batches: this process's part of each, [local_devices, max_batches,
      per_device_batch_size, …].
    num_batches: number of batches; zeros follow them.
  """

  batches: Examples
  num_batches: int


def train_chunks(
  split: Split,
  seed: int,
  epoch: int,
  first_step: int,
  batch_size: int,
  max_steps: int,
  topology: Topology,
  labels: np.ndarray | None = None,
) -> Iterator[Chunk]:
  """An epoch's batches from `first_step` on, `max_steps` at a time.

  The epoch and the first step within it count from 0. `batch_size` is global, a
  multiple of the number of devices. A last partial batch is dropped. Each
  process reads only its part of a batch. `labels` are those of the split.
  """
  steps = split.num_examples // batch_size
  order = epoch_order(seed, epoch, split.num_examples)
  order = order[: steps * batch_size].reshape(steps, batch_size)
  order, max_steps = order[first_step:], min(max_steps, steps)
  return _chunks(split, order, max_steps, topology, labels)


def eval_chunks(
  split: Split,
  batch_size: int,
  max_batches: int,
  topology: Topology,
  labels: np.ndarray | None = None,
) -> Iterator[tuple[Chunk, int]]:
  """`eval_batches`, several at a time, with the position of each chunk."""
  order = _eval_order(split.num_examples, batch_size, topology)
  max_batches = min(max_batches, len(order))
  chunks = _chunks(split, order, max_batches, topology, labels)
  for index, chunk in enumerate(chunks):
    yield chunk, index * max_batches * order.shape[1]


def eval_batches(
  split: Split, batch_size: int, topology: Topology
) -> Iterator[tuple[np.ndarray, int]]:
  """Images of every example once, in order; the last batch is padded.

  All batches have the same size, at most the global `batch_size`, but at least
  one example on each device.

  Yields:
    Pairs of this process's images, uint8 [local_devices, per_device_batch_size,
    height, width, channels], and the position in the split of the global
    batch's first example.
  """
  order = _eval_order(split.num_examples, batch_size, topology)
  local = topology.local_part(order)
  batches = split.batches(local.ravel(), local.shape[1])
  for index, images in enumerate(batches):
    images = images.reshape(topology.local_devices, -1, *images.shape[1:])
    yield images, index * order.shape[1]


def _chunks(
  split: Split,
  order: np.ndarray,
  max_batches: int,
  topology: Topology,
  labels: np.ndarray | None,
) -> Iterator[Chunk]:
  """Chunks of the global batches in `order`, [n, batch_size]."""
  order = topology.local_part(order)
  local_batch_size = order.shape[1]
  order = order.ravel().astype(np.int32)
  size = max_batches * local_batch_size
  parts = [order[i : i + size] for i in range(0, len(order), size)]
  is_stored = isinstance(split, DeviceSplit)
  read = iter(parts) if is_stored else split.batches(order, size)
  for part, images in zip(parts, read, strict=True):
    num_batches = len(part) // local_batch_size

    def lay_out(rows, num_batches=num_batches):
      rows = rows.reshape(
        num_batches, topology.local_devices, -1, *rows.shape[1:]
      ).swapaxes(0, 1)
      if missing := max_batches - num_batches:
        others = ((0, 0),) * (rows.ndim - 2)
        rows = np.pad(rows, ((0, 0), (0, missing), *others))
      return rows

    examples = Examples(images, None if labels is None else labels[part])
    yield Chunk(jax.tree.map(lay_out, examples), num_batches)


def _eval_order(
  num_examples: int, batch_size: int, topology: Topology
) -> np.ndarray:
  """Positions of the examples of each global batch, [n, batch_size]."""
  num_devices = topology.local_devices * topology.process_count
  batch_size = max(batch_size // num_devices, 1) * num_devices
  num_batches = -(-num_examples // batch_size)
  per_device = -(-num_examples // (num_batches * num_devices))
  # Padding repeats the last example; nothing of it counts.
  order = np.arange(num_batches * per_device * num_devices)
  return np.minimum(order, num_examples - 1).reshape(num_batches, -1)
