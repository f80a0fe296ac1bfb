"""The Inception network whose features FID and KID compare.

FID is defined (Heusel et al. 2017) by one frozen graph, TensorFlow's Inception
v3 of 2015-12-05; another Inception, or another way to resize, gives numbers
that cannot be compared. This is that graph up to `pool_3`. It differs from the
network of the article (Szegedy et al. 2016) in its last block, which pools by
the maximum, and from PyTorch's in its average pooling, which does not count
the padding.

Modules and parameters are called as the graph's nodes are, so that the
parameter `mixed_1/tower/conv/batchnorm/beta` is the node of that name.
"""

from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

_SIDE = 299  # Of the images that the network was trained with.
_EPSILON = 1e-3


def features(variables: dict[str, Any], images: jax.Array) -> jax.Array:
  """The network's features of images; a pure function, not compiled.

  Args:
    variables: of `Inception`.
    images: uint8 [batch, height, width, 1 or 3].

  Returns:
    float32 [batch, 2048].
  """
  return Inception().apply(variables, preprocess(images))


def preprocess(images: jax.Array) -> jax.Array:
  """Images as the graph prepares them: resized, in [-1, 1), with 3 channels.

  Args:
    images: uint8 [batch, height, width, 1 or 3].

  Returns:
    float32 [batch, 299, 299, 3].
  """
  images = images.astype(jnp.float32)
  images = _resize(_resize(images, axis=2), axis=1)
  images = (images - 128) / 128
  return jnp.broadcast_to(images, (*images.shape[:3], 3))


def _resize(images: jax.Array, axis: int) -> jax.Array:
  """Makes one side 299 by linear interpolation, as TensorFlow 1 did.

  Output i is read at input i·side/299: the corners are not aligned, nor are
  the pixels' centres, and nothing is smoothed when the image shrinks
  (`tf.compat.v1.image.resize_bilinear` as it is by default).
  """
  side = images.shape[axis]
  # In float32, as TensorFlow computes the positions.
  positions = np.arange(_SIDE, dtype=np.float32) * np.float32(side / _SIDE)
  before = np.minimum(np.floor(positions).astype(np.int32), side - 1)
  after = np.minimum(before + 1, side - 1)
  weights = (positions - before).astype(np.float32)
  weights = weights.reshape(-1, *(1,) * (images.ndim - axis - 1))
  start = jnp.take(images, before, axis)
  return start + (jnp.take(images, after, axis) - start) * weights


# A layer is a convolution, as the arguments of `Conv`; the name of a pooling;
# or a block.

_HALVE = (2, 'VALID')

_STEM = (
  (32, 3, 3, *_HALVE),
  (32, 3, 3, 1, 'VALID'),
  (64, 3, 3),
  'max_halving',
  (80, 1, 1),
  (192, 3, 3, 1, 'VALID'),
  'max_halving',
)

# A block is its branches in the order in which they are joined, each a name and
# its layers.


def _block_a(pool_features: int) -> tuple:
  return (
    ('conv', (64, 1, 1)),
    ('tower', (48, 1, 1), (64, 5, 5)),
    ('tower_1', (64, 1, 1), (96, 3, 3), (96, 3, 3)),
    ('tower_2', 'average', (pool_features, 1, 1)),
  )


_BLOCK_B = (
  ('conv', (384, 3, 3, *_HALVE)),
  ('tower', (64, 1, 1), (96, 3, 3), (96, 3, 3, *_HALVE)),
  ('pool', 'max_halving'),
)


def _block_c(n: int) -> tuple:
  return (
    ('conv', (192, 1, 1)),
    ('tower', (n, 1, 1), (n, 1, 7), (192, 7, 1)),
    ('tower_1', (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)),
    ('tower_2', 'average', (192, 1, 1)),
  )


_BLOCK_D = (
  ('tower', (192, 1, 1), (320, 3, 3, *_HALVE)),
  ('tower_1', (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, *_HALVE)),
  ('pool', 'max_halving'),
)


def _block_e(pool: str) -> tuple:
  fork = (('conv', (384, 1, 3)), ('conv_1', (384, 3, 1)))
  return (
    ('conv', (320, 1, 1)),
    ('tower', (384, 1, 1), fork),
    ('tower_1', (448, 1, 1), (384, 3, 3), fork),
    ('tower_2', pool, (192, 1, 1)),
  )


_BLOCKS = (
  ('mixed', _block_a(32)),  # [35, 35, 256]
  ('mixed_1', _block_a(64)),  # [35, 35, 288]
  ('mixed_2', _block_a(64)),
  ('mixed_3', _BLOCK_B),  # [17, 17, 768]
  ('mixed_4', _block_c(128)),
  ('mixed_5', _block_c(160)),
  ('mixed_6', _block_c(160)),
  ('mixed_7', _block_c(192)),
  ('mixed_8', _BLOCK_D),  # [8, 8, 1280]
  ('mixed_9', _block_e('average')),  # [8, 8, 2048]
  ('mixed_10', _block_e('max')),
)


class Inception(nn.Module):
  """Prepared images [batch, 299, 299, 3] to features [batch, 2048]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _apply_layers(_STEM, x)
    for name, branches in _BLOCKS:
      x = Mixed(branches, name=name)(x)
    return jnp.mean(x, axis=(1, 2))


class Mixed(nn.Module):
  """A block: branches beside each other, joined along the channels."""

  branches: tuple

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    outputs = []
    for name, *layers in self.branches:
      if name.startswith('tower'):
        outputs.append(Tower(tuple(layers), name=name)(x))
      elif name == 'pool':
        outputs.append(_pool(layers[0], x))
      else:
        outputs.append(Conv(*layers[0], name=name)(x))
    return jnp.concatenate(outputs, axis=-1)


class Tower(nn.Module):
  """A branch of several layers."""

  layers: tuple

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return _apply_layers(self.layers, x)


def _apply_layers(layers: tuple, x: jax.Array) -> jax.Array:
  """Layers one after the other, named conv, conv_1, … in the calling module."""
  num_convs = 0
  for layer in layers:
    if isinstance(layer, str):
      x = _pool(layer, x)
    elif isinstance(layer[0], tuple):
      x = Mixed(layer, name='mixed')(x)  # Only ever a tower's last layer.
    else:
      name = f'conv_{num_convs}' if num_convs else 'conv'
      x = Conv(*layer, name=name)(x)
      num_convs += 1
  return x


def _pool(kind: str, x: jax.Array) -> jax.Array:
  if kind == 'average':
    return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)
  if kind == 'max':
    return nn.max_pool(x, (3, 3), padding='SAME')
  return nn.max_pool(x, (3, 3), (2, 2), padding='VALID')


class Conv(nn.Module):
  """A convolution without bias, BatchNorm and relu.

  Attributes:
    features: number of output channels.
    height: of the kernel.
    width: of the kernel.
    stride: in both directions.
    padding: SAME or VALID.
  """

  features: int
  height: int
  width: int
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param(
      'conv2d_params',
      nn.initializers.he_normal(),
      (self.height, self.width, x.shape[-1], self.features),
    )
    x = lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      self.padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      # Else GPUs and TPUs round the factors to fewer bits than float32's.
      precision=lax.Precision.HIGHEST,
    )
    return nn.relu(BatchNorm(name='batchnorm')(x))


class BatchNorm(nn.Module):
  """Normalisation by given moments, which are parameters like the others."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = x.shape[-1:]
    beta = self.param('beta', nn.initializers.zeros, shape)
    gamma = self.param('gamma', nn.initializers.ones, shape)
    mean = self.param('moving_mean', nn.initializers.zeros, shape)
    variance = self.param('moving_variance', nn.initializers.ones, shape)
    return (x - mean) * (gamma * lax.rsqrt(variance + _EPSILON)) + beta
