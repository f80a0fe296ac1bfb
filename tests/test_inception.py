"""The network against Keras' Inception v3, changed to be the same."""

from flax import traverse_util
import jax
import numpy as np
import pytest
import tensorflow as tf

from evaluation import inception

# The graph's convolutions in the order in which Keras makes its own.
BLOCK_A = (
  'conv tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 '
  'tower_2/conv'
)
BLOCK_B = 'conv tower/conv tower/conv_1 tower/conv_2'
BLOCK_C = (
  'conv tower/conv tower/conv_1 tower/conv_2 tower_1/conv tower_1/conv_1 '
  'tower_1/conv_2 tower_1/conv_3 tower_1/conv_4 tower_2/conv'
)
BLOCK_D = (
  'tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 '
  'tower_1/conv_3'
)
BLOCK_E = (
  'conv tower/conv tower/mixed/conv tower/mixed/conv_1 tower_1/conv '
  'tower_1/conv_1 tower_1/mixed/conv tower_1/mixed/conv_1 tower_2/conv'
)
BLOCKS = {
  'mixed': BLOCK_A,
  'mixed_1': BLOCK_A,
  'mixed_2': BLOCK_A,
  'mixed_3': BLOCK_B,
  'mixed_4': BLOCK_C,
  'mixed_5': BLOCK_C,
  'mixed_6': BLOCK_C,
  'mixed_7': BLOCK_C,
  'mixed_8': BLOCK_D,
  'mixed_9': BLOCK_E,
  'mixed_10': BLOCK_E,
}
CONVS = ['conv', 'conv_1', 'conv_2', 'conv_3', 'conv_4'] + [
  f'{block}/{conv}' for block in BLOCKS for conv in BLOCKS[block].split()
]


@pytest.fixture(scope='module')
def keras_network():
  """Keras' network, with the last block's pooling and BatchNorm's scale."""
  layers = tf.keras.layers
  original = tf.keras.applications.InceptionV3(
    weights=None, include_top=False, pooling='avg', input_shape=(299, 299, 3)
  )
  poolings = [
    layer.name
    for layer in original.layers
    if isinstance(layer, layers.AveragePooling2D)
  ]
  assert len(poolings) == 9

  def change(layer):
    if layer.name == poolings[-1]:
      return layers.MaxPooling2D((3, 3), strides=(1, 1), padding='same')
    settings = layer.get_config()
    if isinstance(layer, layers.BatchNormalization):
      settings['scale'] = True
    return type(layer).from_config(settings)

  return tf.keras.models.clone_model(original, clone_function=change)


def layers_as_made(model, kind):
  """Its layers of one kind; their names end in numbers that count them."""

  def number(layer):
    suffix = layer.name.rpartition('_')[2]
    return int(suffix) if suffix.isdigit() else 0

  return sorted((x for x in model.layers if isinstance(x, kind)), key=number)


@pytest.fixture(scope='module')
def variables(keras_network):
  """Random weights and moments, put into Keras' network as well."""
  rng = np.random.default_rng(0)
  parameters = {}
  convs = layers_as_made(keras_network, tf.keras.layers.Conv2D)
  norms = layers_as_made(keras_network, tf.keras.layers.BatchNormalization)
  for name, conv, norm in zip(CONVS, convs, norms, strict=True):
    shape = conv.kernel.shape
    scale = np.sqrt(2 / np.prod(shape[:-1]))
    values = {
      'conv2d_params': rng.normal(0, scale, shape),
      'batchnorm/gamma': rng.uniform(0.5, 1.5, shape[-1]),
      'batchnorm/beta': rng.normal(0, 0.3, shape[-1]),
      'batchnorm/moving_mean': rng.normal(0, 0.3, shape[-1]),
      'batchnorm/moving_variance': rng.uniform(0.3, 1.5, shape[-1]),
    }
    values = {key: a.astype(np.float32) for key, a in values.items()}
    conv.set_weights([values['conv2d_params']])
    norm.set_weights(
      [
        values[f'batchnorm/{key}']
        for key in ('gamma', 'beta', 'moving_mean', 'moving_variance')
      ]
    )
    parameters |= {f'{name}/{key}': a for key, a in values.items()}
  return {'params': traverse_util.unflatten_dict(parameters, sep='/')}


def random_images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, shape).astype(np.uint8)


def tensorflow_preprocess(images):
  resized = tf.compat.v1.image.resize_bilinear(
    tf.constant(images, tf.float32),
    (299, 299),
    align_corners=False,
    half_pixel_centers=False,
  )
  return (resized.numpy() - 128) / 128


def test_parameters_are_the_graphs(variables):
  shapes = jax.eval_shape(
    inception.Inception().init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32),
  )
  flat = traverse_util.flatten_dict(shapes['params'], sep='/')
  expected = traverse_util.flatten_dict(variables['params'], sep='/')
  assert {k: a.shape for k, a in flat.items()} == {
    k: a.shape for k, a in expected.items()
  }


def test_features_are_those_of_keras(keras_network, variables):
  images = random_images(2, 64, 50, 3)
  images[1] //= 3  # So that the two are not alike in everything.
  actual = jax.jit(inception.features)(variables, images)
  expected = keras_network(tensorflow_preprocess(images)).numpy()
  assert actual.shape == (2, 2048) and actual.dtype == np.float32
  # Relative to the features' spread, not to each: some are all but zero.
  assert expected.std() > 1e-3
  assert np.abs(actual - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize(
  'side', [(64, 64), (28, 50), (299, 299), (218, 178), (512, 301), (1, 1)]
)
def test_preprocessing_is_tensorflows(side):
  images = random_images(2, *side, 3)
  actual = inception.preprocess(images)
  assert actual.dtype == np.float32
  np.testing.assert_allclose(actual, tensorflow_preprocess(images), atol=1e-6)


def test_range_of_preprocessed_images():
  images = np.array([0, 128, 255], np.uint8).reshape(3, 1, 1, 1)
  actual = inception.preprocess(images)
  expected = [-1, 0, 127 / 128]
  np.testing.assert_array_equal(actual[:, 0, 0, 0], expected)


def test_grey_images_have_three_equal_channels():
  grey = random_images(2, 20, 30, 1)
  actual = inception.preprocess(grey)
  assert actual.shape == (2, 299, 299, 3)
  np.testing.assert_array_equal(
    actual, inception.preprocess(np.repeat(grey, 3, axis=-1))
  )


def test_wide_types_change_nothing():
  # Under JAX_ENABLE_X64 too the network is float32.
  images = random_images(1, 20, 20, 3)
  with jax.enable_x64(True):
    assert inception.preprocess(images).dtype == np.float32
