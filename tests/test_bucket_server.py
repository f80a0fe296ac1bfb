"""The storage server of tests: the service's documented answers, and that the
real clients work with it, in processes of their own."""

import base64
import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import random
import subprocess
import sys
import textwrap
import time
import urllib.parse

import pytest

from tests import bucket_server


def request(server, method, path, body=b'', **headers):
  """(status, headers, body) of a request without a client library."""
  connection = http.client.HTTPConnection(server.url.removeprefix('http://'))
  names = {name.replace('_', '-'): value for name, value in headers.items()}
  with contextlib.closing(connection):
    connection.request(method, path, body, names)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def upload(server, name, data=b'data', **query):
  query = urllib.parse.urlencode({'uploadType': 'media', 'name': name, **query})
  path = f'/upload/storage/v1/b/bucket/o?{query}'
  status, _, body = request(server, 'POST', path, data)
  return status, json.loads(body)


def get(server, path):
  status, _, body = request(server, 'GET', '/storage/v1/b' + path)
  return status, json.loads(body)


def delete(server, name, query=''):
  path = f'/storage/v1/b/bucket/o/{name}{query}'
  return request(server, 'DELETE', path)[0]


def run_client(server, script, **environment):
  """Runs a client's script; returns what it printed last, from JSON."""
  environment = (
    os.environ
    | bucket_server.environment(server)
    | {'TF_CPP_MIN_LOG_LEVEL': '3'}
    | environment
  )
  process = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script)],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout.splitlines()[-1])


# The service.


def test_resource(storage_server):
  # The check value of CRC-32C is 0xE3069283, of RFC 3720's polynomial.
  status, resource = upload(storage_server, 'a/b', b'123456789')
  assert status == 200
  assert resource['crc32c'] == base64.b64encode(b'\xe3\x06\x92\x83').decode()
  digest = hashlib.md5(b'123456789').digest()
  assert base64.b64decode(resource['md5Hash']) == digest
  assert resource['name'] == 'a/b'
  assert resource['size'] == '9'
  assert resource['metageneration'] == '1'
  assert resource['timeCreated'] == resource['updated']
  assert get(storage_server, '/bucket/o/a%2Fb') == (200, resource)
  _, newer = upload(storage_server, 'a/b')
  assert int(newer['generation']) > int(resource['generation'])
  assert newer['etag'] != resource['etag']


def test_metadata_patch_keeps_the_generation(storage_server):
  _, old = upload(storage_server, 'a')
  path = '/storage/v1/b/bucket/o/a'
  request(storage_server, 'PATCH', path, b'{"metadata": {"x": "1", "y": "2"}}')
  request(storage_server, 'PATCH', path, b'{"metadata": {"x": null}}')
  _, new = get(storage_server, '/bucket/o/a')
  assert new['metadata'] == {'y': '2'}
  assert new['generation'] == old['generation']
  assert new['metageneration'] == '3'
  assert new['timeCreated'] == old['timeCreated'] < new['updated']


@pytest.mark.parametrize(
  'path',
  [
    '/bucket/a',
    '/download/storage/v1/b/bucket/o/a',
    '/storage/v1/b/bucket/o/a?alt=media',
  ],
)
@pytest.mark.parametrize(
  ('asked', 'expected'),
  [
    ('bytes=2-4', slice(2, 5)),
    ('bytes=90-', slice(90, None)),
    ('bytes=-7', slice(-7, None)),
    ('bytes=95-200', slice(95, 100)),
  ],
)
def test_ranges(storage_server, path, asked, expected):
  data = bytes(range(100))
  storage_server.write('bucket', 'a', data)
  status, headers, body = request(storage_server, 'GET', path, Range=asked)
  assert (status, body) == (206, data[expected])
  begin, end, _ = expected.indices(100)
  assert headers['Content-Range'] == f'bytes {begin}-{end - 1}/100'
  assert headers['Date']


def test_range_after_the_end(storage_server):
  storage_server.write('bucket', 'a', b'123')
  answer = request(storage_server, 'GET', '/bucket/a', Range='bytes=3-')
  assert answer[0] == 416


def test_preconditions(storage_server):
  assert upload(storage_server, 'a', ifGenerationMatch=0)[0] == 200
  status, answer = upload(storage_server, 'a', ifGenerationMatch=0)
  assert status == answer['error']['code'] == 412
  message = 'At least one of the pre-conditions you specified did not hold.'
  assert answer['error']['message'] == message
  _, resource = get(storage_server, '/bucket/o/a')
  generation = int(resource['generation'])
  assert delete(storage_server, 'a', '?ifGenerationMatch=1') == 412
  assert delete(storage_server, 'a', '?ifMetagenerationMatch=2') == 412
  path = f'/storage/v1/b/bucket/o/a?ifGenerationNotMatch={generation}'
  assert request(storage_server, 'GET', path)[0] == 304
  assert upload(storage_server, 'a', ifGenerationMatch=generation)[0] == 200
  assert upload(storage_server, 'a', ifGenerationMatch=generation)[0] == 412


def test_one_of_many_concurrent_creations_succeeds(storage_server):
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    statuses = pool.map(
      lambda _: upload(storage_server, 'a', ifGenerationMatch=0)[0], range(40)
    )
  assert sorted(statuses) == [200] + [412] * 39


def test_wrong_checksum(storage_server):
  body = (
    b'--b\r\nContent-Type: application/json\r\n\r\n'
    b'{"name": "a", "crc32c": "AAAAAA=="}\r\n'
    b'--b\r\nContent-Type: text/plain\r\n\r\ndata\r\n--b--\r\n'
  )
  path = '/upload/storage/v1/b/bucket/o?uploadType=multipart'
  content_type = 'multipart/related; boundary=b'
  answer = request(
    storage_server, 'POST', path, body, Content_Type=content_type
  )
  assert answer[0] == 400
  assert not storage_server.sizes('bucket')


def test_resumable_upload(storage_server):
  path = '/upload/storage/v1/b/bucket/o?uploadType=resumable&name=a'
  status, headers, _ = request(storage_server, 'POST', path)
  assert status == 200
  session = headers['Location'].removeprefix(storage_server.url)

  def put(body, content_range):
    answer = request(
      storage_server, 'PUT', session, body, Content_Range=content_range
    )
    return answer[0], answer[1]['Range']

  assert put(b'', 'bytes */10') == (308, None)
  assert put(b'0123', 'bytes 0-3/*') == (308, 'bytes=0-3')
  assert put(b'', 'bytes */*') == (308, 'bytes=0-3')
  assert not storage_server.sizes('bucket')
  # A client that missed the answer repeats a part.
  assert put(b'23456', 'bytes 2-6/10') == (308, 'bytes=0-6')
  assert put(b'789', 'bytes 7-9/10') == (200, None)
  assert put(b'', 'bytes */10') == (200, None)
  assert storage_server.read('bucket', 'a') == b'0123456789'


@pytest.mark.parametrize('page_size', [1, 2, 3, 1000])
@pytest.mark.parametrize('delimiter', ['', '/'])
@pytest.mark.parametrize('prefix', ['', 'a', 'a/', 'b/c/'])
def test_listing(storage_server, prefix, delimiter, page_size):
  names = ['a', 'a/', 'a/1', 'a/2/3', 'a/2/4', 'a0', 'b/c/d', 'b/c/é', 'z']
  for name in names:
    storage_server.write('bucket', name, b'')
  expected, folders = [], set()
  for name in names:
    if name.startswith(prefix):
      rest = name.removeprefix(prefix)
      if delimiter and delimiter in rest:
        folders.add(prefix + rest[: rest.index(delimiter) + 1])
      else:
        expected.append(name)
  listed, prefixes, token = [], [], ''
  while token is not None:
    query = urllib.parse.urlencode(
      {
        'prefix': prefix,
        'delimiter': delimiter,
        'maxResults': page_size,
        'pageToken': token,
      }
    )
    _, page = get(storage_server, f'/bucket/o?{query}')
    listed += [item['name'] for item in page.get('items', [])]
    prefixes += page.get('prefixes', [])
    token = page.get('nextPageToken')
  assert listed == expected
  assert prefixes == sorted(folders)


def test_listing_with_offsets_and_markers(storage_server):
  for name in ('a', 'b/', 'b/1', 'c', 'd'):
    storage_server.write('bucket', name, b'')
  query = '?startOffset=b&endOffset=d&delimiter=/&includeTrailingDelimiter=true'
  _, page = get(storage_server, '/bucket/o' + query)
  assert [item['name'] for item in page['items']] == ['b/', 'c']
  assert page['prefixes'] == ['b/']


def test_missing_things(storage_server):
  message = 'The specified bucket does not exist.'
  for path in ('/none', '/none/o', '/none/o/a'):
    status, answer = get(storage_server, path)
    assert status == answer['error']['code'] == 404
    assert answer['error']['message'] == message
  status, answer = get(storage_server, '/bucket/o/a')
  assert status == 404
  assert answer['error']['message'] == 'No such object: bucket/a'
  assert request(storage_server, 'GET', '/bucket/a')[0] == 404


def test_unknown_requests_are_not_ignored(storage_server):
  assert get(storage_server, '/bucket/acl')[0] == 400
  assert get(storage_server, '/bucket/o?matchGlob=*')[0] == 400


def test_storage_layout(storage_server):
  _, layout = get(storage_server, '/bucket/storageLayout')
  assert layout['hierarchicalNamespace'] == {'enabled': False}


def test_large_object_in_ranges(storage_server):
  data = random.Random(0).randbytes(2**20) * 100
  storage_server.write('bucket', 'large', data)
  size = 8 * 2**20

  def read(begin):
    asked = f'bytes={begin}-{begin + size - 1}'
    return request(storage_server, 'GET', '/bucket/large', Range=asked)[2]

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert b''.join(pool.map(read, range(0, len(data), size))) == data


# Permissions and faults.


def test_permissions(storage_server):
  upload(storage_server, 'a')
  assert storage_server.permissions() == {'storage.objects.create'}
  upload(storage_server, 'a')
  assert storage_server.permissions() == {
    'storage.objects.create',
    'storage.objects.delete',
  }
  storage_server.clear_log()
  get(storage_server, '/bucket')
  get(storage_server, '/bucket/o')
  get(storage_server, '/bucket/o/a')
  assert [entry.permissions for entry in storage_server.log()] == [
    ('storage.buckets.get',),
    ('storage.objects.list',),
    ('storage.objects.get',),
  ]


def test_log(storage_server):
  upload(storage_server, 'a', b'12345')
  get(storage_server, '/bucket/o/b')
  first, second = storage_server.log()
  assert (first.method, first.http_method) == ('objects.insert', 'POST')
  assert (first.bucket, first.object) == ('bucket', 'a')
  assert (first.status, first.bytes_received) == (200, 5)
  assert (second.method, second.status) == ('objects.get', 404)
  assert second.bytes_sent > 0


def test_denied_permission(storage_server):
  storage_server.set_faults(denied_permissions=('storage.objects.delete',))
  assert upload(storage_server, 'a', b'1')[0] == 200
  status, answer = upload(storage_server, 'a', b'2')
  assert status == answer['error']['code'] == 403
  assert answer['error']['errors'][0]['reason'] == 'forbidden'
  expected = (
    'does not have storage.objects.delete access to the Google Cloud Storage '
    "object. Permission 'storage.objects.delete' denied on resource (or it may "
    'not exist).'
  )
  assert answer['error']['message'].endswith(expected)
  assert delete(storage_server, 'a') == 403
  assert storage_server.read('bucket', 'a') == b'1'


def test_without_list_permission_missing_objects_are_denied(storage_server):
  # https://cloud.google.com/storage/docs/json_api/v1/status-codes
  storage_server.set_faults(denied_permissions=('*.list',))
  assert get(storage_server, '/bucket/o')[0] == 403
  assert get(storage_server, '/bucket/o/a')[0] == 403


def test_write_limit(storage_server):
  storage_server.set_faults(writes_per_second=0.001)
  assert upload(storage_server, 'a')[0] == 200
  assert upload(storage_server, 'b')[0] == 200
  status, answer = upload(storage_server, 'a')
  assert status == 429
  assert answer['error']['errors'][0]['reason'] == 'rateLimitExceeded'
  assert answer['error']['message'] == (
    'The object bucket/a exceeded the rate limit for object mutation '
    'operations (create, update, and delete). Please reduce your request rate. '
    'See https://cloud.google.com/storage/docs/gcs429.'
  )
  assert delete(storage_server, 'a') == 429
  assert get(storage_server, '/bucket/o/a')[0] == 200
  storage_server.set_faults()
  assert delete(storage_server, 'a') == 204


def test_unavailable_requests_follow_the_seed(storage_server):
  def statuses(**faults):
    storage_server.set_faults(**faults)
    return [get(storage_server, '/bucket')[0] for _ in range(100)]

  first = statuses(unavailable=0.3, seed=1)
  assert set(first) == {200, 503}
  # Five standard deviations of a binomial distribution.
  assert abs(first.count(503) - 30) < 5 * (100 * 0.3 * 0.7) ** 0.5
  assert statuses(unavailable=0.3, seed=1) == first
  assert statuses(unavailable=0.3, seed=2) != first
  assert set(statuses()) == {200}


def test_answers(storage_server):
  answers = {
    r'objects\.insert bucket/a': 403,
    'bucket/c': 'close',
    'bucket/d': 401,
  }
  storage_server.set_faults(answers=answers)
  status, answer = upload(storage_server, 'a')
  assert status == 403
  assert "'storage.objects.create' denied" in answer['error']['message']
  assert upload(storage_server, 'b')[0] == 200
  status, answer = get(storage_server, '/bucket/o/d')
  assert status == 401
  assert answer['error']['message'].startswith('Anonymous caller does not have')
  with pytest.raises(http.client.RemoteDisconnected):
    get(storage_server, '/bucket/o/c')
  assert storage_server.log()[-1].status == 0
  assert storage_server.faults().answers == answers


def test_hanging_request(storage_server):
  storage_server.set_faults(answers={'buckets.get': 'hang'})
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    hanging = pool.submit(get, storage_server, '/bucket')
    with pytest.raises(concurrent.futures.TimeoutError):
      hanging.result(0.3)
    storage_server.set_faults()
    with pytest.raises(http.client.RemoteDisconnected):
      hanging.result()


def test_latency(storage_server):
  storage_server.set_faults(latency_ms=100)
  begin = time.monotonic()
  get(storage_server, '/bucket')
  assert time.monotonic() - begin >= 0.1


def test_process():
  with bucket_server.serve_in_process(('one', 'two')) as server:
    server.write('two', 'a b/ü', b'1')
    assert server.read('two', 'a b/ü') == b'1'
    assert server.sizes('two') == {'a b/ü': 1}
    assert server.sizes('one') == {}
    server.delete('two', 'a b/ü')
    with pytest.raises(KeyError):
      server.read('two', 'a b/ü')
    assert os.path.exists(server.certificate)
  assert not os.path.exists(server.certificate)


# Clients.


def test_tensorflow(storage_server):
  result = run_client(
    storage_server,
    """
    import json
    import tensorflow as tf
    gfile = tf.io.gfile
    with gfile.GFile('gs://bucket/d/a.txt', 'w') as file:
      file.write('text')
    with tf.io.TFRecordWriter('gs://bucket/d/r.tfrecord') as writer:
      for i in range(100):
        writer.write(b'%d' % i * 1000)
    records = tf.data.TFRecordDataset('gs://bucket/d/r.tfrecord')
    gfile.makedirs('gs://bucket/e/f')
    gfile.rename('gs://bucket/d/a.txt', 'gs://bucket/e/b.txt')
    result = {
      'records': [len(r) for r in records.as_numpy_iterator()],
      'exists': [gfile.exists(f'gs://bucket/{n}') for n in ('d', 'e', 'x')],
      'listed': sorted(gfile.listdir('gs://bucket/e')),
      'glob': gfile.glob('gs://bucket/*/*.tfrecord'),
      'text': gfile.GFile('gs://bucket/e/b.txt').read(),
      'length': gfile.stat('gs://bucket/e/b.txt').length,
    }
    gfile.rmtree('gs://bucket/d')
    print(json.dumps(result))
    """,
  )
  assert result == {
    'records': [len(str(i)) * 1000 for i in range(100)],
    'exists': [True, True, False],
    'listed': ['b.txt', 'f/'],
    'glob': ['gs://bucket/d/r.tfrecord'],
    'text': 'text',
    'length': 4,
  }
  sizes = storage_server.sizes('bucket')
  assert sizes == {'e/': 0, 'e/b.txt': 4, 'e/f/': 0}


def test_tensorstore(storage_server):
  result = run_client(
    storage_server,
    """
    import json
    import numpy as np
    import tensorstore as ts
    store = ts.KvStore.open({'driver': 'gcs', 'bucket': 'bucket'}).result()
    first = store.write('k/a', b'one').result().generation
    second = store.write('k/a', b'two', if_equal=first).result().generation
    stale = store.write('k/a', b'three', if_equal=first).result().generation
    store.write('k/b', b'1').result()
    unchanged = store.read('k/a', if_not_equal=second).result()
    listed = [key.decode() for key in store.list().result()]
    read = store.read('k/a').result().value.decode()
    store.delete_range(ts.KvStore.KeyRange('k/', 'k0')).result()
    spec = {
      'driver': 'zarr3',
      'kvstore': {'driver': 'ocdbt', 'base': 'gs://bucket/o/'},
    }
    values = np.arange(10000, dtype=np.int32).reshape(100, 100)
    array = ts.open(spec, dtype='int32', shape=(100, 100), create=True).result()
    array[...] = values
    again = ts.open(spec).result().read().result()
    print(json.dumps({
      'written': [bool(first), bool(second), bool(stale)],
      'unchanged': unchanged.state,
      'listed': sorted(listed),
      'read': read,
      'left': len(store.list(ts.KvStore.KeyRange('k/', 'k0')).result()),
      'array': bool((again == values).all()),
    }))
    """,
  )
  assert result == {
    # tensorstore's generation of a write whose condition failed is empty.
    'written': [True, True, False],
    'unchanged': 'unspecified',
    'listed': ['k/a', 'k/b'],
    'read': 'two',
    'left': 0,
    'array': True,
  }
  assert 'o/manifest.ocdbt' in storage_server.sizes('bucket')


def test_google_cloud_storage(storage_server):
  result = run_client(
    storage_server,
    """
    import json
    from google.api_core import exceptions
    from google.cloud import storage
    client = storage.Client()
    bucket = client.bucket('bucket')
    blob = bucket.blob('x/y')
    blob.upload_from_string(b'one', if_generation_match=0)
    try:
      blob.upload_from_string(b'two', if_generation_match=0)
    except exceptions.PreconditionFailed as error:
      refused = error.code
    blob.upload_from_string(b'three', if_generation_match=blob.generation)
    large = bucket.blob('large', chunk_size=2**20)
    large.upload_from_string(b'x' * 10_000_000)
    large.metadata = {'key': 'value'}
    large.patch()
    composed = bucket.blob('composed')
    composed.compose([blob, large])
    bucket.rename_blob(blob, 'x/z')
    listed = [b.name for b in client.list_blobs('bucket')]
    x_only = client.list_blobs('bucket', delimiter='/')
    list(x_only)
    result = {
      'refused': refused,
      'listed': listed,
      'prefixes': list(x_only.prefixes),
      'read': bucket.blob('x/z').download_as_text(),
      'part': bucket.blob('x/z').download_as_bytes(start=1, end=2).decode(),
      'large': len(large.download_as_bytes()),
      'composed': composed.size,
      'metageneration': large.metageneration,
      'exists': [bucket.exists(), client.bucket('none').exists()],
    }
    with client.batch():
      bucket.delete_blob('large')
      bucket.delete_blob('composed')
    try:
      bucket.delete_blob('large')
    except exceptions.NotFound as error:
      result['missing'] = error.message.split(': ', 1)[1]
    print(json.dumps(result))
    """,
  )
  assert result == {
    'refused': 412,
    'listed': ['composed', 'large', 'x/z'],
    'prefixes': ['x/'],
    'read': 'three',
    'part': 'hr',
    'large': 10_000_000,
    'composed': 10_000_005,
    'metageneration': 2,
    'exists': [True, False],
    'missing': 'No such object: bucket/large',
  }
  assert storage_server.sizes('bucket') == {'x/z': 5}
  assert any(entry.method == 'batch' for entry in storage_server.log())


def test_gcsfs(storage_server):
  result = run_client(
    storage_server,
    """
    import json
    import fsspec
    files = fsspec.filesystem('gs')
    with files.open('gs://bucket/f/a', 'wb') as file:
      file.write(b'abc')
    with files.open('gs://bucket/f/large', 'wb') as file:
      for i in range(12):
        file.write(bytes([i]) * 1_000_000)
    files.pipe({f'bucket/h/{i}': b'1' for i in range(3)})
    files.mv('bucket/f/a', 'bucket/g/a')
    try:
      with files.open('bucket/g/a', 'xb') as file:
        file.write(b'other')
    except FileExistsError:
      refused = True
    with files.open('bucket/f/large', 'rb') as file:
      file.seek(6_999_999)
      part = list(file.read(2))
    batch = fsspec.asyn.sync(
      files.loop, files._rm_files, ['bucket/h/0', 'bucket/none'])
    result = {
      'read': files.cat('bucket/g/a').decode(),
      'part': part,
      'refused': refused,
      'types': [files.info(f'bucket/f{n}')['type'] for n in ('', '/large')],
      'size': files.size('bucket/f/large'),
      'exists': [files.exists(f'bucket/{n}') for n in ('f', 'f/a', 'g/a')],
      'ls': sorted(files.ls('bucket', detail=False)),
      'find': files.find('bucket'),
      'batch': [str(batch[0]), 'No such object' in str(batch[1])],
    }
    files.rm('bucket/f', recursive=True)
    print(json.dumps(result))
    """,
  )
  assert result == {
    'read': 'abc',
    'part': [6, 7],
    'refused': True,
    'types': ['directory', 'file'],
    'size': 12_000_000,
    'exists': [True, False, True],
    'ls': ['bucket/f', 'bucket/g', 'bucket/h'],
    'find': ['bucket/f/large', 'bucket/g/a', 'bucket/h/1', 'bucket/h/2'],
    'batch': ['bucket/h/0', True],
  }
  assert set(storage_server.sizes('bucket')) == {'g/a', 'h/1', 'h/2'}
  assert 308 in {entry.status for entry in storage_server.log()}


def test_epath_without_tensorflow(storage_server):
  result = run_client(
    storage_server,
    """
    import json
    import sys
    from etils import epath
    folder = epath.Path('gs://bucket/run')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'a.txt').write_text('text')
    (folder / 'a.txt').rename(folder / 'b.txt')
    (folder / 'sub' / 'c').write_bytes(b'1')
    result = {
      'text': (folder / 'b.txt').read_text(),
      'listed': sorted(path.name for path in folder.iterdir()),
      'exists': [(folder / n).exists() for n in ('a.txt', 'b.txt', 'sub')],
      'length': (folder / 'b.txt').stat().length,
      'glob': [path.name for path in folder.glob('*.txt')],
    }
    (folder / 'sub').rmtree()
    result['tensorflow'] = 'tensorflow' in sys.modules
    print(json.dumps(result))
    """,
    EPATH_USE_TF='0',
  )
  assert result == {
    'text': 'text',
    'listed': ['b.txt', 'sub'],
    'exists': [False, True, True],
    'length': 4,
    'glob': ['b.txt'],
    'tensorflow': False,
  }
  assert storage_server.sizes('bucket') == {'run/b.txt': 4}
