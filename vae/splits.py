"""Splits of a data set, and the order in which training sees their examples.

A split is anything with `num_examples`, `image_shape`,
`batches(indices, batch_size)`, `labels()` and `names_digest()`, as `ArraySplit`
has them. The order depends on the seed and the epoch alone, not on where the
images are kept, on the devices or on when the run was last started.

Training and validation go through a split in chunks of several batches, each
a dispatch. A chunk holds the images; of a `DeviceSplit`, whose images are on
the devices already, it holds their indices.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Protocol

import jax
import numpy as np

from vae import devices
from vae import tiles
from vae.devices import Topology


@dataclasses.dataclass(frozen=True)
class Labels:
  """Class indices of a split's examples: attributes, factors or classes.

  Attributes:
    names: of the labels, [num_labels].
    values: int [num_examples, num_labels], counted from 0.
    classes: what the classes of a label are called, by its name, where they
      are called anything.
  """

  names: tuple[str, ...]
  values: np.ndarray
  classes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

  def class_names(self, label: str) -> list[str]:
    """What to call each class of a label."""
    if label in self.classes:
      return list(self.classes[label])
    values = self.values[:, self.names.index(label)]
    return [f'{label} {value}' for value in range(values.max() + 1)]


class Split(Protocol):
  """Images that can be had by their index."""

  num_examples: int
  image_shape: tuple[int, int, int]

  def batches(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    """The images at `indices`, in this order; the last batch may be short.

    Returns:
      An iterator over uint8 [batch_size, height, width, channels].
    """

  def labels(self) -> Labels | None:
    """What is known of each example, in order; None where nothing is.

    Reads it when first asked; training never asks.

    Raises:
      UserError: what is wrong with the labels' file.
    """

  def names_digest(self) -> str | None:
    """Says which images these are, in their order; None without names."""


@dataclasses.dataclass
class DataSet:
  """The splits of a data set; test images serve evaluation alone."""

  train: Split
  validation: Split
  test: Split

  def identity(self) -> dict[str, int | str]:
    """What tells the images that a run sees from others, wherever they lie.

    Returns:
      How many images each split has, by its name, and under `SPLIT_names`,
      where they have names, the digest of these.
    """
    seen = {'train': self.train, 'validation': self.validation}
    digests = {f'{k}_names': split.names_digest() for k, split in seen.items()}
    return {
      **{name: split.num_examples for name, split in seen.items()},
      **{key: digest for key, digest in digests.items() if digest is not None},
    }


class ArraySplit:
  """A split whose images lie in host memory.

  Attributes:
    images: uint8 [num_examples, height, width, channels].
  """

  def __init__(self, images: np.ndarray, labels: Labels | None = None):
    """Takes the images and their labels."""
    self.images = images
    self._labels = labels
    self.num_examples = len(images)
    self.image_shape = images.shape[1:]

  def batches(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    """See `Split`."""
    for start in range(0, len(indices), batch_size):
      yield self.images[indices[start : start + batch_size]]

  def labels(self) -> Labels | None:
    """See `Split`."""
    return self._labels

  def names_digest(self) -> None:
    """See `Split`: there are no names."""


class DeviceSplit:
  """A split whose images lie in the memory of each of this process's devices.

  What the devices have to be told of a batch is which examples it has.
  """

  def __init__(self, split: Split):
    """Takes the split as it is in host memory, in `split.images`."""
    self._split = split
    self.num_examples = split.num_examples
    self.image_shape = split.image_shape

  @functools.cached_property
  def tiles(self) -> jax.Array:
    """All images, uint8 [num_examples, 8·k, 128] (`vae.tiles`)."""
    return devices.replicate(tiles.pack(self._split.images))

  def batches(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    """See `Split`: images, on the host."""
    return self._split.batches(indices, batch_size)

  def labels(self) -> Labels | None:
    """See `Split`."""
    return self._split.labels()

  def names_digest(self) -> str | None:
    """See `Split`."""
    return self._split.names_digest()


def stored_images(split: Split) -> jax.Array | None:
  """The images that the chunks of a split name; None if they hold their own.

  Returns:
    uint8 [num_examples, 8·k, 128] (`vae.tiles`), or None.
  """
  return split.tiles if isinstance(split, DeviceSplit) else None


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """A permutation of the examples, [num_examples], for an epoch.

  It ranks raw random bits, which NumPy guarantees never to change, where
  `Generator.permutation` may differ between its versions.
  """
  bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
  return np.argsort(bits.random_raw(num_examples), kind='stable')


def spread(num_examples: int, at_most: int) -> np.ndarray:
  """Positions of no more than so many examples, evenly spread over a split."""
  count = min(num_examples, at_most)
  return np.linspace(0, num_examples - 1, count).astype(int)


@dataclasses.dataclass
class Chunk:
  """Several batches, that go to the devices together.

  Attributes:
    batches: this process's part of each: images, uint8 [local_devices,
      max_batches, per_device_batch_size, height, width, channels], or the
      indices of stored ones, int32 [local_devices, max_batches,
      per_device_batch_size].
    num_batches: how many there are; what is beyond them is zeros.
  """

  batches: np.ndarray
  num_batches: int


def train_chunks(
  split: Split,
  seed: int,
  epoch: int,
  first_step: int,
  batch_size: int,
  max_steps: int,
  topology: Topology,
) -> Iterator[Chunk]:
  """An epoch's batches from `first_step` on, several steps at a time.

  Only this process's part of each batch is read.

  Args:
    split: to be gone through; a last partial batch is dropped.
    seed: of the run.
    epoch: counted from 0.
    first_step: of this epoch, counted from 0.
    batch_size: global; a multiple of the number of devices.
    max_steps: in a chunk; only the last chunk has fewer.
    topology: the devices that share a batch.
  """
  steps = split.num_examples // batch_size
  order = epoch_order(seed, epoch, split.num_examples)
  order = order[: steps * batch_size].reshape(steps, batch_size)
  return _chunks(split, order[first_step:], min(max_steps, steps), topology)


def eval_chunks(
  split: Split, batch_size: int, max_batches: int, topology: Topology
) -> Iterator[tuple[Chunk, int]]:
  """Every example of a split once, in order, several batches at a time.

  Args:
    split: to be gone through; the last batch is padded.
    batch_size: as of `eval_batches`.
    max_batches: in a chunk; only the last chunk has fewer.
    topology: the devices that share a batch.

  Returns:
    An iterator over pairs of a chunk and the position in the split of its
    first example.
  """
  order = _eval_order(split.num_examples, batch_size, topology)
  max_batches = min(max_batches, len(order))
  chunks = _chunks(split, order, max_batches, topology)
  for index, chunk in enumerate(chunks):
    yield chunk, index * max_batches * order.shape[1]


def _chunks(
  split: Split, order: np.ndarray, max_batches: int, topology: Topology
) -> Iterator[Chunk]:
  """Chunks of the global batches that `order` [n, batch_size] names."""
  order = topology.local_part(order)
  local_batch_size = order.shape[1]
  order, size = order.ravel(), max_batches * local_batch_size
  if isinstance(split, DeviceSplit):
    order = order.astype(np.int32)
    read = (order[i : i + size] for i in range(0, len(order), size))
  else:
    read = split.batches(order, size)
  for batches in read:
    num_batches = len(batches) // local_batch_size
    batches = batches.reshape(
      num_batches, topology.local_devices, -1, *batches.shape[1:]
    ).swapaxes(0, 1)
    missing = max_batches - num_batches
    if missing:
      others = ((0, 0),) * (batches.ndim - 2)
      batches = np.pad(batches, ((0, 0), (0, missing), *others))
    yield Chunk(batches, num_batches)


def eval_batches(
  split: Split, batch_size: int, topology: Topology
) -> Iterator[tuple[np.ndarray, int]]:
  """Every example of a split once, in order; the last batch is padded.

  Args:
    split: to be gone through.
    batch_size: global, at most, but for one example on each device; batches
      are of one size, so that little is padding.
    topology: the devices that share a batch.

  Returns:
    An iterator over pairs of this process's images, uint8 [local_devices,
    per_device_batch_size, height, width, channels], and the position in the
    split of the global batch's first example.
  """
  order = _eval_order(split.num_examples, batch_size, topology)
  global_batch_size = order.shape[1]
  order = topology.local_part(order)
  batches = split.batches(order.ravel(), order.shape[1])
  for index, images in enumerate(batches):
    shape = (topology.local_devices, -1, *split.image_shape)
    yield images.reshape(shape), index * global_batch_size


def _eval_order(
  num_examples: int, batch_size: int, topology: Topology
) -> np.ndarray:
  """Positions of the examples of each global batch, [n, batch_size]."""
  num_devices = topology.num_devices
  batch_size = max(batch_size // num_devices, 1) * num_devices
  num_batches = -(-num_examples // batch_size)
  per_device = -(-num_examples // (num_batches * num_devices))
  # Padding repeats the last example; nothing of it counts.
  order = np.arange(num_batches * per_device * num_devices)
  return np.minimum(order, num_examples - 1).reshape(num_batches, -1)
