"""A bucket of Google Cloud Storage on the loopback interface, with faults.

It answers the requests of gcsfs and those with which TensorFlow reads, others
with 400. TensorFlow's endpoints are compiled in, so the same port is an HTTPS
proxy that plays them.
"""

import contextlib
import dataclasses
import datetime
import fnmatch
import http.server
import json
import multiprocessing
from multiprocessing import managers
import random
import re
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.parse
import uuid

BUCKET = 'bucket'

# Names in an answer; the service has at most 1,000.
_MAX_PAGE = 100
ACCOUNT = 'tester@project.iam.gserviceaccount.com'

# Methods of HTTP, path, method of the JSON API and the permissions it needs:
# https://cloud.google.com/storage/docs/access-control/iam-json
_B = r'/storage/v1/b/([^/]+)'
_O = f'{_B}/o/([^/]+)'
_XML = r'/(?!storage/)([^/]+)/(.+)'
_GET, _UPDATE = 'storage.objects.get', 'storage.objects.update'
_ROUTES = (
  ('GET', _B, 'buckets.get', 'storage.buckets.get'),
  ('GET', f'{_B}/o', 'objects.list', 'storage.objects.list'),
  ('GET', f'(?:/download)?{_O}', 'objects.get', _GET),
  ('POST PUT', f'/upload{_B}/o', 'objects.insert', 'storage.objects.create'),
  ('PATCH', _O, 'objects.patch', f'{_GET} {_UPDATE}'),
  ('DELETE', _O, 'objects.delete', 'storage.objects.delete'),
  ('GET', _XML, 'objects.get', _GET),
)


@dataclasses.dataclass(frozen=True)
class Faults:
  """Deviations from a fast, reliable and permissive service."""

  latency_ms: float = 0  # Of each answer.
  writes_per_second: float = 0  # Of one object; more get 429. 0: no limit.
  unavailable: float = 0  # Share of requests that get 503.
  # Patterns of permissions that the account lacks (403).
  denied_permissions: tuple[str, ...] = ()
  # By a regular expression, searched in 'objects.insert bucket/folder/object':
  # a status code, 'close' (without an answer), or 'hang' (until removed).
  answers: dict[str, int | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class LogEntry:
  """A request: its method of the JSON API, and the answer's status."""

  client: str
  method: str = ''
  object: str = ''
  status: int = 0
  permissions: tuple[str, ...] = ()


class _Error(Exception):
  """The status and the message of an answer."""


class _NoAnswer(Exception):
  """The connection is closed instead."""


class Server:
  """A bucket, and the answers to requests."""

  def __init__(self):
    # Metadata and content of each object, and the requests in order.
    self.objects: dict[str, tuple[dict[str, str], bytes]] = {}
    self.log: list[LogEntry] = []
    self._uploads, self._written = {}, {}
    self._lock, self._random = threading.RLock(), random.Random(0)
    self.set_faults()
    self._folder = tempfile.TemporaryDirectory()
    self._certificate = f'{self._folder.name}/certificate.pem'
    key = f'{self._folder.name}/key.pem'
    hosts = 'DNS:www.googleapis.com,DNS:storage.googleapis.com'
    command = (
      'openssl req -x509 -nodes -newkey ec -pkeyopt '
      f'ec_paramgen_curve:prime256v1 -subj /CN=bucket -keyout {key} '
      f'-out {self._certificate} -addext subjectAltName={hosts}'
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    self._http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    self._http.daemon_threads, self._http.block_on_close = True, False
    self._http.handle_error = lambda *unused_args: None  # Clients that left.
    self._http.bucket = self
    self._http.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self._http.tls.load_cert_chain(self._certificate, key)
    self.url = f'http://127.0.0.1:{self._http.server_port}'
    threading.Thread(target=self._http.serve_forever, daemon=True).start()

  def close(self):
    self.set_faults()
    self._http.shutdown()
    self._http.server_close()
    self._folder.cleanup()

  def environment(self) -> dict[str, str]:
    """Variables that send all clients to the server, without credentials."""
    return {
      # TensorFlow.
      'https_proxy': self.url,
      'no_proxy': '127.0.0.1,localhost',
      'CURL_CA_BUNDLE': self._certificate,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
      # gcsfs.
      'STORAGE_EMULATOR_HOST': self.url,
      # No user's credentials, and no metadata server.
      'GOOGLE_APPLICATION_CREDENTIALS': '',
      'CLOUDSDK_CONFIG': self._folder.name,
      'NO_GCE_CHECK': 'true',
    }

  def set_faults(self, **faults):
    """Replaces all faults by these fields of `Faults`."""
    self._faults = Faults(**faults)

  def write(self, name: str, data: bytes):
    """Creates or replaces an object, without a request."""
    metadata = {
      'name': name,
      'generation': str(time.time_ns()),
      'updated': _now(),
      'size': str(len(data)),
    }
    self.objects[name] = metadata, data

  def answer(self, method, url, headers, body) -> tuple[int, dict, bytes]:
    """Status, headers and body of the answer to a request."""
    time.sleep(self._faults.latency_ms / 1000)
    with self._lock:
      is_available = self._random.random() >= self._faults.unavailable
    if url.partition('?')[0] == '/batch/storage/v1':
      return self._batch(headers, body) if is_available else (503, {}, b'{}')
    return self._answer(method, url, headers, body, is_available)

  def _answer(self, method, url, headers, body, is_available=True):
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query))
    if '/b/' not in parts.path:
      query['alt'] = 'media'  # The XML API.
    entry = LogEntry(headers.get('User-Agent', ''))
    self.log.append(entry)
    try:
      bucket, name = self._route(method, parts.path, entry)
      entry.object = name = name or self._upload_name(query, headers, body)
      self._fail(f'{entry.method} {bucket}/{name}', is_available)
      self._require(*entry.permissions)
      if bucket != BUCKET:
        raise _Error(404, 'The specified bucket does not exist.')
      with self._lock:
        handle = getattr(self, '_' + entry.method.replace('.', '_'))
        answer = handle(entry, query, headers, body)
    except _Error as error:
      status, message = error.args
      answer = _json({'error': {'code': status, 'message': message}}, status)
    entry.status = answer[0]
    return answer

  def _route(self, method, path, entry) -> tuple[str, str]:
    for methods, pattern, name, permissions in _ROUTES:
      match = re.fullmatch(pattern, path)
      if match and method in methods.split():
        entry.method, entry.permissions = name, tuple(permissions.split())
        found = [urllib.parse.unquote(part) for part in match.groups()]
        return found[0], ''.join(found[1:])
    raise _Error(400, f'bucket_server.py has no {method} {path}')

  def _fail(self, where, is_available):
    def answer():
      found = self._faults.answers.items()
      return next((a for p, a in found if re.search(p, where)), None)

    fault = answer() if is_available else 503
    while answer() == 'hang':
      time.sleep(0.02)
    if fault in ('hang', 'close'):
      raise _NoAnswer
    if fault:
      raise _Error(fault, f'{ACCOUNT} does not have access, or status {fault}.')

  def _require(self, *permissions):
    for pattern in self._faults.denied_permissions:
      if denied := fnmatch.filter(permissions, pattern):
        raise _Error(403, f'{ACCOUNT} does not have {denied[0]} access.')

  def _find(self, name, query) -> dict[str, str]:
    metadata, _ = self.objects.get(name, ({}, b''))
    if metadata and metadata['generation'] == query.get(
      'generation', metadata['generation']
    ):
      return metadata
    raise _Error(404, f'No such object: {BUCKET}/{name}')

  def _limit_rate(self, name):
    limit, now = self._faults.writes_per_second, time.monotonic()
    if limit and now - self._written.get(name, -limit) < 1 / limit:
      raise _Error(429, f'The object {name} exceeded the rate limit.')
    self._written[name] = now

  def _objects_list(self, entry, query, headers, body):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '\0')
    found = {}
    for name in sorted(self.objects):
      if name.startswith(prefix):
        head, is_folder, _ = name[len(prefix) :].partition(delimiter)
        metadata = None if is_folder else self.objects[name][0]
        found[prefix + head + is_folder] = metadata
    names = [name for name in found if name > query.get('pageToken', '')]
    page = names[:_MAX_PAGE]
    listing = {
      'kind': 'storage#objects',
      'items': [found[name] for name in page if found[name]],
      'prefixes': [name for name in page if not found[name]],
    }
    if len(page) < len(names):
      listing['nextPageToken'] = page[-1]
    return _json(listing)

  def _objects_get(self, entry, query, headers, body):
    metadata = self._find(entry.object, query)
    data = self.objects[entry.object][1]
    if query.get('alt') != 'media':
      return _json(metadata)
    match = re.fullmatch(r'bytes=(\d+)-(\d*)', headers.get('Range', ''))
    if not match:
      return 200, {}, data
    begin = int(match[1])
    part = data[begin : int(match[2]) + 1 if match[2] else None]
    if not part:
      raise _Error(416, 'Requested range not satisfiable')
    place = f'bytes {begin}-{begin + len(part) - 1}/{len(data)}'
    return 206, {'Content-Range': place}, part

  def _upload_name(self, query, headers, body) -> str:
    if 'upload_id' in query:
      return self._uploads[query['upload_id']][0]
    if query.get('uploadType') == 'multipart':
      return json.loads(next(_parts(headers, body))[1])['name']
    if query.get('uploadType') == 'resumable':
      return json.loads(body)['name']
    return ''

  def _objects_insert(self, entry, query, headers, body):
    """https://cloud.google.com/storage/docs/performing-resumable-uploads."""
    name = entry.object
    if query['uploadType'] == 'multipart':
      (_, data) = list(_parts(headers, body))[1]
    elif 'upload_id' not in query:
      upload_id = uuid.uuid4().hex
      self._uploads[upload_id] = name, bytearray()
      path = f'/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable'
      return 200, {'Location': f'{self.url}{path}&upload_id={upload_id}'}, b''
    else:
      data = self._uploads[query['upload_id']][1]
      place = headers.get('Content-Range', '')
      begin = re.match(r'bytes (\d+)-', place)
      data[int(begin[1]) if begin else len(data) :] = body
      if place.endswith('/*'):
        return 308, {'Range': f'bytes=0-{len(data) - 1}'}, b''
    if name in self.objects:
      # Replacing an object needs more than creating it.
      entry.permissions += ('storage.objects.delete',)
      self._require('storage.objects.delete')
      if query.get('ifGenerationMatch') == '0':
        raise _Error(412, 'At least one of the pre-conditions did not hold.')
    self._limit_rate(name)
    self.write(name, bytes(data))
    return _json(self.objects[name][0])

  def _objects_patch(self, entry, query, headers, body):
    metadata = self._find(entry.object, query)
    self._limit_rate(entry.object)
    metadata['updated'] = _now()
    return _json(metadata)

  def _objects_delete(self, entry, query, headers, body):
    self._find(entry.object, query)
    self._limit_rate(entry.object)
    del self.objects[entry.object]
    return 204, {}, b''

  def _batch(self, headers, body):
    """https://cloud.google.com/storage/docs/batch."""
    boundary, answers = f'batch_{uuid.uuid4().hex}', b''
    for _, part in _parts(headers, body):
      method, url = part.decode().split()[:2]
      status, _, content = self._answer(method, url, headers, b'')
      head = f'--{boundary}\r\nContent-Type: application/http\r\n\r\n'
      head += f'HTTP/1.1 {status} .\r\nContent-Length: {len(content)}\r\n\r\n'
      answers += head.encode() + content + b'\r\n'
    kind = {'Content-Type': f'multipart/mixed; boundary={boundary}'}
    return 200, kind, answers + f'--{boundary}--\r\n'.encode()


def _now() -> str:
  return f'{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}'


def _json(content, status=200):
  kind = {'Content-Type': 'application/json'}
  return status, kind, json.dumps(content).encode()


def _parts(headers, body):
  """Headers and content of each part of a multipart request."""
  boundary = re.search(r'boundary=["\']?([^"\';]+)', headers['Content-Type'])
  delimiter = re.escape(boundary[1].encode())
  parts = re.split(rb'(?:^|\r?\n)--' + delimiter + rb'(?:--)?\s*?\r?\n?', body)
  for part in parts[1:]:
    match = re.search(rb'\r?\n\r?\n', part)
    if match:
      yield part[: match.start()], part[match.end() :]


class _Handler(http.server.BaseHTTPRequestHandler):
  """A connection: HTTP, or HTTPS after CONNECT."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def log_message(self, *args):
    pass

  def do_CONNECT(self):
    self.wfile.write(b'HTTP/1.1 200 Connection established\r\n\r\n')
    tls = self.server.tls
    self.connection = tls.wrap_socket(self.connection, server_side=True)
    self.rfile = self.connection.makefile('rb')
    self.wfile = self.connection.makefile('wb', buffering=0)
    self.close_connection = False

  def _answer(self):
    with contextlib.suppress(_NoAnswer, OSError):
      body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
      status, headers, content = self.server.bucket.answer(
        self.command, self.path, self.headers, body
      )
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      if status != 204:
        self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content)
      return
    self.close_connection = True

  do_DELETE = do_GET = do_PATCH = do_POST = do_PUT = _answer


class _Manager(managers.BaseManager):
  """Another process, which benchmarks need: threads would share their GIL."""


_Manager.register('Server', Server)


@contextlib.contextmanager
def serve_in_process():
  """A server in a process of its own."""
  with _Manager(ctx=multiprocessing.get_context('spawn')) as manager:
    yield manager.Server()
