import numpy as np
import pytest

from vae import splits


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


def go_through(first_step=0, max_steps=3, num_devices=1):
  """The indices of each step's global batch, in order."""
  steps = []
  chunks = splits.train_chunks(
    numbered(43), 0, 2, first_step, 8, max_steps, splits.Topology(num_devices)
  )
  for images, num_steps in chunks:
    assert images.shape == (num_devices, max_steps, 8 // num_devices, 2, 2, 1)
    assert not images[:, num_steps:].any()
    for step in range(num_steps):
      steps.append(images[:, step, :, 0, 0, 0].ravel())
  return np.array(steps)


def test_an_epoch_is_its_order_without_the_partial_batch():
  expected = splits.epoch_order(0, 2, 43)[:40].reshape(5, 8)
  np.testing.assert_array_equal(go_through(), expected)


@pytest.mark.parametrize('max_steps', [1, 2, 5, 9])
@pytest.mark.parametrize('num_devices', [1, 4])
def test_chunks_and_devices_do_not_change_the_batches(max_steps, num_devices):
  np.testing.assert_array_equal(
    go_through(0, max_steps, num_devices), go_through()
  )


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
    numbered(43), batch_size, splits.Topology(num_devices)
  ):
    assert images.shape[0] == num_devices
    flat = images[..., 0, 0, 0].ravel()
    positions = start + np.arange(len(flat))
    seen.extend(zip(positions, flat, strict=True))
  inside = [(p, i) for p, i in seen if p < 43]
  assert inside == [(i, i) for i in range(43)]


def test_processes_share_the_batches_out():
  """Two processes of two devices read, together, what one of four reads."""
  whole = splits.Topology(4)
  parts = [splits.Topology(2, process, 2) for process in range(2)]
  chunks = [
    list(splits.train_chunks(numbered(43), 0, 2, 1, 8, 3, topology))
    for topology in (whole, *parts)
  ]
  for together, *apart in zip(*chunks, strict=True):
    assert {num_steps for _, num_steps in apart} == {together[1]}
    np.testing.assert_array_equal(
      np.concatenate([images for images, _ in apart]), together[0]
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
