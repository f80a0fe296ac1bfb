"""Google Cloud Storage for epath: gcsfs, with errors that name their cause.

gcsfs imports for more than a second, so that `vae.paths` imports this module at
the first gs:// path.
"""

import asyncio
import errno
import logging
import os
import random
import time

# Its support of two special kinds of buckets loads gRPC and asks for the kind.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')

# isort: split
import aiohttp
from fsspec import asyn
from gcsfs import core, retry
from google.auth import exceptions as auth
import requests

# They log what is raised as well.
logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
logging.getLogger('google.auth').setLevel(logging.ERROR)

# A request that fails, or has no answer for a while, is retried for half a
# minute, after pauses of about so many seconds. gcsfs would retry for minutes,
# which is too long for a run that is being stopped.
_PAUSES = (1, 2, 4, 8, 8)
_SECONDS_TO_RETRY = 30.0
_TIMEOUT = aiohttp.ClientTimeout(sock_connect=10, sock_read=15)

_UNREACHABLE = (
  aiohttp.ClientError,
  requests.RequestException,
  asyncio.TimeoutError,
  auth.TransportError,
)
_NO_CREDENTIALS = (
  'no credentials for Google Cloud; run gcloud auth application-default login, '
  'or set GOOGLE_APPLICATION_CREDENTIALS'
)


class FileSystem(core.GCSFileSystem):
  """gcsfs without a cache of listings; every failure raises an OSError.

  Other processes write to the same folders, so that cached listings are wrong.
  fsspec takes any error for a missing object in places; here a checkpoint would
  look incomplete.
  """

  def __init__(self, **kwargs):
    kwargs.pop('finalize_on_close', None)  # epath's, for buckets of one zone.
    super().__init__(
      use_listings_cache=False, requests_timeout=_TIMEOUT, **kwargs
    )

  async def _request(self, method, path, *args, **kwargs):
    request = core.GCSFileSystem._request.__wrapped__  # Without its retries.
    end = time.monotonic() + _SECONDS_TO_RETRY
    for pause in (*_PAUSES, None):
      try:
        return await request(self, method, path, *args, **kwargs)
      except Exception as error:
        may_pass = retry.is_retriable(error) or isinstance(error, _UNREACHABLE)
        if not may_pass or pause is None or time.monotonic() > end:
          name = '/'.join(args) or path
          raise _as_os_error(error, method, name) from error
      await asyncio.sleep(pause * random.uniform(0.5, 1))

  async def _exists(self, path, **kwargs):
    try:
      return bool(await self._info(path, **kwargs))
    except FileNotFoundError:
      return False

  async def _isdir(self, path):
    try:
      return (await self._info(path))['type'] == 'directory'
    except FileNotFoundError:
      return False

  async def _mkdir(self, path, **kwargs):
    """Does nothing: a bucket has no folders, and is not made by mistake."""

  async def _ls(self, path, detail=False, **kwargs):
    try:
      return await super()._ls(path, detail, **kwargs)
    except FileNotFoundError:  # A folder without files, which may be "made".
      return []

  async def _rm(self, path, recursive=False, **kwargs):
    # gcsfs would take `[` in a name for a pattern.
    files = await self._find(path) if recursive else [path]
    if not files:
      raise FileNotFoundError(errno.ENOENT, 'there is no such folder', path)
    for result in await self._delete_files(files, batchsize=100):
      is_gone = 'No such object' in str(result)
      if isinstance(result, Exception) and not is_gone:
        raise result

  mkdir = makedirs = asyn.sync_wrapper(_mkdir)
  rm = asyn.sync_wrapper(_rm)


def _as_os_error(error: Exception, method: str, name: str) -> OSError:
  """An OSError with the cause as `strerror`."""
  text = ' '.join(str(error).split())[:300]
  code = getattr(error, 'code', None)
  is_denied = isinstance(error, auth.GoogleAuthError | retry.NonRetryableError)
  kind, number = OSError, errno.EIO
  if isinstance(error, FileNotFoundError):
    kind, number = FileNotFoundError, errno.ENOENT
    # A write needs nothing but the bucket.
    missing = 'object' if method in ('GET', 'DELETE') else 'bucket'
    reason = f'there is no such {missing}'
  elif isinstance(error, FileExistsError):
    kind, number = FileExistsError, errno.EEXIST
    reason = 'another process changed it'
  elif isinstance(error, _UNREACHABLE):
    reason = f'the bucket cannot be reached: {text or type(error).__name__}'
  elif is_denied or code == 401:
    kind, number = PermissionError, errno.EACCES
    reason = f'{_NO_CREDENTIALS} ({text})'
  elif text.startswith('Forbidden'):  # "Forbidden: URL", newline, the reason.
    kind, number = PermissionError, errno.EACCES
    reason = 'access denied: ' + str(error).partition('\n')[2].strip()
  elif code is not None:
    reason = f'the bucket answers {text}'
  else:
    return error if isinstance(error, OSError) else OSError(number, text, name)
  return kind(number, reason, name)
