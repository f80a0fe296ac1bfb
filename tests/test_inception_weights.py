import contextlib
import gzip
import http.server
import io
import socket
import tarfile
import threading

from flax import traverse_util
import jax
import numpy as np
import pytest
import tensorflow as tf

from evaluation import inception
from evaluation import inception_weights
from tests.ports import free_port
from vae.errors import UserError

GRAPH = 'classify_image_graph_def.pb'
# Any convolution; tests/test_inception.py has the list of all.
KERNEL = 'mixed_4/tower_1/conv_2/conv2d_params'


def flatten(variables):
  assert list(variables) == ['params']
  return traverse_util.flatten_dict(variables['params'], sep='/')


def parameter_shapes():
  """Shapes of all parameters, by the names of the graph's nodes."""
  variables = jax.eval_shape(
    inception.Inception().init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32),
  )
  return {name: a.shape for name, a in flatten(variables).items()}


@pytest.fixture(scope='module')
def shapes():
  return parameter_shapes()


def graph_of(values, shapes):
  """A graph of constants and, as the real one has, of other nodes."""
  with tf.Graph().as_default() as graph:
    image = tf.compat.v1.placeholder(tf.float32, name='ExpandDims')
    tf.subtract(image, 128.0, name='Sub')
    for name, value in values.items():
      tf.compat.v1.constant(value, tf.float32, shapes[name], name)
  return graph.as_graph_def().SerializeToString()


def pack(graph, name=GRAPH):
  """An archive as the official one: the graph among other files."""
  archive = io.BytesIO()
  with tarfile.open(fileobj=archive, mode='w:gz', compresslevel=0) as tar:
    for member, content in (('LICENSE', b'Apache'), (name, graph)):
      info = tarfile.TarInfo(member)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return archive.getvalue()


@pytest.fixture(scope='module')
def small_graph(shapes):
  """The real shapes, but one value in each, so that the file is small."""
  return graph_of({name: i for i, name in enumerate(shapes)}, shapes)


@pytest.fixture(scope='module')
def small_archive(small_graph):
  return pack(small_graph)


@pytest.fixture
def write(tmp_path):
  def write(name, content):
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)

  return write


@contextlib.contextmanager
def serving(content, status=200, length=None):
  """A server on this machine; yields its URL and the paths asked for."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      self.send_response(status)
      self.send_header('Content-Length', str(length or len(content)))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}/inception.tgz', asked
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def set_url(monkeypatch):
  monkeypatch.setenv('no_proxy', '127.0.0.1')

  def set_url(url):
    monkeypatch.setattr(inception_weights, 'URL', url)

  return set_url


def the_line(path, cache=None):
  """The one line that `load` ends with, which always says what to do."""
  with pytest.raises(UserError) as error:
    inception_weights.load(path, cache)
  line = str(error.value)
  assert '\n' not in line
  advice = f'fetch {inception_weights.URL} yourself and name it with '
  assert line.endswith(f'; {advice}--inception_weights=FILE.')
  return line


@pytest.fixture(scope='module')
def weights(shapes):
  rng = np.random.default_rng(0)
  return {
    name: rng.random(shape, np.float32) - 0.5 for name, shape in shapes.items()
  }


@pytest.mark.parametrize('suffix', ['tgz', 'pb'])
def test_weights_are_the_graphs(weights, shapes, write, suffix):
  graph = graph_of(weights, shapes)
  content = graph if suffix == 'pb' else pack(graph)
  loaded = inception_weights.load(write(f'inception.{suffix}', content))
  put_in = {'params': traverse_util.unflatten_dict(weights, sep='/')}
  # Where the trees are equal, so are the features.
  assert jax.tree.structure(loaded) == jax.tree.structure(put_in)
  for name, value in flatten(loaded).items():
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, weights[name])


def test_values_that_tensorflow_left_out_are_repeated(
  shapes, small_archive, write
):
  loaded = inception_weights.load(write('inception.tgz', small_archive))
  for i, (name, shape) in enumerate(shapes.items()):
    value = flatten(loaded)[name]
    np.testing.assert_array_equal(value, np.full(shape, i, np.float32))


def test_archive_that_was_packed_anew(shapes, small_graph, write):
  archive = pack(small_graph, f'./inception/{GRAPH}')
  loaded = inception_weights.load(write('mine.tar.gz', archive))
  assert flatten(loaded).keys() == shapes.keys()


def test_missing_file(tmp_path):
  path = tmp_path / 'nothing.tgz'
  line = the_line(str(path))
  assert line.startswith(f'{path} cannot be read (No such file or directory)')
  assert 'it is a folder' in the_line(str(tmp_path))


@pytest.mark.parametrize(
  'make',
  [
    lambda archive: b'<html>Not found</html>',
    lambda archive: gzip.compress(b'not a tar'),
    lambda archive: archive[: len(archive) // 2],
    lambda archive: archive[:-8] + bytes(8),  # gzip's checksum is wrong.
    lambda archive: pack(b'no graph'),
    lambda archive: pack(b'', 'other.pb'),
  ],
  ids=['page', 'no tar', 'half', 'damaged', 'no graph', 'no member'],
)
def test_what_is_no_archive(small_archive, write, make):
  path = write('inception.tgz', make(small_archive))
  line = the_line(path)
  assert line.startswith(f'{path} is neither an intact .tgz with {GRAPH}')


def test_empty_graph(write):
  path = write('inception.pb', pack(b''))
  assert the_line(path).startswith(f'{path} has no constant conv')


def test_archive_that_unpacks_without_end(small_archive, write, monkeypatch):
  unpacked = len(gzip.decompress(small_archive))
  path = write('inception.tgz', small_archive)
  monkeypatch.setattr(inception_weights, '_MAX_BYTES', unpacked)
  inception_weights.load(path)
  monkeypatch.setattr(inception_weights, '_MAX_BYTES', unpacked - 1)
  line = the_line(path)
  assert line.startswith(f'{path} is neither an intact .tgz with {GRAPH}')


def test_missing_node(shapes, write):
  others = {name: 0 for name in shapes if name != KERNEL}
  path = write('inception.pb', graph_of(others, shapes))
  assert the_line(path).startswith(f'{path} has no constant {KERNEL};')


def test_node_that_is_no_constant(small_graph, write):
  graph = tf.compat.v1.GraphDef.FromString(small_graph)
  next(node for node in graph.node if node.name == KERNEL).op = 'VariableV2'
  path = write('inception.pb', graph.SerializeToString())
  assert the_line(path).startswith(f'{path} has no constant {KERNEL};')


@pytest.mark.parametrize(
  ('shape', 'dtype'),
  [
    ((7, 1, 128, 128), tf.float32),
    ((1, 7, 128, 128, 1), tf.float32),
    ((1, 7, 128, 128), tf.float64),
  ],
)
def test_wrong_shape_or_type(shapes, small_graph, write, shape, dtype):
  assert shapes[KERNEL] == (1, 7, 128, 128)
  graph = tf.compat.v1.GraphDef.FromString(small_graph)
  node = next(node for node in graph.node if node.name == KERNEL)
  node.attr['value'].tensor.CopyFrom(tf.make_tensor_proto(0, dtype, shape))
  path = write('inception.pb', graph.SerializeToString())
  line = the_line(path)
  assert line.startswith(f'{KERNEL} in {path} is not [1, 7, 128, 128] float32')


def test_tensor_with_bytes_missing(small_graph, write):
  graph = tf.compat.v1.GraphDef.FromString(small_graph)
  node = next(node for node in graph.node if node.name == KERNEL)
  tensor = node.attr['value'].tensor
  tensor.ClearField('float_val')
  for content in (b'', bytes(8), bytes(9)):
    tensor.tensor_content = content
    path = write('inception.pb', graph.SerializeToString())
    assert the_line(path).startswith(f'{KERNEL} in {path} is not')


def test_fetched_once_then_kept(small_archive, shapes, tmp_path, set_url):
  cache = tmp_path / 'not' / 'yet' / 'inception.tgz'
  with serving(small_archive) as (url, asked):
    set_url(url)
    fetched = inception_weights.load(None, cache)
    assert asked == ['/inception.tgz']
  assert cache.read_bytes() == small_archive
  assert list(cache.parent.iterdir()) == [cache]
  # The server is gone.
  kept = inception_weights.load(None, cache)
  assert flatten(kept).keys() == shapes.keys()
  jax.tree.map(np.testing.assert_array_equal, kept, fetched)


@pytest.mark.parametrize('variable', ['XDG_CACHE_HOME', 'HOME'])
def test_default_cache(small_archive, tmp_path, set_url, monkeypatch, variable):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setenv(variable, str(tmp_path))
  with serving(small_archive) as (url, _):
    set_url(url)
    inception_weights.load(None)
  folder = tmp_path if variable == 'XDG_CACHE_HOME' else tmp_path / '.cache'
  kept = folder / 'vae' / 'inception.tgz'
  assert kept.read_bytes() == small_archive


def test_named_file_is_not_put_in_the_cache(small_archive, write, tmp_path):
  cache = tmp_path / 'cache' / 'inception.tgz'
  inception_weights.load(write('mine.tgz', small_archive), cache)
  assert not cache.parent.exists()


def assert_nothing_kept(cache):
  assert list(cache.parent.iterdir()) == []


def test_no_server(tmp_path, set_url):
  cache = tmp_path / 'cache' / 'inception.tgz'
  set_url(f'http://127.0.0.1:{free_port()}/inception.tgz')
  line = the_line(None, cache)
  assert line.startswith(f'{inception_weights.URL} cannot be fetched (')
  assert 'Connection refused' in line
  assert_nothing_kept(cache)


def test_no_such_file_on_the_server(tmp_path, set_url):
  cache = tmp_path / 'cache' / 'inception.tgz'
  with serving(b'gone', status=404) as (url, _):
    set_url(url)
    assert the_line(None, cache).startswith(f'{url} cannot be fetched (')
  assert_nothing_kept(cache)


def test_server_that_serves_something_else(tmp_path, set_url):
  cache = tmp_path / 'cache' / 'inception.tgz'
  with serving(b'<html>Please log in.</html>') as (url, _):
    set_url(url)
    assert the_line(None, cache).startswith(f'{url} is neither')
  assert_nothing_kept(cache)


def test_server_that_stops_midway(small_archive, tmp_path, set_url):
  cache = tmp_path / 'cache' / 'inception.tgz'
  half = small_archive[: len(small_archive) // 2]
  with serving(half, length=len(small_archive)) as (url, _):
    set_url(url)
    assert the_line(None, cache).startswith(f'{url} cannot be fetched (')
  assert_nothing_kept(cache)


def test_server_that_never_answers(tmp_path, set_url, monkeypatch):
  monkeypatch.setattr(inception_weights, '_TIMEOUT', 0.05)
  cache = tmp_path / 'cache' / 'inception.tgz'
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    listener.listen()
    port = listener.getsockname()[1]
    set_url(f'http://127.0.0.1:{port}/inception.tgz')
    assert 'cannot be fetched (timed out)' in the_line(None, cache)
  assert_nothing_kept(cache)


def test_cache_that_cannot_be_written(small_archive, tmp_path, set_url):
  (tmp_path / 'file').touch()
  cache = tmp_path / 'file' / 'inception.tgz'
  with serving(small_archive) as (url, asked):
    set_url(url)
    assert the_line(None, cache).startswith(f'{cache} cannot be')
    assert not asked  # Before anything is fetched.


def test_damaged_cache(tmp_path, set_url, small_archive):
  cache = tmp_path / 'inception.tgz'
  cache.write_bytes(small_archive[:-8])
  set_url(f'http://127.0.0.1:{free_port()}/inception.tgz')
  assert the_line(None, cache).startswith(f'{cache} is neither')
