"""Paths as users write them: local ones, and gs://BUCKET/… of a bucket.

Whoever imports this has epath and fsspec reach buckets through `vae.buckets`.
"""

from concurrent import futures
import functools
import importlib.util
import os

from etils import epath
import fsspec

from vae.errors import UserError

# epath prefers TensorFlow for buckets if it is installed, whose client retries
# for ever if a bucket is missing. epath reads this once, at its first gs://.
os.environ['EPATH_USE_TF'] = '0'
for _name in ('gs', 'gcs'):
  fsspec.register_implementation(_name, 'vae.buckets.FileSystem', clobber=True)

# Requests to a bucket that are under way at a time.
_COPIED_AT_ONCE = 8


def expand(path: epath.PathLike) -> epath.Path:
  """The path with a leading `~` or `~USER` replaced by that home folder.

  A shell leaves the `~` of --workdir=~/runs as it is. A URL such as
  gs://BUCKET/runs, and a name that is no user's, stay too.

  Raises:
    UserError: if it is a URL, but not of gs://, or gcsfs is not installed.
  """
  if is_remote(path):
    if not str(path).startswith('gs://'):
      raise UserError(f'{path} is neither a local path nor gs://BUCKET/….')
    if importlib.util.find_spec('gcsfs') is None:
      raise UserError(f'{path} needs gcsfs: pip install gcsfs.')
  return epath.Path(path).expanduser()


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in a bucket, and not on a disk."""
  return '://' in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """The path without `..`, from the root; a bucket's stays as it is."""
  path = epath.Path(path)
  return path if is_remote(path) else path.resolve()


def list_files(folder: epath.PathLike) -> list[str]:
  """Relative paths of the files in a folder and below it, sorted."""
  folder = str(folder).rstrip('/')
  if not is_remote(folder):
    found = (
      os.path.relpath(os.path.join(root, name), folder)
      for root, _, names in os.walk(folder)
      for name in names
    )
  else:
    top = folder.partition('://')[2] + '/'
    names = fsspec.filesystem('gcs').find(folder)
    found = (name.removeprefix(top) for name in names)
  # Consoles of buckets make empty objects for folders.
  return sorted(name for name in found if name and not name.endswith('/'))


@functools.lru_cache(maxsize=8)
def list_generations(folder: str) -> dict[str, str]:
  """The generation of each object below a bucket's folder, by relative path.

  An object that is written again has another. Asked again, the listing is the
  same: one of 200,000 objects takes 200 requests.
  """
  top = folder.partition('://')[2].rstrip('/') + '/'
  found = fsspec.filesystem('gcs').find(folder, detail=True)
  return {
    name.removeprefix(top): about['generation'] for name, about in found.items()
  }


def copy(source: epath.Path, target: epath.Path) -> None:
  """Copies the files of a folder; one of the two may be in a bucket."""

  def copy_file(name: str) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes((source / name).read_bytes())

  with futures.ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
    list(pool.map(copy_file, list_files(source)))


def move(source: epath.Path, target: epath.Path) -> None:
  """Moves a folder to a path that is free, on the same disk or bucket."""
  if is_remote(source):
    copy(source, target)
    source.rmtree()
  else:
    source.rename(target)
