"""Models: sizes by hand, the article's listing, and what each promises."""

import functools

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import article, celeba
from vae import layers, models
from vae.models import conv, fsq, mlp, residual, vq


def init(model):
  images = jnp.zeros((1, *model.image_shape))
  return jax.jit(model.init)(jax.random.key(0), images)


def shapes_of(model):
  return jax.eval_shape(lambda: init(model))['params']


def count(model):
  return sum(a.size for a in jax.tree.leaves(shapes_of(model)))


def random_images(*shape):
  return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def test_default_has_as_many_parameters_as_the_reference():
  assert count(models.from_config(celeba.get_config())) == 3_937_635


def test_article_is_its_listing_layer_by_layer():
  # Inputs and outputs of each convolution, as in the article's classes.
  encoder = [(3, 512), (512, 256), (256, 128), (128, 64), (64, 32)]
  decoder = [(32, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
  flat = 32 * 2 * 2
  expected = {
    **{f'encoder/Conv_{i}': (3, 3, *c) for i, c in enumerate(encoder)},
    'encoder/mean': (flat, 128),
    'encoder/logvar': (flat, 128),
    'decoder/Dense_0': (128, flat),
    **{f'decoder/ConvTranspose_{i}': (3, 3, *c) for i, c in enumerate(decoder)},
    'decoder/Conv_0': (3, 3, 512, 3),
  }
  config = article.get_config()
  model = models.from_config(config)
  params = traverse_util.flatten_dict(shapes_of(model), sep='/')
  kernels = {k: v.shape for k, v in params.items() if k.endswith('kernel')}
  assert kernels == {f'{k}/kernel': shape for k, shape in expected.items()}
  assert count(model) == 3_225_795
  assert config.model.activation == 'relu'


def test_mlp_is_its_matrix_products():
  images = random_images(4, 3, 3, 1)
  sizes = {'latent_dim': 2, 'hidden_sizes': (6, 5)}
  model = mlp.Model((3, 3, 1), **sizes, activation='silu')
  variables = init(model)
  params = jax.device_get(variables['params'])

  def silu(x):
    return x / (1 + np.exp(-x))

  def network(x, layers, head):
    for name in ('Dense_0', 'Dense_1'):
      x = silu(x @ layers[name]['kernel'] + layers[name]['bias'])
    return x @ layers[head]['kernel'] + layers[head]['bias']

  posterior = model.apply(variables, images, method='encode')
  for head in ('mean', 'logvar'):
    expected = network(images.reshape(4, 9), params['encoder'], head)
    np.testing.assert_allclose(getattr(posterior, head), expected, atol=1e-5)
  decoded = network(np.asarray(posterior.mean), params['decoder'], 'image')
  found = model.apply(variables, images).mean
  np.testing.assert_allclose(found, decoded.reshape(images.shape), atol=1e-5)


SMALL_28 = {
  'conv': conv.Model((28, 28, 1), latent_dim=3, hidden_channels=(4, 8)),
  'mlp': mlp.Model((28, 28, 1), latent_dim=3, hidden_sizes=(8,)),
  'residual': residual.Model((28, 28, 1), latent_dim=3, channels=(4, 8)),
  'spatial': residual.Model(
    (28, 28, 1), latent_dim=3, channels=(4, 8), num_blocks=2, spatial=True
  ),
  'fsq': fsq.Model((28, 28, 1), levels=(5, 4), channels=(4, 8)),
}


@pytest.mark.parametrize(
  'name',
  [
    *('conv', 'mlp', 'residual'),
    pytest.param('spatial', marks=pytest.mark.slow),
    pytest.param('fsq', marks=pytest.mark.slow),
  ],
)
def test_shapes_and_gradients_reach_from_end_to_end(name):
  model, images = SMALL_28[name], random_images(5, 28, 28, 1)
  variables = init(model)
  latent_shape = {'spatial': (7, 7, 3), 'fsq': (7, 7, 2)}.get(name, (3,))

  def use(variables):
    bound = model.bind(variables)
    posterior, prior = bound.encode(images), bound.prior()
    z = posterior.sample(jax.random.split(jax.random.key(1), 5), 2)
    likelihood = bound.decode(z)
    return z, prior.mean, likelihood.mean, likelihood.log_prob(images)

  shapes = [a.shape for a in jax.eval_shape(use, variables)]
  assert shapes == [
    (2, 5, *latent_shape),
    latent_shape,
    (2, *images.shape),
    (2, 5),
  ]
  grads = jax.jit(
    jax.grad(lambda params: use(variables | {'params': params})[-1].sum())
  )(variables['params'])
  for path, grad in jax.tree.leaves_with_path(grads):
    assert np.any(np.asarray(grad) != 0), jax.tree_util.keystr(path)


def test_residual_block_is_the_identity_if_its_last_convolution_is_zero():
  block, x = residual.Block(jnp.float32), random_images(2, 6, 6, 4)
  params = jax.device_get(block.init(jax.random.key(0), x))['params']
  assert np.any(np.asarray(block.apply({'params': params}, x)) != x)
  params['Conv_1'] = jax.tree.map(np.zeros_like, params['Conv_1'])
  np.testing.assert_array_equal(block.apply({'params': params}, x), x)


@pytest.mark.parametrize(
  ('model', 'match'),
  [
    (
      conv.Model((16, 18, 3), hidden_channels=(4, 4)),
      'multiples of 4, not 16×',
    ),
    (residual.Model((28, 28, 1)), '28×28, must be multiples of 8'),
    (fsq.Model((8, 8, 1), levels=(5, 1)), r'levels is \(5, 1\); .* at least 2'),
    (mlp.Model((8, 8, 1), sigma=0.0), 'sigma is 0; it must be from'),
    (mlp.Model((8, 8, 1), sigma=1e7), r'sigma is 1e\+07; it must be'),
    (
      mlp.Model((8, 8, 1), 'bernoulli', learn_sigma=True),
      'only gaussian',
    ),
  ],
)
def test_settings_that_cannot_be_are_refused(model, match):
  with pytest.raises(ValueError, match=match):
    count(model)


@pytest.mark.parametrize('name', ['conv', 'residual'])
def test_bfloat16_keeps_float32_parameters_statistics_and_results(name):
  images = random_images(16, 28, 28, 1)
  wide = SMALL_28[name]
  narrow = wide.clone(dtype='bfloat16')
  variables = init(wide)
  jax.tree.map(np.testing.assert_array_equal, init(narrow), variables)

  def run(model):
    apply = nn.apply(
      lambda m: m(images, train=True).mean, model, mutable='batch_stats'
    )
    return jax.jit(apply)(variables)

  results = [run(model) for model in (wide, narrow)]
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(results))
  np.testing.assert_allclose(*(r[0] for r in results), atol=0.05)


@pytest.mark.parametrize(
  'model',
  [
    conv.Model((4, 4, 1), latent_dim=2, hidden_channels=()),
    mlp.Model((4, 4, 1), latent_dim=2, hidden_sizes=()),
  ],
)
def test_no_hidden_layers_make_a_linear_model(model):
  variables = init(model)
  a, b = np.random.default_rng(0).normal(size=(2, 1, 4, 4, 1))

  def encode(x):
    posterior = model.apply(variables, x, method='encode')
    return np.stack([posterior.mean, posterior.logvar])

  np.testing.assert_allclose(
    encode(a) + encode(b), encode(a + b) + encode(0 * a), atol=1e-5
  )


def make_vq(**settings):
  model = vq.Model(
    (8, 8, 1), num_codes=5, code_dim=2, channels=(4, 8), **settings
  )
  images = np.random.default_rng(0).uniform(size=(6, 8, 8, 1)).astype('f')
  return model, jax.jit(model.init)(jax.random.key(0), images), images


@pytest.mark.slow
def test_table_follows_the_moving_averages_of_what_it_stands_for():
  model, variables, images = make_vq()
  posterior, changed = model.apply(
    variables, images, True, method='encode', mutable=['table']
  )
  encoded = np.asarray(posterior.encoded).reshape(-1, 2)
  before = variables['table']['averages']
  table = before['sums'] / before['uses'][:, None]
  distances = np.square(encoded[:, None] - table).sum(axis=-1)
  chosen = distances.argmin(axis=1)
  np.testing.assert_allclose(
    posterior.mean.reshape(-1, 2), table[chosen], atol=1e-6
  )
  counts = np.bincount(chosen, minlength=5)
  sums = np.stack([encoded[chosen == code].sum(axis=0) for code in range(5)])
  after = changed['table']['averages']
  np.testing.assert_allclose(
    after['uses'], 0.99 * before['uses'] + 0.01 * counts, rtol=1e-5
  )
  np.testing.assert_allclose(
    after['sums'], 0.99 * before['sums'] + 0.01 * sums, atol=1e-6
  )


def test_code_without_use_starts_again_at_the_farthest_position():
  model, variables, images = make_vq()
  averages = variables['table']['averages']
  uses = averages['uses'].at[3].set(1e-6)
  # Far from all, so that nothing chooses it.
  sums = (averages['sums'] * 0.1).at[3].set(1e-6 * 50.0)
  variables = variables | {'table': {'averages': {'sums': sums, 'uses': uses}}}
  posterior, changed = model.apply(
    variables, images, True, method='encode', mutable=['table']
  )
  encoded = np.asarray(posterior.encoded).reshape(-1, 2)
  codes = np.asarray(posterior.code).reshape(-1, 2)
  farthest = encoded[np.square(encoded - codes).sum(axis=1).argmax()]
  after = changed['table']['averages']
  restarted = after['sums'][3] / after['uses'][3]
  np.testing.assert_allclose(restarted, farthest, rtol=1e-5)
  assert after['uses'][3] > 0.1


@pytest.mark.slow
def test_gradient_passes_the_choice_of_a_code_as_if_it_were_not_there():
  model, variables, images = make_vq(table='gradient')

  def derivative(name):
    def output(x):
      return getattr(model.apply(variables, x, method='encode'), name)

    encoded, pull_back = jax.vjp(output, images)
    return pull_back(jnp.ones_like(encoded))[0]

  np.testing.assert_array_equal(derivative('mean'), derivative('encoded'))
  assert np.abs(derivative('mean')).max() > 0


@pytest.mark.slow
def test_decoder_of_spectral_norm_one_is_that_of_smaller_kernels():
  plain = conv.Model((8, 8, 3), latent_dim=2, hidden_channels=(4, 4))
  model = plain.clone(spectral_norm=True)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  own = jax.tree.map(jnp.copy, dict(variables))
  own['params']['decoder'] = layers.spectrally_normalised(
    own['params']['decoder']
  )
  z = jax.random.normal(jax.random.key(1), (5, 2))

  def decode(model, variables):
    likelihood, updates = model.apply(
      variables, z, True, method='decode', mutable='batch_stats'
    )
    return likelihood.mean, updates

  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, decode(model, variables), decode(plain, own))
