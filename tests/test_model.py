import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae.model import VAE

from configs import article
from configs import celeba
from vae import model as models


def count(model):
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, *model.image_shape))
  )
  return sum(a.size for a in jax.tree.leaves(shapes['params']))


def count_by_hand(channels, image_channels, side, latent_dim):
  """Weights and biases of each layer, and BatchNorm's scale and shift."""
  total, inputs = 0, image_channels
  for outputs in channels:
    total += 9 * inputs * outputs + outputs + 2 * outputs
    inputs = outputs
  flat = channels[-1] * (side // 2 ** len(channels)) ** 2
  total += 2 * (flat * latent_dim + latent_dim)
  total += latent_dim * flat + flat
  backwards = channels[::-1]
  for outputs in (*backwards[1:], backwards[-1]):
    total += 9 * inputs * outputs + outputs + 2 * outputs
    inputs = outputs
  return total + 9 * inputs * image_channels + image_channels


def test_default_has_as_many_parameters_as_the_reference():
  assert count(models.from_config(celeba.get_config())) == 3_937_635


def test_article_is_its_listing_layer_by_layer():
  # Inputs and outputs of each convolution, as the article's classes say.
  encoder = [(3, 512), (512, 256), (256, 128), (128, 64), (64, 32)]
  decoder = [(32, 32), (32, 64), (64, 128), (128, 256), (256, 512), (512, 3)]
  flat = 32 * 2 * 2
  config = article.get_config()
  model = models.from_config(config)
  images = jnp.zeros((1, 64, 64, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), images)['params']

  def shapes(layers, kind):
    return [layers[f'{kind}_{i}']['kernel'].shape for i in range(5)]

  assert shapes(params['encoder'], 'Conv') == [(3, 3, *c) for c in encoder]
  assert shapes(params['decoder'], 'ConvTranspose') == [
    (3, 3, *c) for c in decoder[:-1]
  ]
  assert params['decoder']['Conv_0']['kernel'].shape == (3, 3, *decoder[-1])
  for head in ('mean', 'logvar'):
    assert params['encoder'][head]['kernel'].shape == (flat, 128)
  assert params['decoder']['Dense_0']['kernel'].shape == (128, flat)
  assert count(model) == 3_225_795
  assert config.model.activation == 'relu'


@pytest.mark.parametrize(
  ('channels', 'image_channels', 'side', 'latent_dim'),
  [
    ((32, 64, 128, 256, 512), 3, 64, 128),
    ((512, 256, 128, 64, 32), 3, 64, 128),
    ((8, 16), 1, 28, 2),
    ((4, 8, 16), 3, 40, 7),
  ],
)
def test_any_order_and_size_of_channels(
  channels, image_channels, side, latent_dim
):
  model = VAE((side, side, image_channels), latent_dim, channels)
  assert count(model) == count_by_hand(
    channels, image_channels, side, latent_dim
  )
  images = jax.ShapeDtypeStruct((2, side, side, image_channels), jnp.float32)

  def use(key, images):
    variables = model.init(key, images)
    mean, logvar = model.apply(variables, images, method='encode')
    return mean, logvar, model.apply(variables, mean, method='decode')

  mean, logvar, decoded = jax.eval_shape(use, jax.random.key(0), images)
  assert mean.shape == logvar.shape == (2, latent_dim)
  assert decoded.shape == images.shape


def test_sides_that_the_strides_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='multiples of 4, not 16×18'):
    count(VAE((16, 18, 3), 2, (4, 4)))


@pytest.fixture(scope='module', params=['gaussian', 'bernoulli'])
def small(request):
  model = VAE((8, 8, 3), 3, (4,), likelihood=request.param)
  images = np.random.default_rng(0).uniform(size=(5, 8, 8, 3))
  images = images.astype(np.float32)
  return model, model.init(jax.random.key(0), images), images


def test_reconstruct_and_sample_are_encode_and_decode(small):
  model, variables, images = small

  def call(*args, method):
    return model.apply(variables, *args, method=method)

  mean, logvar = call(images, method='encode')
  np.testing.assert_allclose(
    call(images, method='reconstruct'), call(mean, method='decode')
  )
  key = jax.random.key(1)
  z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
  np.testing.assert_allclose(
    call(images, key, method='reconstruct'),
    call(z, method='decode'),
    rtol=1e-5,
    atol=1e-6,
  )
  samples = model.apply(variables, key, 4, method='sample')
  z = jax.random.normal(key, (4, 3))
  np.testing.assert_allclose(samples, call(z, method='decode'))


def test_bernoulli_decodes_to_probabilities():
  model = VAE((8, 8, 3), 3, (4,), likelihood='bernoulli')
  z = 100 * jax.random.normal(jax.random.key(0), (5, 3))
  variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  decoded = model.apply(variables, z, method='decode')
  assert decoded.min() >= 0 and decoded.max() <= 1


def test_bfloat16_keeps_float32_parameters_statistics_and_results():
  images = np.random.default_rng(0).uniform(size=(16, 16, 16, 3))
  images = images.astype(np.float32)
  wide = VAE((16, 16, 3), 4, (8, 16))
  narrow = VAE((16, 16, 3), 4, (8, 16), dtype=jnp.bfloat16)
  variables = wide.init(jax.random.key(0), images)
  for a, b in zip(
    jax.tree.leaves(narrow.init(jax.random.key(0), images)),
    jax.tree.leaves(variables),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  results = [
    model.apply(variables, images, train=True, mutable='batch_stats')
    for model in (wide, narrow)
  ]
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(results))
  np.testing.assert_allclose(*(r[0] for r in results), atol=0.05)


def test_no_convolutions_make_a_linear_model():
  model = VAE((4, 4, 1), 2, ())
  variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
  a, b = np.random.default_rng(0).normal(size=(2, 1, 4, 4, 1))

  def encode(x):
    return np.stack(model.apply(variables, x, method='encode'))

  np.testing.assert_allclose(
    encode(a) + encode(b), encode(a + b) + encode(0 * a), atol=1e-5
  )


def test_learned_sigma_starts_where_the_fixed_one_is():
  images = jnp.full((1, 8, 8, 3), 0.5)
  fixed = VAE((8, 8, 3), 3, (4,), sigma=0.2)
  learned = VAE((8, 8, 3), 3, (4,), sigma=0.2, learn_sigma=True)
  variables = learned.init(jax.random.key(0), images)
  values = [
    model.apply(v, images, images * 0, method='log_prob')
    for model, v in (
      (fixed, fixed.init(jax.random.key(0), images)),
      (learned, variables),
    )
  ]
  np.testing.assert_allclose(*values, rtol=1e-6)
  assert 'log_sigma' in variables['params']
