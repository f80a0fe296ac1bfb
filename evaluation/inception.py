"""The Inception network whose features FID and KID compare, and its weights.

FID is defined (Heusel et al. 2017) by one frozen graph, TensorFlow's Inception
v3 of 2015-12-05; another Inception, or another way to resize, gives numbers
that cannot be compared. This is that graph up to `pool_3`. It differs from the
network of the article (Szegedy et al. 2016) in its last block, which pools by
the maximum, and from PyTorch's in its average pooling, which does not count
the padding. Weights have the names of the graph's nodes.
"""

from collections.abc import Callable
import functools
import gzip
import http.client
import io
import os
import pathlib
import tarfile
import tempfile
import urllib.request
import zlib

from flax import linen as nn
from google.protobuf.message import DecodeError
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.util import tensor_util

from vae import ordinary_files
from vae import paths
from vae.errors import UserError

URL = (
  'https://storage.googleapis.com/download.tensorflow.org/models/image/'
  'imagenet/inception-2015-12-05.tgz'
)

_GRAPH = 'classify_image_graph_def.pb'
_TIMEOUT = 5.0  # Seconds without a byte from the server.

_SIDE = 299  # Of the images that the network was trained with.
_EPSILON = 1e-3

# A layer is a convolution, (features, height, width[, stride, padding]); the
# kind of a pooling; or a block. A block is its branches in the order in which
# they are joined, each a name and its layers.
_HALVE = (2, 'VALID')
_STEM = (
  (32, 3, 3, *_HALVE),
  (32, 3, 3, 1, 'VALID'),
  (64, 3, 3),
  'halving',
  (80, 1, 1),
  (192, 3, 3, 1, 'VALID'),
  'halving',
)


def _block_a(pool_features):
  return (
    ('', (64, 1, 1)),
    ('tower', (48, 1, 1), (64, 5, 5)),
    ('tower_1', (64, 1, 1), (96, 3, 3), (96, 3, 3)),
    ('tower_2', 'average', (pool_features, 1, 1)),
  )


def _block_c(n):
  return (
    ('', (192, 1, 1)),
    ('tower', (n, 1, 1), (n, 1, 7), (192, 7, 1)),
    ('tower_1', (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)),
    ('tower_2', 'average', (192, 1, 1)),
  )


def _block_e(pool):
  fork = (('', (384, 1, 3)), ('', (384, 3, 1)))
  return (
    ('', (320, 1, 1)),
    ('tower', (384, 1, 1), fork),
    ('tower_1', (448, 1, 1), (384, 3, 3), fork),
    ('tower_2', pool, (192, 1, 1)),
  )


_BLOCKS = {
  'mixed': _block_a(32),  # [35, 35, 256]
  'mixed_1': _block_a(64),  # [35, 35, 288]
  'mixed_2': _block_a(64),
  'mixed_3': (  # [17, 17, 768]
    ('', (384, 3, 3, *_HALVE)),
    ('tower', (64, 1, 1), (96, 3, 3), (96, 3, 3, *_HALVE)),
    ('pool', 'halving'),
  ),
  'mixed_4': _block_c(128),
  'mixed_5': _block_c(160),
  'mixed_6': _block_c(160),
  'mixed_7': _block_c(192),
  'mixed_8': (  # [8, 8, 1280]
    ('tower', (192, 1, 1), (320, 3, 3, *_HALVE)),
    ('tower_1', (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, *_HALVE)),
    ('pool', 'halving'),
  ),
  'mixed_9': _block_e('average'),  # [8, 8, 2048]
  'mixed_10': _block_e('max'),
}


def features(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
  """The network's features of images; a pure function, not compiled.

  Args:
    weights: by name, float32, with the shapes of `weight_shapes`.
    images: uint8 [batch, height, width, 1 or 3].

  Returns:
    float32 [batch, 2048].
  """
  return _network(lambda name, shape: weights[name], preprocess(images))


def weight_shapes() -> dict[str, tuple[int, ...]]:
  """The shape of each weight, by name."""
  shapes = {}

  def record(name, shape):
    shapes[name] = shape
    return jnp.zeros(shape)

  images = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32)
  jax.eval_shape(functools.partial(_network, record), images)
  return shapes


def preprocess(images: jax.Array) -> jax.Array:
  """Images as the graph prepares them: resized, in [-1, 1), with 3 channels.

  uint8 [batch, height, width, 1 or 3] to float32 [batch, 299, 299, 3].
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


def _network(get: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
  """Prepared images [batch, 299, 299, 3] to features; `get` a weight by name."""

  def conv(scope, x, channels, height, width, stride=1, padding='SAME'):
    shape = (height, width, x.shape[-1], channels)
    x = lax.conv_general_dilated(
      x,
      get(f'{scope}/conv2d_params', shape),
      (stride, stride),
      padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      # Else GPUs and TPUs round the factors to fewer bits than float32's.
      precision=lax.Precision.HIGHEST,
    )
    beta, gamma, mean, variance = (
      get(f'{scope}/batchnorm/{name}', (channels,))
      for name in ('beta', 'gamma', 'moving_mean', 'moving_variance')
    )
    return nn.relu((x - mean) * (gamma * lax.rsqrt(variance + _EPSILON)) + beta)

  def chain(scope, layers, x, num_convs=0):
    """Layers one after the other; convolutions are named conv, conv_1, …"""
    for layer in layers:
      if isinstance(layer, str):
        x = _pool(layer, x)
      elif isinstance(layer[0], tuple):
        x = block(f'{scope}mixed/', layer, x)  # Only a tower's last layer.
      else:
        name = f'conv_{num_convs}' if num_convs else 'conv'
        x = conv(f'{scope}{name}', x, *layer)
        num_convs += 1
    return x

  def block(scope, branches, x):
    outputs, num_convs = [], 0
    for name, *layers in branches:
      inner = f'{scope}{name}/' if name else scope
      outputs.append(chain(inner, layers, x, 0 if name else num_convs))
      num_convs += not name
    return jnp.concatenate(outputs, axis=-1)

  x = chain('', _STEM, x)
  for name, branches in _BLOCKS.items():
    x = block(f'{name}/', branches, x)
  return jnp.mean(x, axis=(1, 2))


def _pool(kind: str, x: jax.Array) -> jax.Array:
  if kind == 'average':
    return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)
  if kind == 'max':
    return nn.max_pool(x, (3, 3), padding='SAME')
  return nn.max_pool(x, (3, 3), (2, 2), padding='VALID')


@functools.lru_cache(maxsize=1)
def load(path: str | None) -> dict[str, np.ndarray]:
  """The weights, from a file, the cache, or the web.

  The graph is read as the protocol buffer that it is: nothing in it is
  executed, and TensorFlow is not needed.

  Args:
    path: the archive as it is kept at `URL`; None for the copy in ~/.cache/vae,
      which is downloaded first if it is missing.

  Raises:
    UserError: if the file is missing or wrong, or cannot be downloaded.
  """
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  cache = pathlib.Path(root, 'vae', URL.rsplit('/', 1)[-1]).expanduser()
  source = paths.expand(path) if path else cache
  try:
    if path or cache.exists():
      return _parse(ordinary_files.read(source), source)
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that the cache is never half there.
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
      content = _download()
      weights = _parse(content, URL)
      complete = pathlib.Path(folder, cache.name)
      complete.write_bytes(content)
      complete.replace(cache)
      return weights
  except OSError as error:
    raise _error(f'{source} is not accessible ({error.strerror})') from error


def _download() -> bytes:
  print(f'Downloading {URL} (89 MB).', flush=True)
  try:
    with urllib.request.urlopen(URL, timeout=_TIMEOUT) as response:
      return response.read()
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, 'reason', None) or error
    raise _error(f'{URL} cannot be downloaded ({reason})') from error


def _parse(archive: bytes, source: object) -> dict[str, np.ndarray]:
  """The weights in an archive from `source`."""
  shapes = weight_shapes()
  try:
    # Decompressed to its end, so that gzip's checksum is verified.
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive))) as tar:
      members = [m for m in tar if pathlib.PurePath(m.name).name == _GRAPH]
      graph = GraphDef.FromString(tar.extractfile(members[0]).read())
    tensors = {
      node.name: tensor_util.make_ndarray(node.attr['value'].tensor)
      for node in graph.node
      if node.op == 'Const' and node.name in shapes
    }
  except (
    DecodeError,
    EOFError,
    LookupError,
    OSError,
    tarfile.TarError,
    TypeError,
    ValueError,
    zlib.error,
  ) as error:
    raise _error(f'{source} is no intact .tgz with {_GRAPH}') from error
  for name, shape in shapes.items():
    found = tensors.get(name)
    if getattr(found, 'shape', None) != shape or found.dtype != np.float32:
      raise _error(f'{source} has no {name} of float32 {list(shape)}')
  return tensors


def _error(fault: str) -> UserError:
  return UserError(
    f'{fault}; download {URL} yourself and name it with '
    '--inception_weights=FILE.'
  )
