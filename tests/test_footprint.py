import jax
import jax.numpy as jnp
import pytest
import training_loop

from configs import article
from configs import celeba
from configs import default
from vae import footprint
from vae import model as models
from vae import optimizers
from vae import training


def small(size, hidden_channels, **settings):
  config = default.get_config()
  config.data.image_size = size
  config.model.hidden_channels = hidden_channels
  config.model.latent_dim = 3
  config.update_from_flattened_dict(settings)
  return config


@pytest.mark.parametrize(
  'config',
  [
    celeba.get_config(),
    article.get_config(),
    small(5, ()),
    small(8, (7,), **{'data.channels': 1}),
    small(16, (4, 8), **{'model.learn_sigma': True}),
    small(16, (8, 4), **{'model.dtype': 'bfloat16'}),
  ],
)
def test_state_is_that_of_a_real_model(config):
  state = training.create_state(
    models.from_config(config), optimizers.Optimizer(), seed=0
  )
  assert footprint.num_parameters(config) == training.num_parameters(state)
  # But for the number of the step, which the optimiser counts twice.
  num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  assert num_bytes - footprint.state_bytes(config) == 3 * 4


def test_steps_take_no_less_than_is_said():
  """And, as XLA has them, not many times as much."""
  config = small(16, (4, 8), **{'objective.num_samples': 2})
  batch = 64
  model, optimizer = models.from_config(config), optimizers.Optimizer()
  state = training.abstract_state(model, optimizer)
  settings = training.settings_from_config(config, model)
  key = jax.random.key(0)
  images = jax.ShapeDtypeStruct((1, batch, *model.image_shape), jnp.uint8)

  def step(state, images):
    return training.train_step(
      model, optimizer, True, False, state, settings, key, images[0]
    )

  def evaluate(state, images):
    return training.eval_loop(
      model, state.variables, settings, key, None, images, 1, 0, batch
    )

  for function, num_bytes in (
    (step, footprint.training_bytes(config, batch)),
    (evaluate, footprint.evaluation_bytes(config, batch)),
  ):
    memory = jax.jit(function).lower(state, images).compile().memory_analysis()
    taken = memory.temp_size_in_bytes + batch * 16 * 16 * 3
    assert num_bytes < taken < 12 * num_bytes


def test_as_many_samples_are_drawn_as_is_said():
  assert footprint.NUM_SAMPLES_DRAWN == training_loop.GRID**2
