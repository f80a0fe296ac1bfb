"""The order of the examples, and images in tiles."""

import math

import numpy as np
import pytest

from vae import devices, splits

COUNT = 43
BATCH_SIZE = 8
# The index of an example.
LABELS = np.arange(COUNT, dtype=np.int32)


def numbered():
  """A split whose images hold their index."""
  indices = np.arange(COUNT, dtype=np.uint8).reshape(-1, 1, 1, 1)
  return splits.ArraySplit(np.broadcast_to(indices, (COUNT, 2, 2, 1)))


def stored():
  return splits.DeviceSplit(numbered())


def indices_in(chunk, split):
  """Indices of the examples in a chunk, [num_batches, batch_size]."""
  batches = chunk.batches.images
  if splits.stored_images(split) is not None:
    assert batches.dtype == np.int32
    batches = np.asarray(split.tiles)[batches]
  indices = batches.reshape(*batches.shape[:3], -1)[..., 0]
  indices = indices[:, : chunk.num_batches]
  if chunk.batches.labels is not None:
    labels = chunk.batches.labels[:, : chunk.num_batches]
    np.testing.assert_array_equal(labels, indices)
  indices = indices.swapaxes(0, 1)
  return indices.reshape(chunk.num_batches, -1)


def train_indices(split, first_step=0, max_steps=3, num_devices=1):
  chunks = splits.train_chunks(
    *(split, 0, 2, first_step, BATCH_SIZE, max_steps),
    *(devices.Topology(num_devices), LABELS),
  )
  return np.concatenate([indices_in(chunk, split) for chunk in chunks])


def test_order_is_a_permutation_that_seed_and_epoch_fix():
  order = splits.epoch_order(3, 5, 1000)
  np.testing.assert_array_equal(np.sort(order), np.arange(1000))
  np.testing.assert_array_equal(order, splits.epoch_order(3, 5, 1000))
  for other in ((4, 5), (3, 6), (5, 3)):
    assert np.mean(order == splits.epoch_order(*other, 1000)) < 0.02


def test_orders_are_uniform():
  places = [np.argmin(splits.epoch_order(0, e, 100)) for e in range(2000)]
  assert np.mean(places) == pytest.approx(49.5, abs=3 * 28.9 / 2000**0.5)
  assert np.std(places) == pytest.approx(28.87, rel=0.05)


@pytest.mark.parametrize('make_split', [numbered, stored])
@pytest.mark.parametrize('num_devices', [1, 4])
def test_batches_depend_on_seed_and_epoch_alone(make_split, num_devices):
  """Not on chunks, devices, the images' place or a restart."""
  expected = splits.epoch_order(0, 2, COUNT)[:40].reshape(5, BATCH_SIZE)
  for first_step, max_steps in ((0, 1), (0, 2), (0, 9), (1, 3), (4, 3)):
    np.testing.assert_array_equal(
      train_indices(make_split(), first_step, max_steps, num_devices),
      expected[first_step:],
    )


@pytest.mark.parametrize('batch_size', [1, 7, 10, 43, 50])
@pytest.mark.parametrize('num_devices', [1, 4])
def test_evaluation_sees_every_example_once(batch_size, num_devices):
  topology = devices.Topology(num_devices)
  found = [
    (start, images[..., 0, 0, 0].ravel())
    for images, start in splits.eval_batches(numbered(), batch_size, topology)
  ]
  for split in (numbered(), stored()):
    for max_batches in (1, 3, 100):
      found += [
        (start, indices_in(chunk, split).ravel())
        for chunk, start in splits.eval_chunks(
          split, batch_size, max_batches, topology
        )
      ]
  seen = np.zeros(COUNT, int)
  for start, indices in found:
    positions = start + np.arange(len(indices))
    inside = positions < COUNT
    np.testing.assert_array_equal(indices[inside], positions[inside])
    np.add.at(seen, positions[inside], 1)
  assert set(seen) == {7}


def test_processes_share_the_batches_out():
  """Two processes of two devices read, together, the batches of one of four."""

  def read(*topology):
    topology = devices.Topology(*topology)
    chunks = splits.train_chunks(
      *(numbered(), 0, 2, 1, BATCH_SIZE, 3, topology, LABELS)
    )
    evaluated = list(splits.eval_chunks(numbered(), 10, 3, topology, LABELS))
    batches = list(splits.eval_batches(numbered(), 10, topology))
    chunks = (*chunks, *(chunk for chunk, _ in evaluated))
    arrays = [array for chunk in chunks for array in chunk.batches]
    arrays += [images for images, _ in batches]
    return arrays, [start for _, start in evaluated + batches]

  (whole, starts), *parts = read(4), read(2, 0, 2), read(2, 1, 2)
  assert all(part[1] == starts for part in parts)
  for together, *apart in zip(whole, *(part[0] for part in parts), strict=True):
    np.testing.assert_array_equal(np.concatenate(apart), together)


@pytest.mark.parametrize(
  'shape', [(1, 1, 1), (28, 28, 1), (64, 64, 3), (5, 90, 3)]
)
def test_images_are_the_same_in_tiles(shape):
  images = np.random.default_rng(0).integers(0, 256, (7, *shape), np.uint8)
  packed = splits.pack_tiles(images)
  rows, columns = packed.shape[1:]
  assert (rows, columns) == splits.tiled_shape(shape)
  assert rows % 8 == 0 and columns == 128
  # No tile more than the image needs, and only zeros behind it.
  size = math.prod(shape)
  assert 0 <= rows * columns - size < 8 * 128
  assert not packed.reshape(7, -1)[:, size:].any()
  np.testing.assert_array_equal(splits.unpack_tiles(packed, shape), images)
  assert np.shares_memory(packed, images) == (size % 1024 == 0)
