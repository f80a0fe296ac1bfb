"""A workdir's files: the config, the data and the environment of its run.

A run refuses to continue as another one than it began.
"""

from collections.abc import Iterator
import contextlib
import json
import uuid

from etils import epath
import ml_collections

from runs import schema
from vae import checkpoints, loading, numerics, paths
from vae.errors import UserError, WriteError

_DATA = 'data.json'
_ENVIRONMENT = 'environment.json'


def check(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Checks that a run of this config can start, or continue, in a workdir.

  Keys of `schema.FREE_KEYS` may differ; all may if there is no checkpoint.

  Raises:
    UserError: if the workdir holds checkpoints of a config that contradicts
      this one, or of another precision of matrix products.
  """
  if not checkpoints.Checkpoints(workdir).all_steps():
    return
  given, found = (
    schema.flatten(schema.resolved(c)) for c in (config, load_config(workdir))
  )
  changed = [
    f'config.{key} was {found.get(key)!r} and is now {given.get(key)!r}'
    for key in (given | found)
    if key not in schema.FREE_KEYS and given.get(key) != found.get(key)
  ]
  if changed:
    raise UserError(
      f'{workdir} holds a run of another config: {"; ".join(changed)}. '
      'Name another --workdir, or give the old values.'
    )
  _check_precision(workdir)


def check_writable(folder: epath.Path, flag: str) -> None:
  """Makes a folder, if it is not there, and writes into it for a test.

  Args:
    folder: for results.
    flag: that names the folder.

  Raises:
    UserError: if that fails.
  """
  with _writing_errors(folder, flag):
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe.{uuid.uuid4().hex}'
    probe.write_text('')
    probe.unlink()


def claim(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  data: dict[str, int | str],
) -> None:
  """Writes config, data and environment of a run into its workdir.

  Args:
    config: that `check` accepted.
    workdir: the run's workdir.
    data: `splits.DataSet.identity` of the run's data.

  Raises:
    UserError: if the workdir cannot be written, or holds checkpoints that were
      trained on other data.
  """
  with _writing_errors(workdir, '--workdir'):
    workdir.mkdir(parents=True, exist_ok=True)
    found = {}
    if checkpoints.Checkpoints(workdir).all_steps():
      found = check_data(workdir, data)
    write_json(workdir / loading.CONFIG, schema.resolved(config).to_dict())
    write_json(workdir / _DATA, found | data)
    write_json(workdir / _ENVIRONMENT, numerics.environment())


def _check_precision(workdir: epath.Path) -> None:
  """Compares the precision of products, an environment variable, to the run's.

  Another version of JAX or another device changes the last bits alone.
  """
  path, key = workdir / _ENVIRONMENT, 'matmul_precision'
  now, was = numerics.environment()[key], None
  try:
    was = json.loads(path.read_text())[key]
  except (OSError, ValueError, TypeError, KeyError):
    return  # Older runs have none.
  if now != was:
    raise UserError(
      f'{workdir} holds a run for which JAX_DEFAULT_MATMUL_PRECISION was '
      f'{was or "not set"} and is now {now or "not set"}. Name another '
      f'--workdir, set it as it was, or delete {path} to continue.'
    )


def check_data(
  workdir: epath.Path, data: dict[str, int | str]
) -> dict[str, int | str]:
  """Checks that a run was trained on this data.

  Args:
    workdir: the run's workdir.
    data: `splits.DataSet.identity`: numbers of images, and digests of names.

  Returns:
    The identity of the run's data, empty if it is unknown.

  Raises:
    UserError: if the run was trained on other data.
  """
  path = workdir / _DATA
  try:
    found = json.loads(path.read_text()) if path.exists() else {}
    # Older runs have no digests.
    changed = [key for key in data if data[key] != found.get(key, data[key])]
  except (OSError, ValueError, AttributeError) as error:
    raise UserError(
      f'{path} cannot be read ({getattr(error, "strerror", None) or error}). '
      "Make sure that the data is the run's own, and delete the file."
    ) from error
  if changed:
    differences = '; '.join(
      f'{key} was {found[key]} and is now {data[key]}' for key in changed
    )
    raise UserError(
      f'{workdir} holds a run on other data: {differences}. Name another '
      f'--workdir, give it its data, or delete {path} to continue with these.'
    )
  return found


@contextlib.contextmanager
def _writing_errors(folder: epath.Path, flag: str) -> Iterator[None]:
  """Turns errors of a disk or a bucket into a WriteError."""
  try:
    yield
  except OSError as error:
    raise WriteError(
      f'{flag}={folder} cannot be written ({error.strerror or error}); name a '
      'folder that can.'
    ) from error


def write_json(path: epath.Path, content: object) -> None:
  """Writes a file of JSON, atomically."""
  text = json.dumps(content, indent=2) + '\n'
  paths.replace(path, text.encode())


def load_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """The config of a workdir's run, complete and valid.

  Raises:
    UserError: if the workdir holds no config, or one that cannot be used.
  """
  config = loading.read_config(workdir)
  try:
    schema.validate(config)
  except UserError as error:
    path = paths.expand(workdir) / loading.CONFIG
    raise UserError(f'{path}: {error}') from error
  return config
