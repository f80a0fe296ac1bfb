"""A member of a population is the run that it would be by itself.

test_devices.py has members on devices of their own.
"""

from etils import epath
import jax
import numpy as np
import pytest

from tests.conftest import make_data, Rows
from tests.test_devices import make_config
import train
import vae
from vae import loading, numerics
from vae.population import Population
from vae.trainer import Trainer


@pytest.fixture
def data():
  return make_data((8, 8, 3))


def run_epoch(trainer):
  """The losses of an epoch, and the variables after it."""
  (chunk,) = trainer.train_chunks(0, 0)
  losses = trainer.by_run(trainer.train(chunk))['loss']
  (state,) = jax.device_get(trainer.states(trainer.snapshot()))
  return losses, state.variables


@pytest.mark.parametrize(
  ('objective', 'model'),
  [
    ('elbo', 'mlp'),
    pytest.param('free_bits', 'conv', marks=pytest.mark.slow),
    pytest.param('elbo', 'residual', marks=pytest.mark.slow),
  ],
)
def test_padding_of_the_latent_dimension_changes_nothing(
  data, objective, model
):
  config = make_config(objective, model)
  config.train.steps_per_dispatch = 5
  with numerics.fixed('float64'):
    padded = Population([config], data, latent_dim=5)
    shapes = jax.tree.map(np.shape, padded.snapshot().params)
    assert shapes['encoder']['mean']['kernel'][-1] == 5
    results = [
      run_epoch(trainer) for trainer in (padded, Trainer(config, data))
    ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
    *results,
  )


def test_padded_model_is_the_same_model(trained_run):
  model = vae.load(trained_run)
  padded = loading.pad_trained(model, 4)
  images = make_data().test.images
  z = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
  np.testing.assert_allclose(
    padded.decode(z), model.decode(z[:, :2]), atol=1e-5
  )
  posterior, narrow = padded.encode(images), model.encode(images)
  for name in ('mean', 'logvar'):
    wide = getattr(posterior, name)
    np.testing.assert_allclose(
      wide[:, :2], getattr(narrow, name), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(wide[:, 2:], 0)


@pytest.mark.slow
def test_member_continues_as_a_single_run(data, tmp_path):
  config = make_config(model='mlp')
  config.model.dtype = 'float32'
  member = train.Run(config, epath.Path(tmp_path / 'member'), Rows())
  train.train_population([member], data, latent_dim=4)
  alone = Rows()
  train.train_and_evaluate(config, tmp_path / 'alone', data, alone)
  # Up to rounding that Adam blows up.
  for mine, other in zip(member.writer.rows, alone.rows, strict=True):
    assert mine == pytest.approx(other, rel=0.02)
  assert member.writer.rows[0] == pytest.approx(alone.rows[0], rel=1e-4)
  assert vae.load(member.workdir).latent_shape == (3,)
  config.train.num_epochs = 4
  more = train.train_and_evaluate(config, member.workdir, data, Rows())
  assert more.step == 20
