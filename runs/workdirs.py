"""Whose a workdir is: which config made it, and on which data.

So that no run goes on there as another than it began.
"""

import contextlib
import json
import threading
import uuid

from etils import epath
import ml_collections

from configs import default
from runs import schema
from vae import checkpoints
from vae import loading
from vae import numerics
from vae import paths
from vae.errors import UserError
from vae.errors import WriteError

_DATA = 'data.json'
_ENVIRONMENT = 'environment.json'

# After which a folder that is tried is said not to answer, as a bucket may.
_SECONDS_IN_SILENCE = 2.0


def check(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Checks that a run of this config can live, or go on, in a workdir.

  Keys of `schema.FREE_KEYS` may differ from those of the run that is there;
  all may where that run came to nothing, as when its data was missing.

  Raises:
    UserError: if the workdir holds checkpoints of a config that contradicts
      this one, or that were trained with another precision of products.
  """
  if not checkpoints.Checkpoints(workdir).all_steps():
    return
  given, found = (
    schema.flatten(schema.resolved(c)) for c in (config, load_config(workdir))
  )
  changed = [
    f'config.{key} was {found[key]!r} and is now {given[key]!r}'
    for key in given
    if key not in schema.FREE_KEYS and _plain(given[key]) != _plain(found[key])
  ]
  if changed:
    raise UserError(
      f'{workdir} holds a run of another config: {"; ".join(changed)}. '
      'Name another --workdir, or give the old values.'
    )
  _check_environment(workdir)


def check_writable(folder: epath.Path, flag: str) -> None:
  """Makes a folder, if it is not there, and tries to write into it.

  Args:
    folder: for results.
    flag: that names the folder.

  Raises:
    UserError: if that fails.
  """
  waiting = threading.Timer(
    _SECONDS_IN_SILENCE, print, (f'{flag}={folder} does not answer yet …',)
  )
  waiting.daemon = True
  waiting.start()
  with contextlib.ExitStack() as stack:
    stack.callback(waiting.cancel)
    stack.enter_context(_writing_errors(folder, flag))
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe.{uuid.uuid4().hex}'
    probe.write_text('')
    probe.unlink()


def claim(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  data: dict[str, int | str],
) -> None:
  """Writes into a workdir which config, on which data, trains in it.

  Args:
    config: as `check` found it fitting.
    workdir: of the run.
    data: its `splits.DataSet.identity`.

  Raises:
    UserError: if the workdir cannot be written, or holds checkpoints that
      were trained on other data.
  """
  with _writing_errors(workdir, '--workdir'):
    workdir.mkdir(parents=True, exist_ok=True)
    found = {}
    if checkpoints.Checkpoints(workdir).all_steps():
      found = _read_data(workdir)
      _check_same_data(data, found, workdir)
      _update_config(config, workdir)
    else:
      resolved = schema.resolved(config)
      write_json(workdir / loading.CONFIG, resolved.to_dict())
    if found != found | data:
      write_json(workdir / _DATA, found | data)
    write_json(workdir / _ENVIRONMENT, numerics.environment())


def _update_config(
  config: ml_collections.ConfigDict, workdir: epath.Path
) -> None:
  """Writes what a run that goes on has changed into its config.

  Keys that the config lacks, as the code that began the run had none such,
  stay out: that code could not load it any more.
  """
  kept = loading.read_config(workdir)
  given, found = schema.flatten(config), schema.flatten(kept)
  changed = {
    key: given[key]
    for key in schema.FREE_KEYS & found.keys()
    if _plain(given[key]) != _plain(found[key])
  }
  if changed:
    with kept.ignore_type():
      kept.update_from_flattened_dict(changed)
    write_json(workdir / loading.CONFIG, kept.to_dict())


def _check_environment(workdir: epath.Path) -> None:
  """Compares what a run was trained with to what there is now.

  Another version of JAX or another device is noted: bits differ, and who
  changes it knows. The precision is a variable that is easily overlooked.
  """
  path = workdir / _ENVIRONMENT
  try:
    found = json.loads(path.read_text())
    was = {key: found[key] for key in numerics.environment()}
  except (OSError, ValueError, TypeError, KeyError):
    return  # Of an older run; it only says more.
  now = numerics.environment()
  if now['matmul_precision'] != was['matmul_precision']:
    old, new = (e['matmul_precision'] or 'not set' for e in (was, now))
    raise UserError(
      f'{workdir} holds a run for which JAX_DEFAULT_MATMUL_PRECISION was {old} '
      f'and is now {new}. Name another --workdir, set it as it was, or delete '
      f'{path} to go on so.'
    )
  if now != was:
    print(
      f'note: {workdir} was trained by jax {was["jax"]} on {was["platform"]}; '
      f'with jax {now["jax"]} on {now["platform"]} its numbers differ in their '
      'last digits.',
      flush=True,
    )


def check_data(workdir: epath.Path, data: dict[str, int | str]) -> None:
  """Checks that a run was trained on this data, as far as can be told.

  Args:
    workdir: of the run.
    data: its `splits.DataSet.identity`.

  Raises:
    UserError: if it was trained on other data.
  """
  _check_same_data(data, _read_data(workdir), workdir)


def _read_data(workdir: epath.Path) -> dict[str, int | str]:
  """What a workdir says of its data; empty where that is not there."""
  path = workdir / _DATA
  try:
    if not path.exists():
      return {}
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not found:
      raise ValueError('there is nothing of data in it')
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{path} cannot be read ({reason}). Delete it, and the data is taken as '
      "it is; so make sure that it is the run's own."
    ) from error
  return found


def _check_same_data(
  given: dict[str, int | str], found: dict[str, int | str], workdir: epath.Path
) -> None:
  # Workdirs that are older than the digests have numbers alone.
  changed = [key for key in given if given[key] != found.get(key, given[key])]
  if not changed:
    return
  advice = (
    'Name another --workdir, give it its data, or delete '
    f'{workdir / _DATA} to have it go on with these.'
  )
  counts = [key for key in given if not key.endswith('_names')]
  if set(changed) & set(counts):
    was, now = ({key: d.get(key) for key in counts} for d in (found, given))
    raise UserError(
      f'{workdir} holds a run on other data: {was} images, and now {now}. '
      f'{advice}'
    )
  splits = ' and '.join(key.removesuffix('_names') for key in changed)
  raise UserError(
    f'{workdir} holds a run on other data: there are as many images as then, '
    f'but those of {splits} have other names, or another order. {advice}'
  )


@contextlib.contextmanager
def _writing_errors(folder: epath.Path, flag: str):
  """Turns what a file system may raise, gs:// included, into a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise WriteError(
      f'{flag}={folder} cannot be written ({reason}); name a folder that can.'
    ) from error


def write_json(path: epath.Path, content: object) -> None:
  """Writes a file of JSON."""
  text = json.dumps(content, indent=2) + '\n'
  paths.replace(path, text.encode())


def load_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """The config that made a workdir, complete and valid.

  Raises:
    UserError: if the workdir holds no config, or one that cannot be used.
  """
  path = paths.expand(workdir) / loading.CONFIG
  config, found = default.get_config(), loading.read_config(workdir)
  known = schema.flatten(config).keys()
  try:
    config.update(found)
  except (
    *(ValueError, TypeError, KeyError, AttributeError, OverflowError),
  ) as error:
    raise UserError(f'{path} cannot be read as a config: {error}') from error
  for key in schema.flatten(found):
    if key not in known:
      raise UserError(
        f'{path} has config.{key}, which this code does not know; use the code '
        'that wrote it, or delete the key there if it changed nothing.'
      )
  try:
    schema.validate(config)
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  return config


def _plain(value: object) -> object:
  return list(value) if isinstance(value, tuple) else value
