"""The server of the explorer: pages and answers to their requests.

A request names runs by their number and images by their index; nothing that
comes from a client is a path. Bodies are limited in size, JSON is checked
number by number, and a mistake is answered by 400 and a line.
"""

from collections.abc import Callable, Sequence
import hmac
import io
import json
import math
import pathlib
import threading
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from explorer.session import RequestError, Session
from vae import conditioning, figures
from vae.errors import UserError

PAGE = pathlib.Path(__file__).resolve().parent / 'page'

# Bytes of a body: JSON, and a picture; pixels of a picture.
_MAX_JSON, _MAX_FILE, _MAX_PIXELS = 2_000_000, 20_000_000, 50_000_000

# Latents of a request, the largest number in one, frames of an animation.
_MAX_LATENTS, _MAX_VALUE, _MAX_FRAMES = 256, 1e4, 128

# Runs that are kept restored.
_MAX_RUNS = 8

_FRAME_MILLISECONDS = 60

# As the header Sec-Fetch-Site names requests of the page itself.
_OWN_SITE = 'same-origin', 'none'

_HEADERS = {
  'Cache-Control': 'no-store',
  'Content-Security-Policy': "default-src 'self'; img-src 'self' blob:",
  'Referrer-Policy': 'no-referrer',
  'X-Content-Type-Options': 'nosniff',
  'X-Frame-Options': 'DENY',
}


class Sessions:
  """The runs of an explorer, each restored when it is first asked for.

  Beyond `_MAX_RUNS` the one that was not asked for the longest is dropped.
  """

  def __init__(self, names: Sequence[str], restore: Callable[[int], Session]):
    self.names, self._restore = list(names), restore
    self._sessions: dict[int, Session] = {}  # The last asked for at the end.
    self._locks = [threading.Lock() for _ in names]
    self._lock = threading.Lock()

  def __getitem__(self, index: int) -> Session:
    """Restores the run of an index; raises UserError if it cannot."""
    with self._locks[index]:
      session = self._sessions.get(index) or self._restore(index)
      with self._lock:
        self._sessions.pop(index, None)
        self._sessions[index] = session
        if len(self._sessions) > _MAX_RUNS:
          self._sessions.pop(next(iter(self._sessions))).close()
      return session

  def close(self) -> None:
    """Ends the threads of all."""
    for session in self._sessions.values():
      session.close()


class _RefusedError(RequestError):
  """An answer other than 400."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def make_app(
  sessions: Sessions,
  sweep: dict[str, Any] | None,
  token: str,
  hosts: Sequence[str],
) -> Starlette:
  """The application.

  Args:
    sessions: the runs.
    sweep: table of a sweep's points, or None.
    token: required of requests for data; empty for none.
    hosts: names by which the server may be called, or `*`. A page of another
      site that has its name resolved to this machine is refused.
  """

  def endpoint(function, limit=_MAX_JSON):
    async def answer(request: Request) -> Response:
      given = request.headers.get('x-token', '')
      if token and not hmac.compare_digest(given.encode(), token.encode()):
        raise _RefusedError(403, 'the token is missing or wrong.')
      # Browsers mark requests from pages of other sites.
      if request.headers.get('sec-fetch-site', 'none') not in _OWN_SITE:
        raise _RefusedError(403, 'the request comes from another site.')
      body = await _read(request, limit)
      return await run_in_threadpool(function, request, body)

    return answer

  return Starlette(
    routes=[
      Route('/', _index_page),
      Mount('/api', routes=_api(sessions, sweep, endpoint)),
      Mount('/page', StaticFiles(directory=PAGE)),
    ],
    middleware=[
      Middleware(_Headers),
      Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
    ],
    exception_handlers={RequestError: _refuse, UserError: _refuse},
  )


def _api(
  sessions: Sessions, sweep: dict[str, Any] | None, endpoint: Callable
) -> list[Route]:
  """The routes that answer with data; `endpoint` wraps a function."""

  def runs(request, body):
    return _Json({'runs': sessions.names, 'sweep': sweep})

  def of_run(function):
    def answer(request, body):
      result = function(_find(sessions, request), _parse(body))
      return result if isinstance(result, Response) else _Json(result)

    return answer

  def upload(request, body):
    return _Json(_encode(_find(sessions, request), body, request.query_params))

  routes = [
    Route('/runs', endpoint(runs)),
    Route('/run/{run}', endpoint(of_run(lambda run, _: run.describe()))),
    Route(
      '/run/{run}/atlas', endpoint(of_run(lambda run, _: run.describe_atlas()))
    ),
    Route('/run/{run}/encode', endpoint(upload, _MAX_FILE), methods=['POST']),
  ]
  routes += [
    Route(f'/run/{{run}}/{name}', endpoint(of_run(function)), methods=['POST'])
    for name, function in _POSTS.items()
  ]
  return routes


async def _index_page(request: Request) -> Response:
  return FileResponse(PAGE / 'index.html')


def _find(sessions: Sessions, request: Request) -> Session:
  index = request.path_params['run']
  if index not in map(str, range(len(sessions.names))):
    raise _RefusedError(404, f'there is no run {index[:20]}.')
  return sessions[int(index)]


class _Json(JSONResponse):
  """JSON that takes arrays; their NaN, which JSON lacks, becomes 0."""

  def render(self, content: Any) -> bytes:
    return json.dumps(
      content,
      default=lambda array: np.nan_to_num(array).tolist(),
      allow_nan=False,
      separators=(',', ':'),
    ).encode()


class _Headers:
  """Adds `_HEADERS` to each answer."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        MutableHeaders(scope=message).update(_HEADERS)
      await send(message)

    await self._app(scope, receive, send_with_headers)


async def _refuse(request: Request, error: Exception) -> Response:
  message = ' '.join(str(error).split())
  return JSONResponse({'error': message}, getattr(error, 'status', 400))


async def _read(request: Request, limit: int) -> bytes:
  body = bytearray()
  async for part in request.stream():
    body += part
    if len(body) > limit:
      raise _RefusedError(413, f'a body may have {limit:,} bytes.')
  return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
  try:
    content = json.loads(body or b'{}')
  except (ValueError, RecursionError) as error:
    raise RequestError('the body is not JSON.') from error
  if not isinstance(content, dict):
    raise RequestError('the body is not a JSON object.')
  return content


def _number(content, name: str, low: float, high: float, default=None) -> float:
  value = content.get(name, default)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not is_number or not low <= value <= high:
    raise RequestError(f'{name} must be a number from {low:g} to {high:g}.')
  return value


def _index(content, name: str, high: float, default=None) -> int:
  value = _number(content, name, 0, high, default)
  if value != int(value):
    raise RequestError(f'{name} must be an integer.')
  return int(value)


def _vectors(content, name: str, size: int, most: int) -> np.ndarray:
  """A list of at most so many vectors, float32 [n, size]."""
  rows = content.get(name)
  if not isinstance(rows, list) or not 1 <= len(rows) <= most:
    raise RequestError(f'{name} must be a list of 1 to {most} vectors.')
  for row in rows:
    if not isinstance(row, list) or len(row) != size:
      raise RequestError(f'{name} must have vectors of {size} numbers.')
    for value in row:
      _number({name: value}, name, -_MAX_VALUE, _MAX_VALUE)
  return np.array(rows, np.float32)


def _latents(session: Session, content, most: int = _MAX_LATENTS) -> np.ndarray:
  size = math.prod(session.trained.latent_shape)
  return _vectors(content, 'z', size, most)


def _indices(content, most: int) -> list[int]:
  indices = content.get('indices')
  if not isinstance(indices, list) or not 1 <= len(indices) <= most:
    raise RequestError(f'indices must be a list of 1 to {most:,} integers.')
  return [_index({'indices': index}, 'indices', 2**31) for index in indices]


def _label(session: Session, content) -> int:
  count = conditioning.num_classes(session.trained.model)
  return _index(content, 'label', max(count - 1, 0), 0)


def _decode(session: Session, content) -> Response:
  """The images side by side in one PNG."""
  images = session.decode(_latents(session, content), _label(session, content))
  strip = figures.image_grid(images, len(images), padding=0)
  return Response(figures.png(strip), media_type='image/png')


def _sample(session: Session, content) -> dict[str, Any]:
  seed = _index(content, 'seed', 2**32 - 1)
  temperature = _number(content, 'temperature', 0, 10, 1.0)
  return {'z': session.sample(seed, temperature)}


def _near(session: Session, content) -> dict[str, Any]:
  (z,) = _latents(session, content, most=1)
  count = _index(content, 'count', 64, 8)
  return session.near(z, max(count, 1))


def _code(session: Session, content) -> dict[str, Any]:
  """The mean of a training image, or of several."""
  return {'z': session.code(_indices(content, 10_000))}


def _image(session: Session, content) -> Response:
  """Training images side by side in one PNG."""
  images = session.images(_indices(content, 64))
  strip = figures.image_grid(images, len(images), padding=0)
  return Response(figures.png(strip), media_type='image/png')


def _lift(session: Session, content) -> dict[str, Any]:
  (xy,) = _vectors(content, 'xy', 2, 1)
  return {'z': session.lift(xy)}


def _animate(session: Session, content) -> Response:
  """A GIF through latents, there and back."""
  images = session.decode(
    _latents(session, content, _MAX_FRAMES), _label(session, content)
  )
  frames = [*images, *images[-2:0:-1]]
  return Response(
    figures.gif(frames, _FRAME_MILLISECONDS), media_type='image/gif'
  )


def _encode(session: Session, body: bytes, query) -> dict[str, Any]:
  too_large = _RefusedError(413, f'an image may have {_MAX_PIXELS:,} pixels.')
  try:
    # Reads the header alone.
    with Image.open(io.BytesIO(body)) as image:
      width, height = image.size
  except Image.DecompressionBombError as error:
    raise too_large from error
  except Exception as error:  # Damaged bytes make decoders raise anything.
    raise RequestError('the file cannot be read as an image.') from error
  if width * height > _MAX_PIXELS:
    raise too_large
  try:
    label = int(query.get('label', '0'))
  except ValueError as error:
    raise RequestError('label must be an integer.') from error
  return session.encode(body, _label(session, {'label': label}))


_POSTS = {
  f.__name__[1:]: f
  for f in (_decode, _sample, _near, _code, _image, _lift, _animate)
}
