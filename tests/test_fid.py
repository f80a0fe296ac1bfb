"""Distances against closed forms; the network against TensorFlow's own."""

import io
import itertools
import tarfile

import jax
import numpy as np
import pytest
from scipy import linalg
import tensorflow as tf

from evaluation import fid
from tests.ports import free_port
from vae.errors import UserError

GRAPH = 'classify_image_graph_def.pb'


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def test_fid_is_that_of_a_general_matrix_root():
  first, second = random(90, 40), random(80, 40, seed=1) + random(40, seed=2)
  covs = [np.cov(features, rowvar=False) for features in (first, second)]
  difference = first.mean(axis=0) - second.mean(axis=0)
  root = linalg.sqrtm(covs[0] @ covs[1]).real
  expected = difference @ difference + np.trace(sum(covs) - 2 * root)
  assert fid.fid(first, second) == pytest.approx(expected)
  assert fid.fid(second, first) == pytest.approx(expected)


def test_fid_of_fewer_images_than_features():
  first, second = random(4, 50), random(6, 50, seed=1)
  centered = [f - f.mean(axis=0) for f in (first, second)]
  factors = [f.T / np.sqrt(len(f) - 1) for f in centered]
  # The root has the singular values of the factors' product as eigenvalues.
  nuclear = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
  expected = sum(np.sum(f**2) for f in factors) - 2 * nuclear
  expected += np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
  assert fid.fid(first, second) == pytest.approx(expected, rel=1e-5)


def test_fid_is_computed_in_float64():
  # In float32 the variance would drown in the mean.
  features = (random(100, 3) + 4096).astype(np.float32)
  expected = np.square(features.mean(axis=0, dtype=np.float64) - 4096).sum()
  expected += np.var(features, axis=0, dtype=np.float64, ddof=1).sum()
  assert fid.fid(features, 2 * features - 4096) == pytest.approx(
    expected, rel=1e-6
  )


def plain_mmd2(x, y):
  """The definition, pair by pair."""

  def mean(pairs):
    return np.mean([(np.dot(a, b) / len(a) + 1) ** 3 for a, b in pairs])

  within = [mean(itertools.permutations(a, 2)) for a in (x, y)]
  return sum(within) - 2 * mean(itertools.product(x, y))


def test_kid_of_small_sets_is_the_plain_sum():
  x, y = random(12, 6).astype(np.float32), random(9, 6, seed=1) + 1
  assert fid.mmd2(x, y) == pytest.approx(plain_mmd2(x, y))
  y = random(12, 6, seed=1)
  expected = plain_mmd2(x.astype(np.float64), y)
  assert fid.kid(x, y, num_subsets=3) == pytest.approx(expected)


def test_kid_of_subsets_has_the_mean_of_the_sets():
  x, y = random(300, 4), random(300, 4, seed=1) + 0.5
  estimates = [fid.kid(x, y, 1, 50, seed) for seed in range(400)]
  error = np.std(estimates) / np.sqrt(400)
  assert np.mean(estimates) == pytest.approx(fid.mmd2(x, y), abs=4 * error)
  assert np.mean(estimates) > 10 * error


def make_graph(num_features=8, side=75):
  """A small graph of the operations that Inception's has.

  Of its time: normalisation is an operation that later versions of TensorFlow
  import, but no longer make.
  """
  generator = np.random.default_rng(0)
  names = iter(f'conv_{i}' for i in range(9))

  def conv(x, shape, stride=1, padding='SAME'):
    name = next(names)
    kernel = generator.normal(0, 0.5, shape).astype(np.float32)
    x = tf.nn.conv2d(x, kernel, stride, padding)
    moments = generator.uniform(0.5, 1.5, (4, shape[-1])).astype(np.float32)
    mean, variance, beta, gamma = moments
    x = tf.raw_ops.FusedBatchNorm(
      x=x,
      scale=gamma,
      offset=beta - 1,
      mean=mean - 1,
      variance=variance,
      epsilon=0.001,
      is_training=False,
      name=f'{name}/batchnorm',
    ).y
    x = tf.debugging.check_numerics(x, 'infinite')
    with tf.control_dependencies([x]):
      return tf.nn.relu(tf.identity(x), name=name)

  with tf.Graph().as_default() as graph:
    x = tf.compat.v1.placeholder(
      tf.float32, [None, None, None, 3], 'ExpandDims'
    )
    x = tf.raw_ops.ResizeBilinear(images=x, size=[side, side - 6])
    x = (x - 128.0) * (1 / 128)
    x = conv(x, (3, 3, 3, 4), 2, 'VALID')
    branches = [
      conv(x, (1, 5, 4, num_features - 6)),
      conv(tf.nn.avg_pool2d(x, 3, 1, 'SAME'), (1, 1, 4, 2)),
      tf.nn.max_pool2d(x, 3, 1, 'SAME'),
    ]
    x = tf.raw_ops.Concat(concat_dim=3, values=branches)
    x = tf.nn.max_pool2d(x, 3, 2, 'VALID')
    tf.nn.avg_pool2d(x, x.shape[1:3], 1, 'VALID', name='pool_3')
    tf.constant('a label', name='unused')
  graph = graph.as_graph_def()
  graph.versions.producer = 8
  for node in graph.node:
    node.attr.pop('explicit_paddings', None)
    if node.op == 'FusedBatchNorm':
      x, gamma, beta, mean, variance = node.input
      node.op = 'BatchNormWithGlobalNormalization'
      node.input[:] = [x, mean, variance, beta, gamma]
      dtype = node.attr['T'].type
      node.attr.clear()
      node.attr['T'].type = dtype
      node.attr['variance_epsilon'].f = 0.001
      node.attr['scale_after_normalization'].b = True
  return graph


def pack(graph, name=GRAPH):
  """An archive like the official one: the graph among other files."""
  archive = io.BytesIO()
  with tarfile.open(fileobj=archive, mode='w:gz', compresslevel=0) as tar:
    for member, content in (('LICENSE', b'Apache'), (name, graph)):
      info = tarfile.TarInfo(member)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return archive.getvalue()


@pytest.fixture(scope='module')
def graph():
  return make_graph()


@pytest.fixture
def archive(graph, tmp_path):
  path = tmp_path / 'inception.tgz'
  path.write_bytes(pack(graph.SerializeToString()))
  return path


@pytest.mark.parametrize('shape', [(64, 50, 3), (300, 218, 3), (28, 28, 1)])
def test_features_are_tensorflows(graph, archive, shape):
  images = np.random.default_rng(1).integers(0, 256, (2, *shape), np.uint8)
  network = fid.load(str(archive))
  actual = jax.jit(network.features)(network.weights, images)
  with tf.Graph().as_default() as own:
    tf.graph_util.import_graph_def(graph, name='')
    feed = np.broadcast_to(images, (*images.shape[:3], 3)).astype(np.float32)
    with tf.compat.v1.Session(graph=own) as session:
      expected = session.run('pool_3:0', {'ExpandDims:0': feed})
  expected = expected.reshape(2, -1)
  assert actual.dtype == np.float32 and expected.std() > 1e-2
  np.testing.assert_allclose(actual, expected, atol=1e-4 * expected.std())


def the_line(path=None):
  """The one line that `load` ends with, which always has the remedy."""
  fid.load.cache_clear()
  with pytest.raises(UserError) as error:
    fid.load(path)
  line = str(error.value)
  assert '\n' not in line
  assert line.endswith('and name it with --inception_weights=FILE.')
  return line


@pytest.mark.parametrize(
  'damage',
  [
    lambda content, graph: b'<html>Not found</html>',
    lambda content, graph: content[: len(content) // 2],
    lambda content, graph: content[:-8] + bytes(8),  # gzip's checksum.
    lambda content, graph: pack(graph.SerializeToString(), 'other.pb'),
    lambda content, graph: pack(without(graph, 'conv_1')),
  ],
)
def test_damaged_archive_is_refused(archive, graph, damage):
  archive.write_bytes(damage(archive.read_bytes(), graph))
  assert the_line(str(archive)).startswith(f'{archive} is not an intact .tgz')


def without(graph, name):
  other = tf.compat.v1.GraphDef()
  other.node.extend(node for node in graph.node if node.name != name)
  return other.SerializeToString()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The path of the cached archive, which is not there yet."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  fid.load.cache_clear()
  yield tmp_path / 'cache' / 'vae' / 'inception.tgz'
  fid.load.cache_clear()


def test_downloaded_once_then_kept(archive, cache, monkeypatch):
  monkeypatch.setattr(fid, 'URL', archive.as_uri())
  downloaded, content = fid.load(None), archive.read_bytes()
  archive.unlink()
  fid.load.cache_clear()
  kept = fid.load(None)
  jax.tree.map(np.testing.assert_array_equal, kept.weights, downloaded.weights)
  assert cache.read_bytes() == content
  assert list(cache.parent.iterdir()) == [cache]


def test_failed_download_keeps_nothing(archive, cache, monkeypatch):
  archive.write_bytes(b'<html>Please log in.</html>')
  monkeypatch.setattr(fid, 'URL', archive.as_uri())
  assert the_line().startswith(f'{fid.URL} is not an intact .tgz')
  monkeypatch.setattr(fid, 'URL', f'http://127.0.0.1:{free_port()}/a.tgz')
  line = the_line()
  assert 'cannot be read or downloaded' in line and 'refused' in line
  assert list(cache.parent.iterdir()) == []
