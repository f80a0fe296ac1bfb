"""The training loop in this process, stopped and disturbed at certain steps."""

import dataclasses
import shutil

from etils import epath
import jax
import numpy as np
import pytest

from runs import divergence
from tests.conftest import make_data, make_small_config, Rows
import train
from vae import splits
from vae.checkpoints import Checkpoints
from vae.errors import UserError


class Stopper(Rows):
  """Raises an error in the place of a certain training row."""

  def __init__(self, rows=(), step=None, error=None):
    super().__init__(rows)
    self._stop = step, error

  def write_scalars(self, step, scalars):
    if step == self._stop[0] and 'train/loss' in scalars:
      raise self._stop[1]
    super().write_scalars(step, scalars)


class StopAt:
  """Asks the loop to stop when it is called for the n-th time."""

  def __init__(self, n):
    self.left = n

  def __call__(self):
    self.left -= 1
    return not self.left


def make_config(**changes):
  """Five steps an epoch; every chance to save is taken, or none."""
  config = make_small_config('')
  config.checkpoint.every_minutes = 1e-9
  config.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in changes.items()}
  )
  return config


RARELY = {'checkpoint__every_minutes': 1e9}


@pytest.fixture(scope='module')
def data():
  return make_data()


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
  """The last state and the rows of a run that nothing stopped."""
  writer = Rows()
  workdir = epath.Path(tmp_path_factory.mktemp('undisturbed'))
  state = train.train_and_evaluate(make_config(), workdir, data, writer)
  steps = [row['step'] for row in writer.rows if 'train/loss' in row]
  assert steps == [2, 4, 5, 7, 9, 10, 12, 14, 15]
  return state, writer.rows


def check_same(state, rows, undisturbed):
  jax.tree.map(np.testing.assert_array_equal, state, undisturbed[0])
  assert rows == undisturbed[1]


@pytest.mark.parametrize(
  ('stop', 'saved_before', 'stored', 'error'),
  [
    # In the middle of an epoch; at its beginning.
    (9, 7, False, KeyboardInterrupt()),
    (12, 10, True, OSError('disk full')),
  ],
)
def test_stopped_run_ends_in_the_same_bits(
  data, undisturbed, tmp_path, stop, saved_before, stored, error
):
  if stored:
    on_devices = [splits.DeviceSplit(s) for s in (data.train, data.validation)]
    data = splits.DataSet(*on_devices, data.test)
  config, writer = make_config(), Stopper(step=stop, error=error)
  with pytest.raises(type(error)):
    train.train_and_evaluate(config, tmp_path, data, writer)
  # No row of a later step, and every row before.
  steps = [row['step'] for row in writer.rows]
  assert steps == sorted(steps) and max(steps) < stop
  assert Checkpoints(tmp_path).all_steps()[-1] == saved_before
  again = Rows(writer.rows)
  state = train.train_and_evaluate(config, tmp_path, data, again)
  check_same(state, again.rows, undisturbed)


class Spoilt(splits.ArraySplit):
  """Cannot decode the images of its n-th chunk, from 0, once."""

  def __init__(self, images, n):
    super().__init__(images)
    self.left = n

  def batches(self, indices, batch_size):
    for batch in super().batches(indices, batch_size):
      self.left -= 1
      if self.left == -1:
        raise UserError('a.jpg cannot be decoded')
      yield batch


@pytest.mark.parametrize(
  ('spoilt', 'n', 'saved'),
  [
    # Dispatches end at steps 2, 4, 5, 7, …; 5, an epoch's end, is validated and
    # saved with that. Images to reconstruct are read from validation first.
    ('train', 4, 7),
    ('validation', 1, 5),
  ],
)
def test_trained_steps_are_saved_if_an_image_cannot_be_decoded(
  data, undisturbed, tmp_path, spoilt, n, saved
):
  config, writer = make_config(**RARELY), Rows()
  split = Spoilt(getattr(data, spoilt).images, n)
  data = dataclasses.replace(data, **{spoilt: split})
  with pytest.raises(UserError, match='a.jpg cannot be decoded'):
    train.train_and_evaluate(config, tmp_path, data, writer)
  assert Checkpoints(tmp_path).all_steps()[-1] == saved
  # And with a sound image it continues.
  state = train.train_and_evaluate(config, tmp_path, data, writer)
  check_same(state, writer.rows, undisturbed)


def sums(rows):
  """The sum of the training losses up to each row, by its step."""
  found, total, last = {}, 0.0, 0
  for row in rows:
    if 'train/loss' in row:
      total += row['train/loss'] * (row['step'] - last)
      last = row['step']
      found[last] = total
  return found


def test_run_that_is_stopped_over_and_over_ends_in_the_same_bits(
  data, undisturbed, tmp_path
):
  """At every third place where it can be: between rows, at an epoch's end."""
  config = make_config(**RARELY, train__steps_per_dispatch=1)
  writer, stops, saved = Rows(), [], Checkpoints(tmp_path)
  while len(stops) < 20:
    stop = StopAt(3)
    state = train.train_and_evaluate(config, tmp_path, data, writer, stop)
    if stop.left:
      break
    stops.append(int(state.step))
    assert Checkpoints(tmp_path).all_steps()[-1] == state.step
  # Between rows, and before a validation.
  assert {1, 3, 6, 8} & set(stops) and {5, 10, 15} & set(stops), stops
  jax.tree.map(np.testing.assert_array_equal, state, undisturbed[0])
  # A stop ends a row; its steps count once.
  rows = [row for row in undisturbed[1] if 'val/loss' in row]
  assert [row for row in writer.rows if 'val/loss' in row] == rows
  expected, found = sums(undisturbed[1]), sums(writer.rows)
  for step in expected:
    assert found[step] == pytest.approx(expected[step], rel=1e-9)
  # The best two by the losses that were made up for, and the last two.
  losses = {r['step']: r['val/loss'] for r in writer.rows if 'val/loss' in r}
  assert saved.best_step() == min(losses, key=losses.get)
  assert set(sorted(losses, key=losses.get)[:2]) <= set(saved.all_steps())
  assert len(saved.all_steps()) <= 4


@pytest.fixture(scope='module')
def epoch(data, tmp_path_factory):
  """The workdir of a run of five good steps."""
  workdir = tmp_path_factory.mktemp('epoch')
  config = make_config(train__num_epochs=1)
  train.train_and_evaluate(config, workdir, data, Rows())
  return workdir


@pytest.fixture
def diverging(epoch, tmp_path):
  """Its config, from here on: the sixth step makes the seventh not finite."""
  shutil.copytree(epoch, tmp_path, dirs_exist_ok=True)
  return make_config(optimizer__learning_rate=1e30)


@pytest.mark.parametrize('steps_per_dispatch', [1, 5])
def test_diverged_run_ends_before_it_is_saved(
  diverging, data, tmp_path, steps_per_dispatch
):
  config, writer = diverging, Rows()
  config.train.steps_per_dispatch = steps_per_dispatch
  with pytest.raises(UserError) as caught:
    train.train_and_evaluate(config, tmp_path, data, writer)
  message = str(caught.value)
  assert message.startswith('diverged at step 7: ') and '\n' not in message
  assert 'loss is' in message or 'grad_norm is' in message
  assert f'good checkpoint is {tmp_path}/checkpoints/5.' in message
  assert Checkpoints(tmp_path).all_steps() == [4, 5]
  # There is no row of the finite step 6 alone.
  assert writer.rows == []


def test_state_that_led_to_divergence_is_named(diverging, data, tmp_path):
  """It was saved by a stop before the step that would have shown it."""
  config = diverging
  config.train.steps_per_dispatch = 1
  state = train.train_and_evaluate(config, tmp_path, data, Rows(), StopAt(1))
  assert state.step == 6
  with pytest.raises(UserError) as caught:
    train.train_and_evaluate(config, tmp_path, data, Rows())
  folder = f'{tmp_path}/checkpoints'
  assert f'The last good checkpoint is {folder}/5.' in str(caught.value)
  assert f'Delete {folder}/6, which led to this.' in str(caught.value)
  # And then the run does continue.
  shutil.rmtree(f'{folder}/6')
  config.optimizer.learning_rate = 1e-3
  assert train.train_and_evaluate(config, tmp_path, data, Rows()).step == 15


@pytest.mark.slow
def test_divergence_by_the_last_update_is_found(data, tmp_path):
  """Its parameters are not finite, and no step comes after it."""
  config = make_config(train__num_epochs=1, optimizer__learning_rate=1e-3)
  train.train_and_evaluate(config, tmp_path, data, Rows(), StopAt(2))
  assert Checkpoints(tmp_path).all_steps() == [2, 4]
  # Times Adam's direction, which is above 1 for some parameter.
  config.optimizer.learning_rate = float(np.finfo(np.float32).max)
  config.train.on_nonfinite = 'skip'
  with pytest.raises(UserError, match='at step 5: .*parameters .* not finite'):
    train.train_and_evaluate(config, tmp_path, data, Rows())
  assert Checkpoints(tmp_path).all_steps() == [2, 4]


def test_steps_that_are_not_finite_can_be_skipped(
  diverging, data, tmp_path, monkeypatch, capsys
):
  config, writer = diverging, Rows()
  config.train.on_nonfinite = 'skip'
  state = train.train_and_evaluate(config, tmp_path, data, writer)
  assert state.step == 15
  assert capsys.readouterr().err.count('was skipped') == 1
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  rows = [row for row in writer.rows if 'val/loss' not in row]
  # Rows of 2, 2 and 1 steps; step 6 was finite.
  assert [r['train/skipped_steps'] for r in rows] == [1, 2, 1, 2, 2, 1]
  assert np.isfinite(rows[0]['train/loss']) and 'train/loss' not in rows[1]
  # But not for ever.
  monkeypatch.setattr(divergence, '_MAX_SKIPPED', 5)
  config.train.num_epochs = 6
  with pytest.raises(
    UserError, match='step 20: .*good checkpoint is .*/5. Delete'
  ):
    train.train_and_evaluate(config, tmp_path, data, Rows())
