"""FID and KID: distances of a model's images from real ones.

Distances are between features [n, dimensions] of two sets of at least two
images, in float64; 0 for equal distributions, and smaller is better. FID is
defined (Heusel et al. 2017) by one frozen graph, TensorFlow's Inception v3 of
2015-12-05; another Inception, or another way to resize, gives numbers that
cannot be compared. That graph is read as the protocol buffer that it is, and
its operations up to `pool_3` are computed by JAX.
"""

from collections.abc import Callable
import dataclasses
import functools
import graphlib
import gzip
import http.client
import io
import os
import pathlib
import tarfile
from typing import Any
import urllib.request

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics.pairwise import polynomial_kernel
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.util import tensor_util

from vae import devices, figures, paths, splits
from vae.errors import UserError

URL = (
  'https://storage.googleapis.com/download.tensorflow.org/models/image/'
  'imagenet/inception-2015-12-05.tgz'
)
_GRAPH = 'classify_image_graph_def.pb'
_TIMEOUT = 5.0  # Seconds without a byte from the server.

# Nodes: the images, and their features.
_INPUT, _OUTPUT = 'ExpandDims', 'pool_3'

# Images that go through the Inception network at a time, on each device.
_BATCH_SIZE = 32


def check(context) -> str | None:
  """Loads the network; only --inception_weights makes a failure an error."""
  try:
    load(context.settings.inception_weights)
  except UserError as error:
    if context.settings.inception_weights:
      raise
    return str(error)
  return None


def evaluate(context, results) -> None:
  """Adds FID and KID of samples and of reconstructions."""
  network = load(context.settings.inception_weights)
  weights = devices.replicate(network.weights)
  trained, split, seed = context.trained, context.split, context.settings.seed
  num_devices = jax.local_device_count()
  # A batch is padded to its full size: it is no larger than the split.
  per_device = min(_BATCH_SIZE, -(-split.num_examples // num_devices))

  def features(label, images):
    return context.over_split(
      lambda batch, start: network.extract(weights, batch),
      f'Inception features of {label}',
      images,
      per_device * num_devices,
    )

  def made_of(batches):
    # The floats of a large split would fill the memory.
    images = [figures.to_uint8(batch) for batch in batches]
    return splits.ArraySplit(np.concatenate(images))

  real = features('images', split)
  print('decoding samples and reconstructions …', flush=True)
  z, size = trained.sample_latents(len(real), seed), context.settings.batch_size
  made = {
    # Classes are as frequent as in the split.
    'samples': made_of(
      trained.decode(z[index * size :][:size], labels)
      for index, (_, labels) in enumerate(context.batches())
    ),
    'reconstructions': made_of(
      trained.reconstruct(images, labels=labels)
      for images, labels in context.batches()
    ),
  }
  for name, images in made.items():
    found = features(name, images)
    about = f'of {len(found):,} {name} against the {len(real):,} images'
    results.number(f'fid_{name}', fid(real, found), 'Fréchet distance', about)
    value = kid(real, found, seed=seed)
    results.number(f'kid_{name}', value, 'squared MMD', about)


def fid(features_1: np.ndarray, features_2: np.ndarray) -> float:
  """Fréchet Inception Distance (Heusel et al. 2017, eq. 6).

  ‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½) of the features' means and unbiased
  covariances. It is biased: the fewer the images, the larger it is, so that
  only distances between equally many images can be compared.
  """
  means, roots = [], []
  for features in (features_1, features_2):  # In turn, to save memory.
    means.append(np.mean(features, axis=0, dtype=np.float64))
    centred = (features - means[-1]) / np.sqrt(len(features) - 1)
    roots.append(np.linalg.qr(centred, mode='r'))
  # C = RᵀR. The eigenvalues of C1 C2 are the squares of the singular values of
  # R1 R2ᵀ, whatever the rank.
  root_1, root_2 = roots
  traces = np.sum(root_1**2) + np.sum(root_2**2)
  trace_of_root = np.linalg.norm(root_1 @ root_2.T, 'nuc')
  distance = np.sum((means[0] - means[1]) ** 2) + traces - 2 * trace_of_root
  return max(float(distance), 0.0)


def kid(
  features_1: np.ndarray,
  features_2: np.ndarray,
  num_subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 0,
) -> float:
  """Kernel Inception Distance (Bińkowski et al. 2018).

  The mean, over random subsets of both sets, drawn without replacement, of the
  unbiased squared MMD. It can be below zero, and does not depend on the number
  of images but for its noise.
  """
  features = [np.asarray(f, np.float64) for f in (features_1, features_2)]
  size = min(subset_size, *map(len, features))
  choice = functools.partial(np.random.default_rng(seed).choice, replace=False)
  estimates = [
    mmd2(*(choice(f, size) for f in features)) for _ in range(num_subsets)
  ]
  return float(np.mean(estimates))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
  """Unbiased squared MMD of [n, d] and [m, d] under the kernel (xᵀy/d + 1)³.

  Bińkowski et al. 2018, section 4; Gretton et al. 2012, eq. 3.
  """

  def mean_within(a):
    values = polynomial_kernel(a)
    return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

  return mean_within(x) + mean_within(y) - 2 * polynomial_kernel(x, y).mean()


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A frozen graph: nodes in order, and constants by name."""

  # Name, operation, attributes and inputs.
  nodes: list[tuple[str, str, Any, list[str]]]
  sizes: dict[str, np.ndarray]  # Constants that shapes depend on.
  weights: dict[str, np.ndarray]  # The others, float32.

  @functools.cached_property
  def extract(self) -> Callable[..., jax.Array]:
    """`features` on all devices, compiled once for all models."""
    return jax.pmap(self.features, in_axes=(None, 0))

  def features(self, weights: dict[str, Any], images: jax.Array) -> jax.Array:
    """Features [batch, n] of uint8 images [batch, height, width, 1 or 3]."""
    images = images.astype(jnp.float32)
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    values = {**self.sizes, **weights, _INPUT: images}
    for name, operation, attributes, inputs in self.nodes:
      inputs = [values[i] for i in inputs]
      values[name] = _OPERATIONS[operation](attributes, *inputs)
    return values[_OUTPUT].reshape(len(images), -1)


def _convolve(attributes, x, kernel):
  return lax.conv_general_dilated(
    x,
    kernel,
    attributes['strides'].list.i[1:3],
    attributes['padding'].s.decode(),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    # Else GPUs and TPUs round the factors to fewer bits than float32's.
    precision=lax.Precision.HIGHEST,
  )


def _normalise(attributes, x, mean, variance, beta, gamma):
  scale = lax.rsqrt(variance + attributes['variance_epsilon'].f)
  if attributes['scale_after_normalization'].b:
    scale = scale * gamma
  return (x - mean) * scale + beta


def _pool(pool: Callable, **options) -> Callable:
  return lambda attributes, x: pool(
    x,
    tuple(attributes['ksize'].list.i[1:3]),
    tuple(attributes['strides'].list.i[1:3]),
    attributes['padding'].s.decode(),
    **options,
  )


def _resize(attributes, images, size):
  # Linear, as in TensorFlow 1: output i is read at input i·before/after, and
  # nothing is smoothed when the image shrinks.
  for axis, length in ((2, int(size[1])), (1, int(size[0]))):
    side = images.shape[axis]
    # In float32, as TensorFlow computes the positions.
    positions = np.arange(length, dtype=np.float32) * np.float32(side / length)
    before = np.minimum(np.floor(positions).astype(np.int32), side - 1)
    after = np.minimum(before + 1, side - 1)
    weights = (positions - before).astype(np.float32)
    weights = weights.reshape(-1, *(1,) * (images.ndim - axis - 1))
    start = jnp.take(images, before, axis)
    images = start + (jnp.take(images, after, axis) - start) * weights
  return images


_OPERATIONS = {
  'AvgPool': _pool(nn.avg_pool, count_include_pad=False),
  'BatchNormWithGlobalNormalization': _normalise,
  'CheckNumerics': lambda attributes, x: x,
  'Concat': lambda attributes, axis, *xs: jnp.concatenate(xs, int(axis)),
  'Conv2D': _convolve,
  'Identity': lambda attributes, x: x,
  'MaxPool': _pool(nn.max_pool),
  'Mul': lambda attributes, x, y: x * y,
  'Relu': lambda attributes, x: nn.relu(x),
  'ResizeBilinear': _resize,
  'Sub': lambda attributes, x, y: x - y,
}


@functools.lru_cache(maxsize=1)
def load(path: str | None) -> Network:
  """The network from a file, or from `URL` by way of ~/.cache/vae.

  Raises UserError if the file is missing or wrong, or cannot be downloaded.
  """
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  cache = paths.expand(root) / 'vae' / URL.rsplit('/', 1)[-1]
  source = paths.expand(path) if path else cache
  try:
    if path or cache.exists():
      return _parse(source.read_bytes(), source)
    cache.parent.mkdir(parents=True, exist_ok=True)
    print(f'Downloading {URL} (89 MB).', flush=True)
    with urllib.request.urlopen(URL, timeout=_TIMEOUT) as response:
      content = response.read()
    network = _parse(content, URL)
    paths.replace(cache, content)
    return network
  except (OSError, http.client.HTTPException) as error:
    fault = f'{source} cannot be read or downloaded ({error})'
    raise _error(fault) from error


def _parse(archive: bytes, source: object) -> Network:
  try:
    # Decompressed to its end, so that gzip's checksum is verified.
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive))) as tar:
      members = [m for m in tar if pathlib.PurePath(m.name).name == _GRAPH]
      content = tar.extractfile(members[0]).read()
    network = _prune(GraphDef.FromString(content))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    jax.eval_shape(network.features, network.weights, images)
  except Exception as error:  # Damaged bytes make decoders raise anything.
    raise _error(
      f'{source} is not an intact .tgz with Inception in {_GRAPH} '
      f'({error!r:.80})'
    ) from error
  return network


def _prune(graph: GraphDef) -> Network:
  """The part of a graph that the features depend on."""
  by_name = {node.name: node for node in graph.node}
  inputs, waiting = {_INPUT: []}, [_OUTPUT]
  while waiting:
    name = waiting.pop()
    if name not in inputs:
      # Control dependencies, ^name, carry no data.
      names = [i for i in by_name[name].input if not i.startswith('^')]
      inputs[name] = [i.partition(':')[0] for i in names]
      waiting += inputs[name]
  nodes, sizes, weights = [], {}, {}
  for name in graphlib.TopologicalSorter(inputs).static_order():
    if name == _INPUT:
      continue
    node = by_name[name]
    if node.op == 'Const':
      constant = tensor_util.make_ndarray(node.attr['value'].tensor)
      kind = weights if constant.dtype == np.float32 else sizes
      kind[name] = constant
    else:
      nodes.append((name, node.op, node.attr, inputs[name]))
  return Network(nodes, sizes, weights)


def _error(fault: str) -> UserError:
  return UserError(
    f'{fault}; download {URL} yourself and name it with '
    '--inception_weights=FILE.'
  )
