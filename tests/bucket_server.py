"""Google Cloud Storage on the loopback interface.

  with bucket_server.serve(buckets=('bucket',)) as server:
    environment = os.environ | bucket_server.environment(server)
    subprocess.run(command, env=environment, check=True)
    server.set_faults(latency_ms=50, writes_per_second=1)
    print(server.permissions(), server.read('bucket', 'folder/object'))

  python tests/bucket_server.py --port=4443 --buckets=bucket

The JSON API v1 and the XML API's object requests, as far as TensorFlow,
tensorstore, google-cloud-storage and gcsfs use them. Other requests are
answered with 400. One port speaks HTTP and is also an HTTPS proxy that plays
www.googleapis.com and storage.googleapis.com, because TensorFlow's endpoints
are compiled in. Objects are kept in memory.
"""

import argparse
import base64
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import datetime
import fnmatch
import hashlib
import http.client
import http.server
import json
import os
import pathlib
import random
import re
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any
from unittest import mock
import urllib.parse
import uuid

import google_crc32c

ACCOUNT = 'tester@project.iam.gserviceaccount.com'

# The permissions of each JSON method:
# https://cloud.google.com/storage/docs/access-control/iam-json
# Replacing an object also needs storage.objects.delete (its footnote 7).
# The XML API's requests need those of the corresponding JSON method.
_PERMISSIONS = {
  'buckets.delete': ('storage.buckets.delete',),
  'buckets.get': ('storage.buckets.get',),
  'buckets.getStorageLayout': ('storage.objects.list',),
  'buckets.insert': ('storage.buckets.create',),
  'buckets.list': ('storage.buckets.list',),
  'objects.compose': ('storage.objects.get', 'storage.objects.create'),
  'objects.copy': ('storage.objects.get', 'storage.objects.create'),
  'objects.delete': ('storage.objects.delete',),
  'objects.get': ('storage.objects.get',),
  'objects.insert': ('storage.objects.create',),
  'objects.list': ('storage.objects.list',),
  'objects.move': (
    'storage.objects.get',
    'storage.objects.delete',
    'storage.objects.create',
  ),
  'objects.patch': ('storage.objects.get', 'storage.objects.update'),
  'objects.rewrite': ('storage.objects.get', 'storage.objects.create'),
}

_BUCKET = r'/storage/v1/b/(?P<bucket>[^/]+)'
_OBJECT = _BUCKET + r'/o/(?P<object>[^/]+)'
_NAME = r'/o/(?P<to_object>[^/]+)'
_TARGET = r'/b/(?P<to_bucket>[^/]+)' + _NAME
_XML_OBJECT = (
  r'/(?!storage/|upload/|download/|batch/)(?P<bucket>[^/]+)/(?P<object>.+)'
)
# (HTTP methods, path, JSON method)
_ROUTES = tuple(
  (methods.split(), re.compile(path), name)
  for methods, path, name in (
    ('GET', '/storage/v1/b', 'buckets.list'),
    ('POST', '/storage/v1/b', 'buckets.insert'),
    ('GET', _BUCKET, 'buckets.get'),
    ('DELETE', _BUCKET, 'buckets.delete'),
    ('GET', _BUCKET + '/storageLayout', 'buckets.getStorageLayout'),
    ('GET', _BUCKET + '/o', 'objects.list'),
    ('POST PUT DELETE', f'(?:/resumable)?/upload{_BUCKET}/o', 'objects.insert'),
    ('GET', '(?:/download)?' + _OBJECT, 'objects.get'),
    ('PATCH', _OBJECT, 'objects.patch'),
    ('DELETE', _OBJECT, 'objects.delete'),
    ('POST', _OBJECT + '/compose', 'objects.compose'),
    ('POST', _OBJECT + '/copyTo' + _TARGET, 'objects.copy'),
    ('POST', _OBJECT + '/moveTo' + _NAME, 'objects.move'),
    ('POST', _OBJECT + '/rewriteTo' + _TARGET, 'objects.rewrite'),
    ('GET HEAD', _XML_OBJECT, 'objects.get'),
    ('PUT', _XML_OBJECT, 'objects.insert'),
    ('DELETE', _XML_OBJECT, 'objects.delete'),
  )
)
_UNSUPPORTED_PARAMETERS = ('matchGlob', 'softDeleted', 'versions')


@dataclasses.dataclass(frozen=True)
class Faults:
  """Deviations from a fast, reliable and permissive service.

  Attributes:
    latency_ms: Delay of each answer.
    writes_per_second: Limit of creations, updates and deletions of one object;
      those above it are answered with 429. 0 is no limit.
    unavailable: Share of requests answered with 503.
    seed: Of the sequence that chooses them.
    denied_permissions: Patterns (fnmatch) of permissions that the account
      lacks. Requests that need one are answered with 403.
    answers: From a regular expression, searched in 'METHOD BUCKET/OBJECT'
      such as 'objects.insert bucket/folder/object', to a status code (401 is
      the answer to requests without credentials), or to
      'close' (the connection is closed without an answer) or 'hang' (there is
      no answer until this entry is removed, and then the connection closes).
  """

  latency_ms: float = 0
  writes_per_second: float = 0
  unavailable: float = 0
  seed: int = 0
  denied_permissions: tuple[str, ...] = ()
  answers: Mapping[str, int | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class LogEntry:
  """A request and its outcome.

  Attributes:
    time: Of arrival, in seconds since the epoch.
    method: Of the JSON API, such as 'objects.insert'; 'batch' for a batch,
      which is followed by an entry for each of its parts.
    http_method: Such as 'POST'.
    host: The host that the client asked for.
    client: Its user agent.
    bucket: Its name, or ''.
    object: Its name, or ''; the target's, if an object is copied or composed.
    status: Of the answer; 0 if there was none.
    bytes_received: Size of the request's body.
    bytes_sent: Size of the answer's body.
    permissions: The IAM permissions that the request needs.
  """

  time: float
  http_method: str
  host: str
  client: str
  bytes_received: int
  method: str = ''
  bucket: str = ''
  object: str = ''
  status: int = 0
  bytes_sent: int = 0
  permissions: tuple[str, ...] = ()


@dataclasses.dataclass
class _Request:
  method: str
  url: str
  headers: Mapping[str, str]
  body: bytes | bytearray
  scheme: str = 'http'

  def __post_init__(self):
    parts = urllib.parse.urlsplit(self.url)
    self.path = parts.path
    self.query = dict(urllib.parse.parse_qsl(parts.query, True))

  @property
  def is_xml(self) -> bool:
    return bool(re.fullmatch(_XML_OBJECT, self.path))

  @property
  def is_media(self) -> bool:
    is_download = self.path.startswith('/download/')
    return self.is_xml or is_download or self.query.get('alt') == 'media'

  def json(self) -> dict[str, Any]:
    return json.loads(self.body or b'{}')


@dataclasses.dataclass
class _Response:
  status: int = 200
  body: bytes | memoryview = b''
  headers: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _json_response(value: Any, status: int = 200) -> _Response:
  headers = {'Content-Type': 'application/json; charset=UTF-8'}
  return _Response(status, json.dumps(value).encode(), headers)


class _Error(Exception):
  """An answer that is not a success; messages and reasons are the service's."""

  def __init__(self, status, message, reason, domain='global'):
    super().__init__(message)
    self.status, self.message = status, message
    self.reason, self.domain = reason, domain

  def response(self, request: _Request) -> _Response:
    if self.status == 304:
      return _Response(304)
    if request.is_xml:
      text = (
        "<?xml version='1.0' encoding='UTF-8'?><Error>"
        f'<Code>{self.reason}</Code><Message>{self.message}</Message></Error>'
      )
      headers = {'Content-Type': 'application/xml; charset=UTF-8'}
      return _Response(self.status, text.encode(), headers)
    if request.is_media and self.status == 404:
      headers = {'Content-Type': 'text/html; charset=UTF-8'}
      return _Response(self.status, self.message.encode(), headers)
    details = {
      'message': self.message,
      'domain': self.domain,
      'reason': self.reason,
    }
    error = {
      'code': self.status,
      'message': self.message,
      'errors': [details],
    }
    return _json_response({'error': error}, self.status)


def _standard_error(status: int, where: str = '') -> _Error:
  """The service's error for a status code."""
  conditions = 'At least one of the pre-conditions you specified did not hold.'
  rate = (
    f'The object {where} exceeded the rate limit for object mutation '
    'operations (create, update, and delete). Please reduce your request rate. '
    'See https://cloud.google.com/storage/docs/gcs429.'
  )
  internal = 'We encountered an internal error. Please try again.'
  errors = {
    304: ('Not Modified', 'notModified'),
    404: (f'No such object: {where}', 'notFound'),
    410: ('The upload session is gone.', 'gone'),
    412: (conditions, 'conditionNotMet'),
    416: ('Requested range not satisfiable', 'requestedRangeNotSatisfiable'),
    429: (rate, 'rateLimitExceeded', 'usageLimits'),
    500: (internal, 'backendError'),
    503: (internal, 'backendError'),
  }
  return _Error(status, *errors.get(status, (f'Status {status}', 'fault')))


def _denied(permission: str, is_anonymous: bool = False) -> _Error:
  of_bucket = 'bucket' in permission or permission == 'storage.objects.list'
  resource = 'bucket' if of_bucket else 'object'
  message = (
    f'{"Anonymous caller" if is_anonymous else ACCOUNT} does not have '
    f'{permission} access to the Google Cloud Storage {resource}. Permission '
    f"'{permission}' denied on resource (or it may not exist)."
  )
  status, reason = (401, 'required') if is_anonymous else (403, 'forbidden')
  return _Error(status, message, reason)


def _not_implemented(what: str) -> _Error:
  # A status of 501 would be retried by clients.
  return _Error(400, f'bucket_server.py has no {what}', 'notImplemented')


class _NoAnswer(Exception):
  """The connection is to be closed."""


def _now() -> str:
  now = datetime.datetime.now(datetime.UTC)
  return now.strftime('%Y-%m-%dT%H:%M:%S.%fZ')


def _digests(data) -> dict[str, str]:
  crc32c = struct.pack('>I', google_crc32c.value(bytes(data)))
  return {
    'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
    'crc32c': base64.b64encode(crc32c).decode(),
  }


@dataclasses.dataclass(frozen=True)
class _Object:
  """An object's data and metadata.

  Attributes:
    digests: md5Hash and crc32c as in the resource; composed objects have no
      md5Hash.
    attributes: Metadata that clients set, such as contentType and metadata.
  """

  data: bytes
  digests: Mapping[str, str]
  attributes: Mapping[str, Any]
  generation: int
  created: str
  updated: str
  metageneration: int = 1

  @property
  def etag(self) -> str:
    versions = f'{self.generation}/{self.metageneration}'
    return base64.b64encode(versions.encode()).decode()

  def resource(self, bucket: str, name: str) -> dict[str, Any]:
    return {
      'contentType': 'application/octet-stream',
      **self.attributes,
      **self.digests,
      'kind': 'storage#object',
      'id': f'{bucket}/{name}/{self.generation}',
      'name': name,
      'bucket': bucket,
      'generation': str(self.generation),
      'metageneration': str(self.metageneration),
      'timeCreated': self.created,
      'updated': self.updated,
      'storageClass': 'STANDARD',
      'size': str(len(self.data)),
      'etag': self.etag,
    }


@dataclasses.dataclass
class _Upload:
  """A resumable upload's session."""

  bucket: str
  object: str
  attributes: Mapping[str, Any]
  query: Mapping[str, str]
  data: bytearray = dataclasses.field(default_factory=bytearray)
  finished: _Response | None = None


class _Service:
  """Buckets and what requests do to them."""

  def __init__(self, buckets):
    self.buckets: dict[str, dict[str, _Object]] = {b: {} for b in buckets}
    self.log: list[LogEntry] = []
    self.closed = False
    self._lock = threading.RLock()
    self._uploads: dict[str, _Upload] = {}
    self._last_generation = 0
    self._last_write: dict[tuple[str, str], float] = {}
    self.set_faults({})

  # Faults.

  def set_faults(self, faults: Mapping[str, Any]):
    self.faults = Faults(**faults)
    self._random = random.Random(self.faults.seed)

  def _injected(self, entry: LogEntry) -> int | str | None:
    where = f'{entry.method} {entry.bucket}/{entry.object}'
    for pattern, answer in self.faults.answers.items():
      if re.search(pattern, where):
        return answer
    return None

  def _inject(self, entry: LogEntry):
    answer = self._injected(entry)
    if answer == 'hang':
      while self._injected(entry) == 'hang' and not self.closed:
        time.sleep(0.02)
    if answer in ('hang', 'close'):
      raise _NoAnswer
    if answer in (401, 403):
      raise _denied(entry.permissions[0], is_anonymous=answer == 401)
    if answer is not None:
      raise _standard_error(answer, f'{entry.bucket}/{entry.object}')

  def _lacks(self, permission: str) -> bool:
    patterns = self.faults.denied_permissions
    return any(fnmatch.fnmatchcase(permission, p) for p in patterns)

  def _require(self, *permissions: str):
    """Raises 403 if the account lacks one of the permissions."""
    for permission in filter(self._lacks, permissions):
      raise _denied(permission)

  def _limit_rate(self, bucket: str, name: str):
    limit = self.faults.writes_per_second
    now = time.monotonic()
    last = self._last_write.get((bucket, name))
    if limit and last is not None and now - last < 1 / limit:
      raise _standard_error(429, f'{bucket}/{name}')
    self._last_write[bucket, name] = now

  # Answers.

  def answer(self, request: _Request) -> _Response:
    """Answers a request from a connection.

    Raises:
      _NoAnswer: If the connection is to be closed instead.
    """
    if self.faults.latency_ms:
      time.sleep(self.faults.latency_ms / 1000)
    with self._lock:
      chance = self._random.random()
    unavailable = chance < self.faults.unavailable
    if request.method == 'POST' and request.path == '/batch/storage/v1':
      return self._batch(request, unavailable)
    return self._answer_one(request, unavailable)

  def _answer_one(self, request, unavailable=False) -> _Response:
    entry = self._log_entry(request)
    response = None
    try:
      method, groups = self._route(request)
      entry.method, entry.permissions = method, _PERMISSIONS[method]
      entry.bucket = groups.get('to_bucket', groups.get('bucket', ''))
      entry.object = groups.get('to_object', groups.get('object', ''))
      if method == 'objects.insert' and not entry.object:
        entry.object = self._upload_name(request)
      if unavailable:
        raise _standard_error(503)
      self._inject(entry)
      self._require(*entry.permissions)
      handle = getattr(self, '_' + method.replace('.', '_'))
      response = handle(request, entry, **groups)
    except _Error as error:
      response = error.response(request)
    finally:
      if response is not None:
        entry.status, entry.bytes_sent = response.status, len(response.body)
      self.log.append(entry)
    return response

  def _log_entry(self, request: _Request) -> LogEntry:
    return LogEntry(
      time=time.time(),
      http_method=request.method,
      host=request.headers.get('Host', ''),
      client=request.headers.get('User-Agent', ''),
      bytes_received=len(request.body),
    )

  def _route(self, request: _Request) -> tuple[str, dict[str, str]]:
    for methods, pattern, method in _ROUTES:
      match = pattern.fullmatch(request.path)
      if match and request.method in methods:
        groups = match.groupdict().items()
        return method, {k: urllib.parse.unquote(v) for k, v in groups}
    raise _not_implemented(f'{request.method} {request.url}')

  def _batch(self, request: _Request, unavailable: bool) -> _Response:
    """https://cloud.google.com/storage/docs/batch."""
    entry = self._log_entry(request)
    entry.method = 'batch'
    self.log.append(entry)
    if unavailable:
      entry.status = 503
      return _standard_error(503).response(request)
    boundary = f'batch_{uuid.uuid4().hex}'
    body = b''
    for part_headers, part in _parts(request):
      head, _, content = _partition(part.lstrip(b'\r\n'))
      line, _, lines = head.partition(b'\n')
      method, url = line.decode().split()[:2]
      headers = _headers(lines)
      response = self._answer_one(_Request(method, url, headers, content))
      phrase = http.client.responses.get(response.status, '')
      content_id = part_headers.get('Content-ID', '').replace('<', '<response-')
      lines = {
        'Content-Length': len(response.body),
        **response.headers,
      }.items()
      body += (
        f'--{boundary}\r\nContent-Type: application/http\r\n'
        f'Content-ID: {content_id}\r\n\r\n'
        f'HTTP/1.1 {response.status} {phrase}\r\n'
        + ''.join(f'{name}: {value}\r\n' for name, value in lines)
        + '\r\n'
      ).encode()
      body += bytes(response.body) + b'\r\n'
    body += f'--{boundary}--\r\n'.encode()
    entry.status, entry.bytes_sent = 200, len(body)
    headers = {'Content-Type': f'multipart/mixed; boundary={boundary}'}
    return _Response(200, body, headers)

  # Buckets.

  def _bucket(self, bucket: str) -> dict[str, _Object]:
    if bucket not in self.buckets:
      raise _Error(404, 'The specified bucket does not exist.', 'notFound')
    return self.buckets[bucket]

  def _bucket_resource(self, bucket: str) -> dict[str, Any]:
    return {
      'kind': 'storage#bucket',
      'id': bucket,
      'name': bucket,
      'location': 'US-CENTRAL1',
      'locationType': 'region',
      'storageClass': 'STANDARD',
      'metageneration': '1',
      'timeCreated': '2026-01-01T00:00:00.000Z',
      'updated': '2026-01-01T00:00:00.000Z',
    }

  def _buckets_list(self, request, entry):
    items = [self._bucket_resource(b) for b in sorted(self.buckets)]
    return _json_response({'kind': 'storage#buckets', 'items': items})

  def _buckets_insert(self, request, entry):
    bucket = entry.bucket = request.json()['name']
    with self._lock:
      if bucket in self.buckets:
        message = (
          'Your previous request to create the named bucket succeeded and you '
          'already own it.'
        )
        raise _Error(409, message, 'conflict')
      self.buckets[bucket] = {}
    return _json_response(self._bucket_resource(bucket))

  def _buckets_get(self, request, entry, bucket):
    self._bucket(bucket)
    return _json_response(self._bucket_resource(bucket))

  def _buckets_delete(self, request, entry, bucket):
    with self._lock:
      if self._bucket(bucket):
        message = 'The bucket you tried to delete is not empty.'
        raise _Error(409, message, 'conflict')
      del self.buckets[bucket]
    return _Response(204)

  def _buckets_getStorageLayout(self, request, entry, bucket):
    self._bucket(bucket)
    layout = {
      'kind': 'storage#storageLayout',
      'bucket': bucket,
      'location': 'US-CENTRAL1',
      'locationType': 'region',
      'hierarchicalNamespace': {'enabled': False},
    }
    return _json_response(layout)

  # Reads of objects.

  def _object(self, request, bucket: str, name: str) -> _Object:
    """The object, if it has the generation in the request's query.

    Raises:
      _Error: 404, or 403 if the account must not know which objects exist.
    """
    found = self._bucket(bucket).get(name)
    generation = request.query.get('generation')
    if found is None or generation not in (None, str(found.generation)):
      self._require('storage.objects.list')
      if request.is_xml:
        raise _Error(404, 'The specified key does not exist.', 'NoSuchKey')
      raise _standard_error(404, f'{bucket}/{name}')
    return found

  def _objects_list(self, request, entry, bucket):
    query = request.query
    for parameter in _UNSUPPORTED_PARAMETERS:
      if query.get(parameter, 'false').lower() != 'false':
        raise _not_implemented(parameter)
    with self._lock:
      objects = dict(self._bucket(bucket))
    prefix = query.get('prefix', '')
    delimiter = query.get('delimiter', '')
    with_marker = query.get('includeTrailingDelimiter', '').lower() == 'true'
    limit = min(int(query.get('maxResults') or 1000), 1000)
    # A token is the name or prefix that the page before ended with.
    after = base64.urlsafe_b64decode(query.get('pageToken', '')).decode()
    items, prefixes, last, token = [], [], '', None
    for name in sorted(objects):
      if not name.startswith(prefix) or name < query.get('startOffset', ''):
        continue
      if query.get('endOffset') and name >= query['endOffset']:
        continue
      head, found, _ = name[len(prefix) :].partition(delimiter or '\0')
      folder = prefix + head + found if delimiter and found else None
      is_marker = with_marker and name == folder
      result = folder or name
      if result == last or result <= after:
        continue  # Listed already, here or on the page before.
      if len(items) + len(prefixes) >= limit:
        token = base64.urlsafe_b64encode(last.encode()).decode()
        break
      if folder:
        prefixes.append(folder)
      if not folder or is_marker:
        items.append(objects[name].resource(bucket, name))
      last = result
    listing = {'kind': 'storage#objects'}
    if items:
      listing['items'] = items
    if prefixes:
      listing['prefixes'] = prefixes
    if token:
      listing['nextPageToken'] = token
    return _json_response(listing)

  def _objects_get(self, request, entry, bucket, object):
    found = self._object(request, bucket, object)
    _check_preconditions(request.query, found)
    if not request.is_media:
      return _json_response(found.resource(bucket, object))
    updated = datetime.datetime.fromisoformat(found.updated)
    hashes = {
      name.removesuffix('Hash'): value for name, value in found.digests.items()
    }
    content_type = 'application/octet-stream'
    headers = {
      'Accept-Ranges': 'bytes',
      'Content-Type': found.attributes.get('contentType', content_type),
      'ETag': f'"{found.etag}"' if request.is_xml else found.etag,
      'Last-Modified': updated.strftime('%a, %d %b %Y %H:%M:%S GMT'),
      'X-Goog-Generation': found.generation,
      'X-Goog-Metageneration': found.metageneration,
      'X-Goog-Hash': ','.join(f'{k}={v}' for k, v in hashes.items()),
      'X-Goog-Stored-Content-Encoding': 'identity',
      'X-Goog-Stored-Content-Length': len(found.data),
      'X-Goog-Storage-Class': 'STANDARD',
    }
    size = len(found.data)
    match = re.fullmatch(r'bytes=(\d*)-(\d*)', request.headers.get('Range', ''))
    if not match or match[0] == 'bytes=-':
      return _Response(200, memoryview(found.data), headers)
    if match[1]:
      begin = int(match[1])
      end = min(int(match[2]) + 1, size) if match[2] else size
    else:
      begin, end = max(size - int(match[2]), 0), size
    if begin >= end:
      raise _standard_error(416)
    headers['Content-Range'] = f'bytes {begin}-{end - 1}/{size}'
    return _Response(206, memoryview(found.data)[begin:end], headers)

  # Writes of objects.

  def _write(self, entry, data, digests, attributes, query) -> _Object:
    """Creates or replaces the entry's object."""
    bucket, name = entry.bucket, entry.object
    for digest in ('md5Hash', 'crc32c'):
      expected = attributes.get(digest) or digests.get(digest)
      if digests.get(digest) not in (None, expected):
        message = f'Provided {digest} "{expected}" does not match.'
        raise _Error(400, message, 'invalid')
    mutable = ('contentType', 'metadata', 'cacheControl', 'contentEncoding')
    attributes = {k: attributes[k] for k in mutable if attributes.get(k)}
    with self._lock:
      self._require_for_write(entry)
      _check_preconditions(query, self._bucket(bucket).get(name))
      self._limit_rate(bucket, name)
      return self._store(bucket, name, data, digests, attributes)

  def _require_for_write(self, entry):
    """Replacing an object needs one permission more than creating it."""
    if entry.object in self._bucket(entry.bucket):
      entry.permissions += ('storage.objects.delete',)
      self._require('storage.objects.delete')

  def _store(self, bucket: str, name: str, data, digests, attributes):
    """Creates or replaces an object; the lock must be held."""
    generation = max(self._last_generation + 1, time.time_ns() // 1000)
    self._last_generation = generation
    now = _now()
    written = _Object(data, digests, attributes, generation, now, now)
    self.buckets[bucket][name] = written
    return written

  def put(self, bucket: str, name: str, data: bytes):
    """Writes an object without a request."""
    digests = _digests(data)
    with self._lock:
      self._store(bucket, name, data, digests, {})

  def _upload_name(self, request) -> str:
    upload = self._uploads.get(request.query.get('upload_id', ''))
    if upload:
      return upload.object
    if 'name' in request.query:
      return request.query['name']
    if request.query.get('uploadType') == 'multipart':
      return json.loads(next(_parts(request))[1])['name']
    return request.json()['name']

  def _objects_insert(self, request, entry, bucket, object=''):
    query, data = request.query, request.body
    attributes = {'contentType': request.headers.get('Content-Type')}
    if 'upload_id' in query:
      return self._continue_upload(request, entry)
    if query.get('uploadType') == 'resumable':
      with self._lock:
        self._require_for_write(entry)
        found = self._bucket(bucket).get(entry.object)
        _check_preconditions(query, found)
      attributes = request.json()
      content_type = request.headers.get('X-Upload-Content-Type')
      attributes.setdefault('contentType', content_type)
      upload_id = uuid.uuid4().hex
      upload = _Upload(bucket, entry.object, attributes, query)
      self._uploads[upload_id] = upload
      path = urllib.parse.quote(bucket, safe='')
      location = (
        f'{request.scheme}://{request.headers.get("Host")}/upload/storage/v1/'
        f'b/{path}/o?uploadType=resumable&upload_id={upload_id}'
      )
      return _Response(200, b'', {'Location': location})
    if query.get('uploadType') == 'multipart':
      (_, metadata), (headers, data) = _parts(request)
      attributes = {'contentType': headers.get('Content-Type')}
      attributes |= json.loads(metadata)
    data = bytes(data)
    written = self._write(entry, data, _digests(data), attributes, query)
    if request.is_xml:
      headers = {
        'ETag': f'"{written.etag}"',
        'X-Goog-Generation': written.generation,
      }
      return _Response(200, b'', headers)
    return _json_response(written.resource(bucket, entry.object))

  def _continue_upload(self, request, entry):
    """https://cloud.google.com/storage/docs/performing-resumable-uploads."""
    upload = self._uploads.get(request.query['upload_id'])
    if upload is None:
      raise _standard_error(410)
    if request.method == 'DELETE':
      del self._uploads[request.query['upload_id']]
      return _Response(499)
    if upload.finished:
      return upload.finished
    text = request.headers.get('Content-Range', '')
    match = re.fullmatch(r'bytes (?:\*|(\d+)-\d+)/(\*|\d+)', text)
    total = int(match[2]) if match and match[2] != '*' else None
    begin = int(match[1]) if match and match[1] else len(upload.data)
    if begin > len(upload.data):
      raise _standard_error(503)
    upload.data[begin:] = request.body
    is_partial = match and (total is None or len(upload.data) < total)
    if is_partial:
      headers = {'X-GUploader-UploadID': request.query['upload_id']}
      if upload.data:
        headers['Range'] = f'bytes=0-{len(upload.data) - 1}'
      return _Response(308, b'', headers)
    data = bytes(upload.data)
    written = self._write(
      entry, data, _digests(data), upload.attributes, upload.query
    )
    upload.data = bytearray()
    resource = written.resource(upload.bucket, upload.object)
    upload.finished = _json_response(resource)
    return upload.finished

  def _objects_delete(self, request, entry, bucket, object):
    with self._lock:
      found = self._object(request, bucket, object)
      _check_preconditions(request.query, found)
      self._limit_rate(bucket, object)
      del self.buckets[bucket][object]
    return _Response(204)

  def _objects_patch(self, request, entry, bucket, object):
    changes = request.json()
    with self._lock:
      found = self._object(request, bucket, object)
      _check_preconditions(request.query, found)
      self._limit_rate(bucket, object)
      merged = _merge(found.attributes, changes)
      found = self.buckets[bucket][object] = dataclasses.replace(
        found,
        attributes=merged,
        metageneration=found.metageneration + 1,
        updated=_now(),
      )
    return _json_response(found.resource(bucket, object))

  def _copy(self, request, entry, bucket, object):
    source = self._object(request, bucket, object)
    return self._write(
      entry, source.data, source.digests, source.attributes, request.query
    ).resource(entry.bucket, entry.object)

  def _objects_copy(self, request, entry, bucket, object, **target):
    return _json_response(self._copy(request, entry, bucket, object))

  def _objects_move(self, request, entry, bucket, object, **target):
    with self._lock:
      self._limit_rate(bucket, object)
      resource = self._copy(request, entry, bucket, object)
      del self.buckets[bucket][object]
    return _json_response(resource)

  def _objects_rewrite(self, request, entry, bucket, object, **target):
    resource = self._copy(request, entry, bucket, object)
    rewrite = {
      'kind': 'storage#rewriteResponse',
      'totalBytesRewritten': resource['size'],
      'objectSize': resource['size'],
      'done': True,
      'resource': resource,
    }
    return _json_response(rewrite)

  def _objects_compose(self, request, entry, bucket, object):
    body = request.json()
    names = [source['name'] for source in body['sourceObjects']]
    plain = _Request('POST', request.path, {}, b'')
    data = b''.join(self._object(plain, bucket, n).data for n in names)
    digests = {'crc32c': _digests(data)['crc32c']}
    attributes = body.get('destination', {})
    written = self._write(entry, data, digests, attributes, request.query)
    resource = written.resource(bucket, object)
    return _json_response(resource | {'componentCount': len(names)})


def _check_preconditions(query, found: _Object | None):
  """https://cloud.google.com/storage/docs/request-preconditions."""
  versions = {
    'Generation': found.generation if found else 0,
    'Metageneration': found.metageneration if found else 0,
  }
  for name, version in versions.items():
    expected = query.get(f'if{name}Match')
    if expected is not None and int(expected) != version:
      raise _standard_error(412)
    other = query.get(f'if{name}NotMatch')
    if other is not None and int(other) == version:
      raise _standard_error(304 if found else 412)


def _merge(old: Mapping[str, Any], changes: Mapping[str, Any]):
  """Patch semantics: None removes a field, dictionaries are merged."""
  merged = dict(old)
  for key, value in changes.items():
    if isinstance(value, dict):
      value = _merge(merged.get(key) or {}, value)
    merged[key] = value
  return {key: value for key, value in merged.items() if value is not None}


def _partition(part: bytes) -> tuple[bytes, bytes, bytes]:
  """Splits at the first empty line; gcsfs ends its lines with LF alone."""
  match = re.search(rb'\r?\n\r?\n', part)
  if match is None:
    return part, b'', b''
  return part[: match.start()], match[0], part[match.end() :]


def _headers(lines: bytes) -> dict[str, str]:
  rows = (line.partition(':') for line in lines.decode().splitlines())
  return {name.strip().title(): value.strip() for name, _, value in rows}


def _parts(request: _Request) -> Iterator[tuple[Mapping[str, str], bytes]]:
  """Headers and content of each part of a multipart request."""
  content_type = request.headers['Content-Type']
  boundary = re.search(r'boundary="?\'?([^"\';]+)', content_type)[1].encode()
  body = b'\n' + bytes(request.body)
  delimiter = re.compile(rb'\r?\n--' + re.escape(boundary) + rb'(?:--)?[ \t]*')
  ends = list(delimiter.finditer(body))
  for begin, end in zip(ends, ends[1:], strict=False):
    part = body[begin.end() : end.start()]
    head, _, content = _partition(re.sub(rb'^\r?\n', b'', part, count=1))
    headers = {k.title(): v for k, v in _headers(head).items()}
    headers['Content-ID'] = headers.get('Content-Id', '')
    yield headers, content


class _Handler(http.server.BaseHTTPRequestHandler):
  """A connection: HTTP, or HTTPS after CONNECT."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  server: '_HttpServer'

  def log_message(self, *args):
    pass

  def do_CONNECT(self):
    self.wfile.write(b'HTTP/1.1 200 Connection established\r\n\r\n')
    tls = self.server.tls
    self.connection = tls.wrap_socket(self.connection, server_side=True)
    self.server.connections.add(self.connection)
    self.rfile = self.connection.makefile('rb')
    self.wfile = socketserver._SocketWriter(self.connection)
    self.close_connection = False

  def finish(self):
    super().finish()
    self.server.connections.discard(self.connection)
    self.connection.close()

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = bytearray()
    while size := int(self.rfile.readline().split(b';')[0], 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _answer(self):
    is_tls = isinstance(self.connection, ssl.SSLSocket)
    scheme = 'https' if is_tls else 'http'
    body = self._body()
    request = _Request(self.command, self.path, self.headers, body, scheme)
    try:
      if request.path.startswith('/_'):
        response = self.server.control(request)
      else:
        response = self.server.service.answer(request)
    except _NoAnswer:
      self.close_connection = True
      return
    phrase = http.client.responses.get(response.status, '')
    headers = {'Date': self.date_time_string(), 'Server': 'UploadServer'}
    headers |= response.headers
    if response.status not in (204, 304):
      headers['Content-Length'] = len(response.body)
    lines = [f'HTTP/1.1 {response.status} {phrase}']
    lines += [f'{name}: {value}' for name, value in headers.items()]
    head = '\r\n'.join((*lines, '', '')).encode()
    content = response.body if self.command != 'HEAD' else b''
    if len(content) < 2**16:
      self.wfile.write(head + bytes(content))
    else:
      self.wfile.write(head)
      self.wfile.write(content)

  do_DELETE = do_GET = do_HEAD = do_PATCH = do_POST = do_PUT = _answer


class _HttpServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
  """Connections, and the interface that `Server` uses under /_."""

  daemon_threads = True
  block_on_close = False
  request_queue_size = 128

  def __init__(self, port: int, buckets, folder: pathlib.Path):
    super().__init__(('127.0.0.1', port), _Handler)
    self.service = _Service(buckets)
    self.connections: set[socket.socket] = set()
    self.certificate = folder / 'certificate.pem'
    key = folder / 'key.pem'
    names = (
      'DNS:www.googleapis.com,DNS:storage.googleapis.com,'
      'DNS:localhost,IP:127.0.0.1'
    )
    command = 'openssl req -x509 -nodes -days 30 -newkey ec'.split()
    command += ['-pkeyopt', 'ec_paramgen_curve:prime256v1']
    command += ['-keyout', str(key), '-out', str(self.certificate)]
    command += ['-subj', '/CN=bucket server']
    command += ['-addext', f'subjectAltName={names}']
    subprocess.run(command, check=True, capture_output=True)
    self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self.tls.load_cert_chain(self.certificate, key)

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_port}'

  def process_request(self, request, client_address):
    self.connections.add(request)
    super().process_request(request, client_address)

  def shutdown_request(self, request):
    self.connections.discard(request)
    super().shutdown_request(request)

  def handle_error(self, request, client_address):
    # Clients close connections when they please.
    if not isinstance(sys.exception(), OSError):
      super().handle_error(request, client_address)

  def close(self):
    """Stops listening and closes all connections."""
    self.service.closed = True
    self.shutdown()
    self.server_close()
    for connection in list(self.connections):
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)

  def control(self, request: _Request) -> _Response:
    """Answers `Server`, with 404 if there is no such bucket or object."""
    try:
      return self._control(request)
    except KeyError:
      return _Response(404)

  def _control(self, request: _Request) -> _Response:
    service = self.service
    parts = request.path.split('/', 3)[1:]
    parts = [urllib.parse.unquote(part) for part in parts]
    match request.method, *parts:
      case 'GET', '_faults':
        pass
      case 'PUT', '_faults':
        service.set_faults(request.json())
      case 'GET', '_log':
        return _json_response([dataclasses.asdict(e) for e in service.log])
      case 'DELETE', '_log':
        service.log.clear()
      case 'GET', '_objects', bucket:
        objects = service.buckets[bucket]
        return _json_response({k: len(v.data) for k, v in objects.items()})
      case 'GET', '_objects', bucket, name:
        return _Response(200, service.buckets[bucket][name].data)
      case 'PUT', '_objects', bucket, name:
        service.put(bucket, name, bytes(request.body))
      case 'DELETE', '_objects', bucket, name:
        del service.buckets[bucket][name]
      case _:
        raise KeyError(request.path)
    return _json_response(dataclasses.asdict(service.faults))


@dataclasses.dataclass(frozen=True)
class Server:
  """A running server. Its methods are neither logged nor subject to faults.

  Attributes:
    url: Such as http://127.0.0.1:4443.
    certificate: File with the certificate that HTTPS clients must trust.
  """

  url: str
  certificate: str

  def _call(self, method: str, path: str, body: bytes = b'') -> bytes:
    host = self.url.removeprefix('http://')
    with contextlib.closing(http.client.HTTPConnection(host)) as connection:
      connection.request(method, path, body)
      response = connection.getresponse()
      content = response.read()
    if response.status != 200:
      raise KeyError(path)
    return content

  def faults(self) -> Faults:
    """The faults in force."""
    return Faults(**json.loads(self._call('GET', '/_faults')))

  def set_faults(self, **faults):
    """Replaces all faults by these fields of `Faults`; none removes them."""
    values = dataclasses.asdict(Faults(**faults))
    self._call('PUT', '/_faults', json.dumps(values).encode())

  def log(self) -> list[LogEntry]:
    """Requests since the start or `clear_log`, in the order they ended."""
    entries = json.loads(self._call('GET', '/_log'))
    return [
      LogEntry(**entry | {'permissions': tuple(entry['permissions'])})
      for entry in entries
    ]

  def clear_log(self):
    """Forgets the requests so far."""
    self._call('DELETE', '/_log')

  def permissions(self) -> set[str]:
    """The IAM permissions that the logged requests need."""
    return {p for entry in self.log() for p in entry.permissions}

  def sizes(self, bucket: str) -> dict[str, int]:
    """The size in bytes of each object."""
    return json.loads(self._call('GET', f'/_objects/{bucket}'))

  def _path(self, bucket: str, name: str) -> str:
    return f'/_objects/{bucket}/{urllib.parse.quote(name)}'

  def read(self, bucket: str, name: str) -> bytes:
    """An object's data."""
    return self._call('GET', self._path(bucket, name))

  def write(self, bucket: str, name: str, data: bytes):
    """Creates or replaces an object."""
    self._call('PUT', self._path(bucket, name), data)

  def delete(self, bucket: str, name: str):
    """Deletes an object."""
    self._call('DELETE', self._path(bucket, name))


@contextlib.contextmanager
def serve(buckets=('bucket',), port: int = 0) -> Iterator[Server]:
  """A server in threads of this process; port 0 takes a free one."""
  with tempfile.TemporaryDirectory() as folder:
    http_server = _HttpServer(port, buckets, pathlib.Path(folder))
    thread = threading.Thread(target=http_server.serve_forever, args=(0.05,))
    thread.start()
    try:
      yield Server(http_server.url, str(http_server.certificate))
    finally:
      http_server.close()
      thread.join()


@contextlib.contextmanager
def serve_in_process(buckets=('bucket',), port: int = 0) -> Iterator[Server]:
  """A server in a process of its own, as benchmarks need."""
  command = [sys.executable, __file__, f'--port={port}']
  command += [f'--buckets={",".join(buckets)}']
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    yield Server(**json.loads(process.stdout.readline()))
  finally:
    process.terminate()
    process.wait()
    process.stdout.close()


def environment(server: Server) -> dict[str, str]:
  """Variables that send every client to the server, without credentials."""
  return {
    # TensorFlow; the token is also tensorstore's.
    'https_proxy': server.url,
    # The processes of one run find each other without it.
    'no_proxy': '127.0.0.1,localhost',
    'CURL_CA_BUNDLE': server.certificate,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
    # tensorstore, as Orbax uses it.
    'TENSORSTORE_GCS_HTTP_URL': server.url,
    # google-cloud-storage and gcsfs.
    'STORAGE_EMULATOR_HOST': server.url,
    # No user's credentials, and no metadata server (169.254.169.254).
    'GOOGLE_APPLICATION_CREDENTIALS': '',
    'CLOUDSDK_CONFIG': os.path.dirname(server.certificate),
    'NO_GCE_CHECK': 'true',
    # gcsfs would ask by gRPC which kind of bucket it is.
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
  }


@contextlib.contextmanager
def clients_sent_to(server: Server) -> Iterator[None]:
  """A context in which this process's clients, and its children's, use it."""
  with mock.patch.dict(os.environ, environment(server)):
    yield


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--port', type=int, default=4443, help='0: a free one')
  parser.add_argument('--buckets', default='bucket', help='comma-separated')
  arguments = parser.parse_args()
  # The certificate's folder is removed at the end.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit())
  with serve(arguments.buckets.split(','), arguments.port) as server:
    print(json.dumps(dataclasses.asdict(server)), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      threading.Event().wait()


if __name__ == '__main__':
  main()
