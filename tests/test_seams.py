"""A new model is one module; each model trains, continues and loads."""

import functools

import numpy as np
import pytest

from runs import schema
from tests.conftest import make_data, make_small_config, Rows
import train
import vae
from vae import models, objectives, registry
from vae.errors import UserError

MODEL = """
from flax import linen as nn

from vae import distributions, models


class Model(models.VAE):
  size: int = 5

  @property
  def latent_shape(self):
    return (self.size,)

  def setup(self):
    super().setup()
    self.mean, self.logvar = nn.Dense(self.size), nn.Dense(self.size)
    self.image = nn.Dense(28 * 28)
    # Brightness is learned in a collection of its own.
    self.level = self.variable('brightness', 'level', lambda: 0.5)

  def encode(self, images, train=False):
    x = images.reshape(len(images), -1)
    if train:
      self.level.value = 0.9 * self.level.value + 0.1 * x.mean()
    return distributions.Normal(self.mean(x), self.logvar(x))

  def decoder(self, z, train):
    return nn.sigmoid(self.image(z)) + self.level.value - 0.5
"""


@pytest.mark.parametrize(
  ('name', 'settings'),
  [
    ('my_model', {'size': 4}),
    pytest.param(
      'fsq', {'levels': (5, 4), 'channels': (4, 8)}, marks=pytest.mark.slow
    ),
    pytest.param(
      'residual',
      {'latent_dim': 2, 'channels': (4, 8), 'spatial': True},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_models_train_continue_load_and_sample(
  name, settings, tmp_path, monkeypatch
):
  (tmp_path / 'my_model.py').write_text(MODEL)
  monkeypatch.syspath_prepend(tmp_path)
  config = make_small_config('')
  config.data.image_size, config.data.channels = 28, 1
  config.train.num_epochs = 2
  config.optimizer.learning_rate = 0.003
  with config.unlocked():
    config.model = {'name': name, **settings}
  schema.validate(config)

  data, writer = make_data((28, 28, 1)), Rows()
  stops, workdir = iter([False, True]), tmp_path / 'run'
  state = train.train_and_evaluate(
    config, workdir, data, writer, lambda: next(stops)
  )
  assert state.step == 4
  state = train.train_and_evaluate(config, workdir, data, writer)
  assert state.step == 10
  losses = [row['val/loss'] for row in writer.rows if 'val/loss' in row]
  assert losses[-1] < writer.rows[0]['train/loss']

  model = vae.load(workdir)
  images = data.test.images
  for found, count in (
    (model.sample(3), 3),
    (model.reconstruct(images), 5),
    (model.reconstruct(images, seed=1), 5),
  ):
    assert found.shape == (count, 28, 28, 1)
    assert np.all((found >= 0) & (found <= 1))
  if name == 'my_model':  # Its collection was trained and saved.
    assert model.variables['brightness']['level'] not in (0, 0.5)


@pytest.mark.parametrize(
  ('find', 'names'),
  [
    (models.find, 'conv, fsq, mlp, residual, vq'),
    (
      objectives.find,
      'capacity, cyclical, dip, elbo, factor, free_bits, iwae, mmd, '
      'prior_only, rae, total_correlation, vq',
    ),
    (
      functools.partial(registry.find, 'data', attribute='find'),
      'cartoon_faces, celeba, folder, tfds',
    ),
  ],
)
def test_unknown_name_lists_the_names(find, names, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=f"has no 'nowhere'; it has {names}, and"):
    find('nowhere')
  (tmp_path / 'empty_module.py').write_text('')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match='empty_module.py has no '):
    find('empty_module')
