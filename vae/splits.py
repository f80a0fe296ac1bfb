"""Splits of a data set, and the order in which training sees their examples.

A split is anything with `num_examples`, `image_shape`,
`batches(indices, batch_size)` and `labels()`, as `ArraySplit` has them. The
order depends on the seed and the epoch alone, not on where the images are
kept, on the devices or on when the run was last started.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Protocol

import numpy as np


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


@dataclasses.dataclass
class DataSet:
  """The splits of a data set; test images serve evaluation alone."""

  train: Split
  validation: Split
  test: Split


class ArraySplit:
  """A split whose images lie in host memory."""

  def __init__(self, images: np.ndarray, labels: Labels | None = None):
    """Takes uint8 [num_examples, height, width, channels] and their labels."""
    self._images = images
    self._labels = labels
    self.num_examples = len(images)
    self.image_shape = images.shape[1:]

  def batches(
    self, indices: np.ndarray, batch_size: int
  ) -> Iterator[np.ndarray]:
    """See `Split`."""
    for start in range(0, len(indices), batch_size):
      yield self._images[indices[start : start + batch_size]]

  def labels(self) -> Labels | None:
    """See `Split`."""
    return self._labels


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


@dataclasses.dataclass(frozen=True)
class Topology:
  """How a global batch is laid over processes and their devices, in order.

  Attributes:
    local_devices: of each process.
    process_index: of this process.
    process_count: of all.
  """

  local_devices: int = 1
  process_index: int = 0
  process_count: int = 1

  @property
  def num_devices(self) -> int:
    """Of all processes together."""
    return self.local_devices * self.process_count

  def local_part(self, batches: np.ndarray) -> np.ndarray:
    """This process's part of [n, batch_size, …] global batches."""
    parts = batches.reshape(
      len(batches), self.process_count, -1, *batches.shape[2:]
    )
    return parts[:, self.process_index]


def train_chunks(
  split: Split,
  seed: int,
  epoch: int,
  first_step: int,
  batch_size: int,
  max_steps: int,
  topology: Topology,
) -> Iterator[tuple[np.ndarray, int]]:
  """An epoch's batches from `first_step` on, several steps at a time.

  Only this process's part of each batch is read.

  Args:
    split: to be gone through; a last partial batch is dropped.
    seed: of the run.
    epoch: counted from 0.
    first_step: of this epoch, counted from 0.
    batch_size: global; a multiple of the number of devices.
    max_steps: in a chunk.
    topology: the devices that share a batch.

  Returns:
    An iterator over pairs of the images, uint8 [local_devices, max_steps,
    per_device_batch_size, height, width, channels], and the number of steps;
    only the last chunk has fewer than `max_steps`, the rest of it is zeros.
  """
  steps = split.num_examples // batch_size
  order = epoch_order(seed, epoch, split.num_examples)
  order = order[first_step * batch_size : steps * batch_size]
  order = topology.local_part(order.reshape(-1, batch_size))
  local_batch_size = order.shape[1]
  for images in split.batches(order.ravel(), max_steps * local_batch_size):
    num_steps = len(images) // local_batch_size
    images = images.reshape(
      num_steps, topology.local_devices, -1, *split.image_shape
    ).swapaxes(0, 1)
    missing = max_steps - num_steps
    if missing:
      images = np.pad(images, ((0, 0), (0, missing), *((0, 0),) * 4))
    yield images, num_steps


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
  devices = topology.num_devices
  batch_size = max(batch_size // devices, 1) * devices
  num_batches = -(-split.num_examples // batch_size)
  per_device = -(-split.num_examples // (num_batches * devices))
  batch_size = per_device * devices
  # Padding repeats the last example; nothing of it counts.
  order = np.minimum(
    np.arange(num_batches * batch_size), split.num_examples - 1
  )
  order = topology.local_part(order.reshape(num_batches, batch_size))
  batches = split.batches(order.ravel(), order.shape[1])
  for index, images in enumerate(batches):
    shape = (topology.local_devices, per_device, *split.image_shape)
    yield images.reshape(shape), index * batch_size
