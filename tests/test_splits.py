import numpy as np
import pytest

from vae import devices
from vae import splits
from vae import tiles


def numbered(count):
  """A split whose images say their index."""
  indices = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
  return splits.ArraySplit(np.broadcast_to(indices, (count, 2, 2, 1)))


def test_arrays_have_the_labels_that_they_are_given():
  images = np.zeros((3, 2, 2, 1), np.uint8)
  labels = splits.Labels(('Smiling',), np.array([[0], [1], [0]]))
  assert splits.ArraySplit(images, labels).labels() is labels
  assert splits.ArraySplit(images).labels() is None


def test_order_is_a_permutation_that_seed_and_epoch_fix():
  order = splits.epoch_order(3, 5, 1000)
  np.testing.assert_array_equal(np.sort(order), np.arange(1000))
  np.testing.assert_array_equal(order, splits.epoch_order(3, 5, 1000))
  for other in ((4, 5), (3, 6), (5, 3)):
    same = np.mean(order == splits.epoch_order(*other, 1000))
    assert same < 0.02


def test_orders_are_uniform():
  # Where example 0 comes, over many epochs: mean and spread of a uniform.
  places = [np.argmin(splits.epoch_order(0, e, 100)) for e in range(2000)]
  assert np.mean(places) == pytest.approx(49.5, abs=3 * 28.9 / 2000**0.5)
  assert np.std(places) == pytest.approx(28.87, rel=0.05)


def stored(count):
  """The same, with the images on the device."""
  return splits.DeviceSplit(numbered(count))


def indices_in(chunk, split):
  """What the batches of a chunk consist of, [num_batches, batch_size]."""
  batches = chunk.batches
  if isinstance(split, splits.DeviceSplit):
    assert batches.dtype == np.int32
    batches = np.asarray(split.tiles)[batches]
  # The first number of an image is its index.
  indices = batches.reshape(*batches.shape[:3], -1)[..., 0]
  indices = indices[:, : chunk.num_batches].swapaxes(0, 1)
  return indices.reshape(chunk.num_batches, -1)


def go_through(first_step=0, max_steps=3, num_devices=1, split=None):
  """The indices of each step's global batch, in order."""
  split = split or numbered(43)
  steps = []
  for chunk in splits.train_chunks(
    split, 0, 2, first_step, 8, max_steps, devices.Topology(num_devices)
  ):
    shape = (num_devices, min(max_steps, 5), 8 // num_devices)
    assert chunk.batches.shape[:3] == shape
    assert not chunk.batches[:, chunk.num_batches :].any()
    steps.extend(indices_in(chunk, split))
  return np.array(steps)


def test_an_epoch_is_its_order_without_the_partial_batch():
  expected = splits.epoch_order(0, 2, 43)[:40].reshape(5, 8)
  np.testing.assert_array_equal(go_through(), expected)


@pytest.mark.parametrize('max_steps', [1, 2, 5, 9])
@pytest.mark.parametrize('num_devices', [1, 4])
@pytest.mark.parametrize('make_split', [numbered, stored])
def test_chunks_devices_and_place_do_not_change_the_batches(
  max_steps, num_devices, make_split
):
  np.testing.assert_array_equal(
    go_through(0, max_steps, num_devices, make_split(43)), go_through()
  )


def test_images_on_the_device_are_those_of_the_split():
  on_host, on_device = numbered(43), stored(43)
  assert on_device.num_examples == 43 and on_device.image_shape == (2, 2, 1)
  assert on_device.tiles.shape == (43, 8, 128)
  np.testing.assert_array_equal(
    tiles.unpack(on_device.tiles, (2, 2, 1)), on_host.images
  )
  np.testing.assert_array_equal(
    next(on_device.batches(np.array([5, 3]), 2)), on_host.images[[5, 3]]
  )
  assert splits.stored_images(on_host) is None
  assert splits.stored_images(on_device) is on_device.tiles


@pytest.mark.parametrize('batch_size', [1, 7, 10, 43, 50])
@pytest.mark.parametrize('max_batches', [1, 3, 100])
@pytest.mark.parametrize('make_split', [numbered, stored])
def test_validation_sees_every_example_once(
  batch_size, max_batches, make_split
):
  split, seen = make_split(43), []
  for chunk, start in splits.eval_chunks(
    split, batch_size, max_batches, devices.Topology(2)
  ):
    flat = indices_in(chunk, split).ravel()
    seen.extend(zip(start + np.arange(len(flat)), flat, strict=True))
  assert [(p, i) for p, i in seen if p < 43] == [(i, i) for i in range(43)]


@pytest.mark.parametrize('first_step', range(5))
def test_an_epoch_goes_on_from_any_step(first_step):
  np.testing.assert_array_equal(
    go_through(first_step), go_through()[first_step:]
  )


@pytest.mark.parametrize('batch_size', [1, 7, 10, 43, 50])
@pytest.mark.parametrize('num_devices', [1, 4])
def test_evaluation_sees_every_example_once(batch_size, num_devices):
  seen = []
  for images, start in splits.eval_batches(
    numbered(43), batch_size, devices.Topology(num_devices)
  ):
    assert images.shape[0] == num_devices
    flat = images[..., 0, 0, 0].ravel()
    positions = start + np.arange(len(flat))
    seen.extend(zip(positions, flat, strict=True))
  inside = [(p, i) for p, i in seen if p < 43]
  assert inside == [(i, i) for i in range(43)]


def test_processes_share_the_batches_out():
  """Two processes of two devices read, together, what one of four reads."""
  whole = devices.Topology(4)
  parts = [devices.Topology(2, process, 2) for process in range(2)]
  chunks = [
    list(splits.train_chunks(numbered(43), 0, 2, 1, 8, 3, topology))
    for topology in (whole, *parts)
  ]
  evaluated = [
    list(splits.eval_chunks(numbered(43), 10, 3, topology))
    for topology in (whole, *parts)
  ]
  starts = [[start for _, start in pairs] for pairs in evaluated]
  assert starts[0] == starts[1] == starts[2]
  chunks = [
    [*some, *(chunk for chunk, _ in pairs)]
    for some, pairs in zip(chunks, evaluated, strict=True)
  ]
  for together, *apart in zip(*chunks, strict=True):
    assert {chunk.num_batches for chunk in apart} == {together.num_batches}
    np.testing.assert_array_equal(
      np.concatenate([chunk.batches for chunk in apart]), together.batches
    )
  batches = [
    list(splits.eval_batches(numbered(43), 10, topology))
    for topology in (whole, *parts)
  ]
  for together, *apart in zip(*batches, strict=True):
    assert {start for _, start in apart} == {together[1]}
    np.testing.assert_array_equal(
      np.concatenate([images for images, _ in apart]), together[0]
    )
