"""Google Cloud Storage as epath uses it: gcsfs, and errors that name a cause.

gcsfs imports for more than a second, so only the first gs:// path imports this
module (`vae.paths`).
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
from gcsfs import core
from gcsfs import retry
from google.auth import exceptions as auth
import requests

# They log what is raised as well.
logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
logging.getLogger('google.auth').setLevel(logging.ERROR)

# A request that fails, or has no answer for a while, is repeated for half a
# minute, after pauses of about so many seconds. gcsfs would go on for minutes,
# and nobody who ends a run waits for that.
_PAUSES = (1, 2, 4, 8, 8)
_SECONDS_TO_REPEAT = 30.0
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
  """gcsfs without a cache of listings; whatever fails raises an OSError.

  Other processes write to the same folders, so a cached listing would be wrong.
  An error other than a missing object is never taken for a missing object, as
  fsspec does in places: a checkpoint would look incomplete.
  """

  def __init__(self, **kwargs):
    kwargs.pop('finalize_on_close', None)  # epath's, for buckets of one zone.
    super().__init__(
      use_listings_cache=False, requests_timeout=_TIMEOUT, **kwargs
    )

  async def _request(self, method, path, *args, **kwargs):
    request = core.GCSFileSystem._request.__wrapped__  # Without its repeating.
    end = time.monotonic() + _SECONDS_TO_REPEAT
    for pause in (*_PAUSES, None):
      try:
        return await request(self, method, path, *args, **kwargs)
      except Exception as error:
        is_passing = retry.is_retriable(error) or isinstance(
          error, _UNREACHABLE
        )
        if not is_passing or pause is None or time.monotonic() > end:
          name = '/'.join(args) or path
          raise _as_os_error(error, method, name) from error
      await asyncio.sleep(pause * random.uniform(0.5, 1))

  async def _exists(self, path, **kwargs):
    try:
      await self._info(path, **kwargs)
    except FileNotFoundError:
      return False
    return True

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
      if isinstance(result, Exception) and not (
        isinstance(result, FileNotFoundError) or 'No such object' in str(result)
      ):
        raise result

  mkdir = makedirs = asyn.sync_wrapper(_mkdir)
  rm = asyn.sync_wrapper(_rm)


def _as_os_error(error: Exception, method: str, name: str) -> OSError:
  """The error with its cause as `strerror`, as the operating system has it."""
  text = ' '.join(str(error).split())[:300]
  if isinstance(error, FileNotFoundError):
    # A write needs nothing but the bucket.
    missing = 'object' if method in ('GET', 'DELETE') else 'bucket'
    return FileNotFoundError(errno.ENOENT, f'there is no such {missing}', name)
  if isinstance(error, FileExistsError):
    return FileExistsError(errno.EEXIST, 'it was changed by another', name)
  if isinstance(error, _UNREACHABLE):
    reason = f'the bucket cannot be reached: {text or type(error).__name__}'
    return OSError(errno.EIO, reason, name)
  if isinstance(error, auth.GoogleAuthError | retry.NonRetryableError):
    return PermissionError(errno.EACCES, f'{_NO_CREDENTIALS} ({text})', name)
  code = getattr(error, 'code', None)
  if code == 401:
    return PermissionError(errno.EACCES, f'{_NO_CREDENTIALS} ({text})', name)
  if text.startswith('Forbidden'):
    # "Forbidden: URL", then what the service says.
    reason = str(error).partition('\n')[2].strip() or 'access denied'
    return PermissionError(errno.EACCES, f'access denied: {reason}', name)
  if code is not None:
    return OSError(errno.EIO, f'the bucket answers {text}', name)
  if isinstance(error, OSError):
    return error
  return OSError(errno.EIO, text or type(error).__name__, name)
