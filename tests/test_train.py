"""The loop in this process, and what stops it at a certain step."""

import dataclasses
import shutil

from etils import epath
import jax
import numpy as np
import pytest
import training_loop

from runs import progress
from tests.conftest import make_small_config
import train
from vae import checkpoints
from vae import splits
from vae.checkpoints import CheckpointWriter
from vae.errors import UserError


class Stopper(progress.NullWriter):
  """Keeps rows, and raises something before it takes a certain one."""

  def __init__(self, step=None, error=None):
    self.rows = []
    self._stop = step, error

  def rewind(self, step, validated):
    self.rows = [
      row
      for row in self.rows
      if (row['step'], 'val/loss' in row) <= (step, validated)
    ]

  def write_scalars(self, step, scalars):
    if step == self._stop[0] and 'train/loss' in scalars:
      raise self._stop[1]
    scalars.pop('images_per_second', None)
    self.rows.append({'step': step, **scalars})


@pytest.fixture(scope='module')
def setting():
  """A config and data with 5 steps an epoch; saves at every chance."""
  config = make_small_config('')
  config.checkpoint.every_minutes = 1e-9
  pixels = np.random.default_rng(0).integers(0, 256, (51, 16, 16, 3), np.uint8)
  train_split = splits.ArraySplit(pixels[:40])
  rest = splits.ArraySplit(pixels[40:])
  return config, splits.DataSet(train_split, rest, rest)


@pytest.fixture(scope='module')
def undisturbed(setting, tmp_path_factory):
  """The last state and the rows of a run that nothing stopped."""
  config, data = setting
  writer = Stopper()
  workdir = epath.Path(tmp_path_factory.mktemp('undisturbed'))
  state = train.train_and_evaluate(config, workdir, data, writer)
  steps = [row['step'] for row in writer.rows if 'train/loss' in row]
  assert steps == [2, 4, 5, 7, 9, 10, 12, 14, 15]
  return state, writer.rows


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError('disk full')])
@pytest.mark.parametrize(
  ('stop', 'saved_before', 'place'),
  [
    # In the middle of an epoch; at its beginning; in the first.
    (9, 7, splits.ArraySplit),
    (12, 10, splits.DeviceSplit),
    (4, 2, splits.DeviceSplit),
  ],
)
def test_stopped_run_ends_in_the_same_bits(
  setting, undisturbed, tmp_path, stop, saved_before, place, error
):
  config, data = setting
  if place is splits.DeviceSplit:
    on_devices = [place(split) for split in (data.train, data.validation)]
    data = splits.DataSet(*on_devices, data.test)
  writer = Stopper(stop, error)
  with pytest.raises(type(error)):
    train.train_and_evaluate(config, tmp_path, data, writer)
  # No row of a later step, and every row before.
  steps = [row['step'] for row in writer.rows]
  assert steps == sorted(steps) and max(steps) < stop
  assert checkpoints.Checkpoints(tmp_path).latest_step() == saved_before
  again = Stopper()
  again.rows = writer.rows
  state = train.train_and_evaluate(config, tmp_path, data, again)
  jax.tree.map(np.testing.assert_array_equal, state, undisturbed[0])
  assert again.rows == undisturbed[1]


class Broken(Stopper):
  """Ends, as by a kill, between a validation's row and its checkpoint."""

  def flush(self):
    if self.rows and 'val/loss' in self.rows[-1]:
      raise OSError('killed')


def test_validation_that_was_not_saved_is_told_once(
  setting, undisturbed, tmp_path
):
  """It is made good after a stop at an epoch's end, and cut short again."""
  config, data = setting
  config = config.copy_and_resolve_references()
  config.checkpoint.every_minutes = 1e9
  config.train.steps_per_dispatch = 5
  rows = []
  for writer, stop in (
    (Stopper(), StopAt(1)),
    (Broken(), StopAt(10**9)),
    (Stopper(), StopAt(10**9)),
  ):
    writer.rows = rows
    try:
      train.train_and_evaluate(config, tmp_path, data, writer, stop)
    except OSError:
      assert checkpoints.Checkpoints(tmp_path).latest_step() == 5
    rows = writer.rows
  assert rows == undisturbed[1]


class Interrupted(splits.ArraySplit):
  """Is interrupted when the images of its third chunk are read."""

  def batches(self, indices, batch_size):
    for index, batch in enumerate(super().batches(indices, batch_size)):
      if index == 2:
        raise KeyboardInterrupt
      yield batch


def test_what_was_dispatched_counts_when_the_data_ends(setting, tmp_path):
  config, data = setting
  data = splits.DataSet(
    Interrupted(data.train.images), data.validation, data.test
  )
  writer = Stopper()
  with pytest.raises(KeyboardInterrupt):
    train.train_and_evaluate(config, tmp_path, data, writer)
  assert [row['step'] for row in writer.rows] == [2, 4]
  assert checkpoints.Checkpoints(tmp_path).latest_step() == 4


class Spoilt(splits.ArraySplit):
  """Cannot decode the images of its n-th chunk, from 0, until mended."""

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
    # Dispatches end at steps 2, 4, 5, 7, …; 5, an epoch's, is validated and
    # saved with that. What is drawn of the validation split is read first.
    ('train', 1, 2),
    ('train', 3, 5),
    ('train', 4, 7),
    ('validation', 1, 5),
    ('train', 0, None),
  ],
)
def test_what_was_trained_is_saved_when_an_image_cannot_be_decoded(
  setting, undisturbed, tmp_path, spoilt, n, saved
):
  config, data = setting
  config = config.copy_and_resolve_references()
  config.checkpoint.every_minutes = 1e9
  split = Spoilt(getattr(data, spoilt).images, n)
  data = dataclasses.replace(data, **{spoilt: split})
  writer = Stopper()
  with pytest.raises(UserError, match='a.jpg cannot be decoded'):
    train.train_and_evaluate(config, tmp_path, data, writer)
  assert checkpoints.Checkpoints(tmp_path).latest_step() == saved
  # And with a sound image it goes on.
  state = train.train_and_evaluate(config, tmp_path, data, writer)
  jax.tree.map(np.testing.assert_array_equal, state, undisturbed[0])
  assert writer.rows == undisturbed[1]


class StopAt:
  """Asks the loop to stop when it is asked for the n-th time."""

  def __init__(self, n):
    self.left = n

  def __call__(self):
    self.left -= 1
    return not self.left


def test_run_that_is_stopped_over_and_over_ends_in_the_same_bits(
  setting, undisturbed, tmp_path
):
  """At every second place where it can be: between rows, at an epoch's end."""
  config, data = setting
  config = config.copy_and_resolve_references()
  config.checkpoint.every_minutes = 1e9
  config.train.steps_per_dispatch = 1
  writer, stops, state = Stopper(), [], None
  while len(stops) < 30:
    stop = StopAt(2)
    state = train.train_and_evaluate(config, tmp_path, data, writer, stop)
    if stop.left:
      break
    stops.append(int(state.step))
    assert checkpoints.Checkpoints(tmp_path).latest_step() == state.step
  # Between rows, and where a validation was still to be made.
  assert {1, 3, 6, 8} & set(stops) and {5, 10, 15} & set(stops), stops
  jax.tree.map(np.testing.assert_array_equal, state, undisturbed[0])
  assert writer.rows == undisturbed[1]
  # The best two by the losses that were made good, and the last two.
  losses = {r['step']: r['val/loss'] for r in writer.rows if 'val/loss' in r}
  saved = checkpoints.Checkpoints(tmp_path)
  assert saved.best_step() == min(losses, key=losses.get)
  assert set(sorted(losses, key=losses.get)[:2]) <= set(saved.all_steps())
  assert len(saved.all_steps()) <= 4


@pytest.fixture
def diverging(setting, tmp_path):
  """Five good steps, a config whose sixth makes the seventh not finite."""
  config, data = setting
  config = config.copy_and_resolve_references()
  config.train.num_epochs = 1
  train.train_and_evaluate(config, tmp_path, data, progress.NullWriter())
  config.train.num_epochs = 3
  config.optimizer.learning_rate = 1e30
  return config, data


@pytest.mark.parametrize('steps_per_dispatch', [1, 2, 5])
def test_what_is_not_finite_ends_the_run_before_it_is_saved(
  diverging, tmp_path, steps_per_dispatch
):
  config, data = diverging
  config.train.steps_per_dispatch = steps_per_dispatch
  writer = Stopper()
  saved = checkpoints.Checkpoints(tmp_path)
  paths = (tmp_path / 'checkpoints' / '5').rglob('*')
  files = {path: path.read_bytes() for path in paths if path.is_file()}
  with pytest.raises(UserError) as caught:
    train.train_and_evaluate(config, tmp_path, data, writer)
  message = str(caught.value)
  assert message.startswith('diverged at step 7: ') and '\n' not in message
  assert 'loss is' in message or 'grad_norm is' in message
  assert f'The last good checkpoint is {saved.directory}/5.' in message
  assert saved.all_steps() == [4, 5]
  assert files == {p: p.read_bytes() for p in files}
  # Only of what was finite is told; there is no row of step 6 alone.
  assert writer.rows == []


def test_state_that_leads_to_what_is_not_finite_is_named(diverging, tmp_path):
  """Where the run was stopped before the step that would have told."""
  config, data = diverging
  config.train.steps_per_dispatch = 1
  state = train.train_and_evaluate(config, tmp_path, data, Stopper(), StopAt(1))
  assert state.step == 6
  with pytest.raises(UserError) as caught:
    train.train_and_evaluate(config, tmp_path, data, Stopper())
  saved = checkpoints.Checkpoints(tmp_path)
  assert f'The last good checkpoint is {saved.directory}/5.' in str(
    caught.value
  )
  assert f'Delete {saved.directory}/6, which led to this.' in str(caught.value)
  # And then the run does go on.
  shutil.rmtree(saved.directory / '6')
  config.optimizer.learning_rate = 1e-3
  state = train.train_and_evaluate(config, tmp_path, data, Stopper())
  assert state.step == 15


def test_what_is_validated_is_saved_before_the_next_step_is_looked_at(
  setting, tmp_path, monkeypatch
):
  """Other states only after it; the loss of a validation speaks for itself."""
  config, data = setting
  events = []
  save, check = CheckpointWriter.save, training_loop.Loop._check_finite
  monkeypatch.setattr(
    CheckpointWriter,
    'save',
    lambda *args, **kwargs: (
      events.append(('saved', args[1])) or save(*args, **kwargs)
    ),
  )
  monkeypatch.setattr(
    training_loop.Loop,
    '_check_finite',
    lambda loop, step, metrics: (
      events.append(('looked at', step + 1)) or check(loop, step, metrics)
    ),
  )
  config = config.copy_and_resolve_references()
  config.train.steps_per_dispatch = 1
  train.train_and_evaluate(config, tmp_path, data, Stopper())
  assert sorted(events) == sorted(set(events)) and len(events) == 30
  for step in range(1, 15):
    saved = events.index(('saved', step))
    assert (saved < events.index(('looked at', step + 1))) == (step % 5 == 0)


def test_last_update_is_looked_at_too(setting, tmp_path):
  """Its parameters are not finite, and no step comes after it."""
  config, data = setting
  config = config.copy_and_resolve_references()
  config.train.num_epochs = 1
  config.optimizer.learning_rate = 1e-3
  train.train_and_evaluate(config, tmp_path, data, Stopper(), StopAt(2))
  saved = checkpoints.Checkpoints(tmp_path)
  assert saved.all_steps() == [2, 4]
  # Times Adam's direction, which is above 1 for some parameter.
  config.optimizer.learning_rate = float(np.finfo(np.float32).max)
  config.train.on_nonfinite = 'skip'
  with pytest.raises(UserError, match='at step 5: .*parameters .* not finite'):
    train.train_and_evaluate(config, tmp_path, data, Stopper())
  assert saved.all_steps() == [2, 4]


def test_steps_that_are_not_finite_can_be_skipped(
  diverging, tmp_path, monkeypatch, capsys
):
  config, data = diverging
  config.train.on_nonfinite = 'skip'
  writer = Stopper()
  state = train.train_and_evaluate(config, tmp_path, data, writer)
  assert state.step == 15
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  skipped = [
    r['train/skipped_steps']
    for r in writer.rows
    if 'epoch' in r and 'val/loss' not in r
  ]
  # Rows of 2, 2 and 1 steps; step 6 was finite.
  assert skipped == [1, 2, 1, 2, 2, 1]
  assert np.isfinite(writer.rows[0]['train/loss'])
  assert 'train/loss' not in writer.rows[1]
  assert 'step 7 was skipped' in capsys.readouterr().err
  # But not for ever.
  monkeypatch.setattr(training_loop, '_MAX_SKIPPED', 5)
  config.train.num_epochs = 6
  with pytest.raises(
    UserError, match='step 20: .*good checkpoint is .*/5. Delete'
  ):
    train.train_and_evaluate(config, tmp_path, data, Stopper())


def test_steps_of_a_dispatch_go_with_place_and_platform(monkeypatch):
  config = make_small_config('')
  config.train.log_every_steps = 50
  images = np.zeros((1, 256, 256, 3), np.uint8)
  on_host = splits.ArraySplit(images)
  steps = lambda split: training_loop.steps_per_dispatch(split, 64, config)
  assert steps(on_host) == training_loop._STEPS_ON_CPU
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  # 64 images of 197 kB are 12.6 MB.
  assert steps(on_host) == 5
  assert steps(splits.DeviceSplit(on_host)) == 100
  config.train.log_every_steps = 30
  assert steps(splits.DeviceSplit(on_host)) == 90


@pytest.mark.parametrize(
  ('batch_size', 'per_device', 'said'),
  [
    (512, 16, '12% full; 4,096 would fill it'),
    (64, 64, '50% full; 128 would fill it'),
    (192, 192, '75% full; 256 would fill it'),
    (1024, 128, None),
    (256, 256, None),
  ],
)
def test_a_tpu_that_is_not_full_is_noted(
  monkeypatch, batch_size, per_device, said
):
  note = lambda: train._note_on_batch(batch_size, per_device)
  assert note() is None
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  if said is None:
    assert note() is None
  else:
    assert f'={batch_size} is {per_device} images on a chip' in note()
    assert said in note() and '\n' not in note()


def test_a_run_on_a_tpu_begins_with_the_note(
  setting, tmp_path, monkeypatch, capsys
):
  config, data = setting
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  stop = lambda: True
  train.train_and_evaluate(config, tmp_path, data, Stopper(), stop)
  output = capsys.readouterr().out
  # One device, and one line.
  assert output.count('config.train.batch_size=8 is 8 images on a chip') == 1
