"""Flags of the scripts that use a trained model."""

import hashlib
import re

from absl import flags
from etils import epath

from runs import command_line, schema, workdirs
from vae import devices, loading, paths, splits
from vae.errors import UserError
from vae.loading import TrainedVAE

CHECKPOINT = flags.DEFINE_string(
  'checkpoint', 'best', 'best (by val/loss), last, or a step.'
)
SPLIT = flags.DEFINE_enum(
  'split', 'test', ('train', 'validation', 'test'), 'Split of the data.'
)
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, "The data's folder, if not the one that the run was given."
)
OUTPUT = flags.DEFINE_string(
  'output', None, 'Folder for the results, instead of one in the workdir.'
)
SEED = flags.DEFINE_integer(
  'seed', 0, 'Seed of all draws.', lower_bound=0, upper_bound=2**32 - 1
)


def restore() -> TrainedVAE:
  """The trained model that the flags name.

  Raises:
    UserError: if there is no such run or checkpoint, or it cannot be used.
  """
  if command_line.WORKDIR.value is None:
    raise UserError('name the run with --workdir=FOLDER (--help lists all).')
  devices.check()
  config = workdirs.load_config(workdir())
  if DATA_DIR.value is not None:
    config.data.dir = DATA_DIR.value
    schema.validate(config)
  return loading.restore(config, workdir(), CHECKPOINT.value)


def check_data(data: splits.DataSet) -> None:
  """Checks that the run was trained on this data, as `data.json` has it.

  Differences of data that `--data_dir` names are only noted.

  Raises:
    UserError: if the run's own data has changed.
  """
  try:
    workdirs.check_data(workdir(), data.identity())
  except UserError as error:
    if DATA_DIR.value is None:
      raise
    print(f'note: {error}')


def workdir() -> epath.Path:
  """The run's workdir."""
  return paths.expand(command_line.WORKDIR.value)


def output(*default: str) -> epath.Path:
  """The folder for the results, which is made.

  Args:
    default: its place in the workdir if `--output` is not given.

  Raises:
    UserError: if it cannot be written.
  """
  folder = paths.expand(OUTPUT.value or workdir().joinpath(*default))
  workdirs.check_writable(folder, '--output')
  return folder


def in_name(flag: flags.FlagHolder) -> str:
  """A flag and its value as part of a folder's name.

  Paths, and values that do not fit into a name, are given by a digest.
  """
  values = flag.value if isinstance(flag.value, list) else [str(flag.value)]
  if flag.name in ('images', 'data_dir'):
    values = [str(paths.absolute(value)) for value in values]
  text = ','.join(values)
  if not re.fullmatch(r'[\w.,+-]{1,40}', text, re.ASCII):
    digest = hashlib.sha256(text.encode(errors='surrogateescape'))
    text = digest.hexdigest()[:12]
  return f'{flag.name}={text}'
