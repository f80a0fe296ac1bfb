"""A server on loopback with which the Hugging Face hub's client works."""

import base64
import hashlib
import http.server
import json
import re

COMMIT = 'c0ffee' * 6 + 'c0ff'


class Hub(http.server.ThreadingHTTPServer):
  """As much of the hub as its client asks for: one model, one commit.

  Attributes:
    files: contents by name in the model's repository.
    blobs: contents that were sent by Git LFS, by their SHA-256.
    cards: model cards that the client had validated.
  """

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.server_port}'
    self.files: dict[str, bytes] = {}
    self.blobs: dict[str, bytes] = {}
    self.cards: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers of the hub, each by the shape of its path."""

  protocol_version = 'HTTP/1.1'
  server: Hub

  def log_message(self, *args):
    pass

  def _body(self):
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def _answer(self, content=None, status=200, **headers):
    body = content if isinstance(content, bytes) else json.dumps(content)
    body = body if isinstance(body, bytes) else body.encode()
    self.send_response(status)
    headers.setdefault('Content_Type', 'application/json')
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def do_POST(self):
    body, path, server = self._body(), self.path, self.server
    if path == '/api/repos/create':
      self._answer({'url': f'{server.url}/me/faces', 'name': 'me/faces'})
    elif path == '/api/validate-yaml':
      server.cards.append(json.loads(body)['content'])
      self._answer({'errors': [], 'warnings': []})
    elif '/preupload/' in path:
      files = [
        {
          'path': f['path'],
          'uploadMode': 'regular' if f['path'].endswith('.md') else 'lfs',
          'shouldIgnore': False,
        }
        for f in json.loads(body)['files']
      ]
      self._answer({'files': files})
    elif path.endswith('/info/lfs/objects/batch'):
      objects = [
        {**o, 'actions': {'upload': {'href': f'{server.url}/blob/{o["oid"]}'}}}
        for o in json.loads(body)['objects']
      ]
      kind = 'application/vnd.git-lfs+json'
      content = {'transfer': 'basic', 'objects': objects}
      self._answer(content, Content_Type=kind)
    elif '/commit/' in path:
      for line in body.splitlines():
        entry = json.loads(line)
        value = entry['value']
        if entry['key'] == 'file':
          server.files[value['path']] = base64.b64decode(value['content'])
        elif entry['key'] == 'lfsFile':
          server.files[value['path']] = server.blobs[value['oid']]
      url = f'{server.url}/me/faces/commit/{COMMIT}'
      self._answer({'commitUrl': url, 'commitOid': COMMIT})
    else:
      self._answer({'error': path}, 404)

  def do_PUT(self):
    content = self._body()
    name = hashlib.sha256(content).hexdigest()
    assert self.path == f'/blob/{name}'
    self.server.blobs[name] = content
    self._answer()

  def do_GET(self):
    files = self.server.files
    if found := re.fullmatch(r'/me/faces/resolve/\w+/(.*)', self.path):
      content = files[found[1]]
      tag = hashlib.sha256(content).hexdigest()
      headers = {'ETag': f'"{tag}"', 'X_Repo_Commit': COMMIT}
      self._answer(content, **headers, Content_Type='application/octet-stream')
    elif self.path.startswith('/api/models/me/faces/tree/'):
      self._answer(
        [
          {'type': 'file', 'path': n, 'size': len(c), 'oid': '0' * 40}
          for n, c in files.items()
        ]
      )
    elif self.path.startswith('/api/models/me/faces'):
      siblings = [{'rfilename': name} for name in files]
      model = {'id': 'me/faces', 'sha': COMMIT, 'siblings': siblings}
      self._answer(model | {'private': False, 'tags': [], 'downloads': 0})
    elif self.path.startswith('/api/whoami'):
      self._answer({'type': 'user', 'name': 'me', 'orgs': []})
    else:
      self._answer({'error': self.path}, 404)

  do_HEAD = do_GET
