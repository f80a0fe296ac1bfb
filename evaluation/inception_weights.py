"""Weights of `evaluation.inception`, from the archive that defines FID.

The archive holds a frozen TensorFlow graph. It is read as the protocol buffer
that it is: nothing in it is executed, and TensorFlow is not needed.
"""

import gzip
import http.client
import io
import os
import pathlib
import tarfile
import tempfile
from typing import Any
import urllib.request
import zlib

from flax import traverse_util
from google.protobuf.message import DecodeError
import jax
import jax.numpy as jnp
import numpy as np
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT

from evaluation import inception
from vae import paths
from vae.errors import UserError

URL = (
  'https://storage.googleapis.com/download.tensorflow.org/models/image/'
  'imagenet/inception-2015-12-05.tgz'
)

_GRAPH = 'classify_image_graph_def.pb'
_GZIP = b'\x1f\x8b'
_MAX_BYTES = 1 << 28  # Unpacked; it has 96 MB.
_TIMEOUT = 5.0  # Seconds without a byte from the server.


def load(path: str | None, cache: pathlib.Path | None = None) -> dict[str, Any]:
  """The weights, from a file, or from the cache, or from where they are kept.

  Args:
    path: the archive as it is kept at `URL`, or the graph in it; None to take
      the cache's, which is fetched first where it is not there.
    cache: the archive's copy on this machine; by default in ~/.cache/vae.

  Returns:
    Variables of `evaluation.inception.Inception`, NumPy arrays.

  Raises:
    UserError: what is wrong with the file or the network, and what to do.
  """
  if path:
    return _read(paths.expand(path))
  cache = cache or _default_cache()
  if cache.exists():
    return _read(cache)
  return _fetch(cache)


def _default_cache() -> pathlib.Path:
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(root, 'vae', URL.rsplit('/', 1)[-1]).expanduser()


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = path.read_bytes()
  except OSError as error:
    raise _error(f'{path} cannot be read ({error.strerror})') from error
  return _parse(content, str(path))


def _fetch(cache: pathlib.Path) -> dict[str, Any]:
  """Fetches the archive, and keeps it if it is what it should be."""
  try:
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that the cache is never half there.
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
      content = _download()
      variables = _parse(content, URL)
      complete = pathlib.Path(folder, cache.name)
      complete.write_bytes(content)
      complete.replace(cache)
  except OSError as error:
    raise _error(f'{cache} cannot be written ({error.strerror})') from error
  return variables


def _download() -> bytes:
  print(f'Fetching {URL} (89 MB).', flush=True)
  try:
    with urllib.request.urlopen(URL, timeout=_TIMEOUT) as response:
      return response.read()
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, 'reason', None) or error
    raise _error(f'{URL} cannot be fetched ({reason})') from error


def _parse(content: bytes, source: str) -> dict[str, Any]:
  """The variables in the bytes of an archive or of a graph.

  Args:
    content: of the file.
    source: what to call it in an error.
  """
  graph = GraphDef()
  try:
    if content.startswith(_GZIP):
      content = _unpack(content)
    graph.ParseFromString(content)
  except (
    DecodeError,
    EOFError,
    LookupError,
    OSError,
    tarfile.TarError,
    zlib.error,
  ) as error:
    raise _error(
      f'{source} is neither an intact .tgz with {_GRAPH} nor that graph itself'
    ) from error
  tensors = {
    node.name: node.attr['value'].tensor
    for node in graph.node
    if node.op == 'Const'
  }
  variables = jax.eval_shape(
    inception.Inception().init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32),
  )
  # The graph's nodes have the parameters' names.
  wanted = traverse_util.flatten_dict(variables['params'], sep='/')
  found = {}
  for name, parameter in wanted.items():
    if name not in tensors:
      raise _error(f'{source} has no constant {name}')
    found[name] = _to_array(tensors[name], parameter.shape)
    if found[name] is None:
      shape = list(parameter.shape)
      raise _error(f'{name} in {source} is not {shape} float32')
  return {'params': traverse_util.unflatten_dict(found, sep='/')}


def _unpack(archive: bytes) -> bytes:
  # To its end, so that gzip's checksum is verified; of a few bytes that claim
  # to be many, no further.
  with gzip.open(io.BytesIO(archive)) as file:
    archive = file.read(_MAX_BYTES)
    if file.read(1):
      raise LookupError(_GRAPH)
  with tarfile.open(fileobj=io.BytesIO(archive), mode='r:') as tar:
    for member in tar:
      if member.isfile() and pathlib.PurePath(member.name).name == _GRAPH:
        return tar.extractfile(member).read()
  raise LookupError(_GRAPH)


def _to_array(tensor: TensorProto, shape: tuple[int, ...]) -> np.ndarray | None:
  """The tensor's values, or None where type, shape or number are others."""
  dimensions = tuple(dim.size for dim in tensor.tensor_shape.dim)
  if tensor.dtype != DT_FLOAT or dimensions != shape:
    return None
  size = int(np.prod(shape))
  if tensor.tensor_content:
    if len(tensor.tensor_content) != 4 * size:
      return None
    return np.frombuffer(tensor.tensor_content, '<f4').reshape(shape)
  values = np.array(tensor.float_val, np.float32)
  if not 0 < len(values) <= size:
    return None
  # TensorFlow may leave out the repetitions of the last value.
  return np.pad(values, (0, size - len(values)), 'edge').reshape(shape)


def _error(fault: str) -> UserError:
  return UserError(
    f'{fault}; fetch {URL} yourself and name it with --inception_weights=FILE.'
  )
