import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae import checkpoints
from vae import devices
from vae import training
from vae.errors import UserError

# Where one array cannot be read, Orbax closes the event loop that reads of
# others still report to, from threads of their own.
pytestmark = pytest.mark.filterwarnings(
  'ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning'
)


def state_at(step, size=3):
  params = {'w': jnp.full((size,), float(step))}
  return devices.replicate(
    training.TrainState(jnp.int32(step), params, {}, (jnp.zeros(size),))
  )


def save_all(workdir, losses, keep_best=2):
  """Saves a state for each step; a loss of None is a checkpoint without."""
  with checkpoints.Checkpoints(workdir, keep_best) as saved:
    for step, loss in losses.items():
      metrics = None if loss is None else {'val/loss': loss, 'val/kl': 1.0}
      saved.save(step, state_at(step), metrics)


@pytest.mark.parametrize(
  ('losses', 'kept'),
  [
    ({1: 5.0, 2: 3.0, 3: 4.0, 4: 9.0}, [2, 3, 4]),
    ({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, [1, 2, 4]),
    ({1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}, [3, 4]),
    ({1: 1.0, 2: None, 3: 2.0, 4: None, 5: None}, [1, 3, 5]),
    ({1: 3.0, 2: math.nan, 3: 1.0, 4: math.nan, 5: math.inf}, [1, 3, 5]),
  ],
)
def test_keeps_the_two_best_and_the_last(tmp_path, losses, kept):
  save_all(tmp_path, losses)
  with checkpoints.Checkpoints(tmp_path) as saved:
    assert saved.all_steps() == kept
    assert saved.latest_step() == max(losses)
    scored = {s: loss for s, loss in losses.items() if loss and loss < math.inf}
    assert saved.best_step() == min(scored, key=scored.get)


def test_what_was_saved_comes_back_on_the_same_devices(tmp_path):
  save_all(tmp_path, {1: 2.0, 2: 1.0})
  with checkpoints.Checkpoints(tmp_path) as saved:
    for step, restored in (
      (2, saved.restore(state_at(0))),
      (1, saved.restore(state_at(0), step=1)),
    ):
      expected = state_at(step)
      jax.tree.map(np.testing.assert_array_equal, restored, expected)
      assert restored.step.sharding == expected.step.sharding


def test_nothing_saved_is_a_clear_error(tmp_path):
  with checkpoints.Checkpoints(tmp_path) as saved:
    assert saved.latest_step() is None
    with pytest.raises(UserError, match='no complete checkpoint'):
      saved.restore(state_at(0))


def test_other_shapes_are_a_clear_error(tmp_path):
  save_all(tmp_path, {1: 2.0})
  with checkpoints.Checkpoints(tmp_path) as saved:
    with pytest.raises(UserError, match='checkpoints/1 cannot be restored'):
      saved.restore(state_at(0, size=4))


def test_reading_changes_nothing_and_waits_for_nothing(tmp_path):
  save_all(tmp_path, {1: 2.0, 2: 3.0})
  # As a run leaves it that is writing just now.
  unfinished = tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp'
  unfinished.mkdir()
  before = sorted(tmp_path.rglob('*'))
  with checkpoints.open_to_read(tmp_path) as saved:
    assert saved.find('best') == 1
    assert saved.find('last') == saved.find(2) == saved.find('2') == 2
    assert saved.restore(state_at(0), 1).step == 1
  assert sorted(tmp_path.rglob('*')) == before


def test_a_checkpoint_that_is_not_there_is_a_clear_error(tmp_path):
  with pytest.raises(UserError, match='no complete checkpoint'):
    checkpoints.open_to_read(tmp_path)
  assert not list(tmp_path.iterdir())
  save_all(tmp_path, {1: 2.0, 2: 3.0})
  with checkpoints.open_to_read(tmp_path) as saved:
    for name in (3, '3', 'first'):
      with pytest.raises(UserError, match=f'no checkpoint {name}; .* 1, 2'):
        saved.find(name)


def test_without_validation_the_best_is_the_last(tmp_path):
  save_all(tmp_path, {5: None})
  with checkpoints.open_to_read(tmp_path) as saved:
    assert saved.find('best') == 5


def damage(path, how):
  content = path.read_bytes()
  if how == 'gone':
    path.unlink()
  elif how == 'half':
    path.write_bytes(content[: len(content) // 2])
  else:
    path.write_bytes(b'')


@pytest.mark.parametrize('how', ['gone', 'half', 'empty'])
@pytest.mark.parametrize('what', ['_METADATA', 'manifest.ocdbt', 'd/*'])
def test_damaged_checkpoint_is_a_clear_error(tmp_path, what, how):
  save_all(tmp_path, {1: 1.0, 2: 2.0})
  for path in (tmp_path / 'checkpoints/1/default').glob(what):
    damage(path, how)
  with checkpoints.open_to_read(tmp_path) as saved:
    with pytest.raises(UserError, match='1 cannot be restored.*Others: 2') as e:
      saved.restore(state_at(0), 1)
    assert '\n' not in str(e.value)
    assert saved.restore(state_at(0), 2).step == 2


@pytest.mark.parametrize('how', ['half', 'empty'])
def test_damaged_metrics_are_a_clear_error(tmp_path, how):
  save_all(tmp_path, {1: 1.0})
  damage(tmp_path / 'checkpoints/1/metrics/metrics', how)
  with pytest.raises(UserError, match='metrics of a checkpoint are damaged'):
    checkpoints.open_to_read(tmp_path)
