"""The flags of the scripts that use what a run has trained."""

import hashlib
import re

from absl import flags
from etils import epath

from runs import command_line
from runs import schema
from runs import workdirs
from vae import devices
from vae import loading
from vae import paths
from vae import splits
from vae.errors import UserError
from vae.loading import TrainedVAE

SPLITS = ('train', 'validation', 'test')

CHECKPOINT = flags.DEFINE_string(
  'checkpoint', 'best', 'best (by val/loss), last, or a step.'
)
SPLIT = flags.DEFINE_enum(
  'split', 'test', SPLITS, "Which of the data's splits to use."
)
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where the data is, if no longer where it was trained on.'
)
OUTPUT = flags.DEFINE_string(
  'output', None, 'Folder for the results, instead of one in the workdir.'
)
SEED = flags.DEFINE_integer(
  'seed',
  0,
  'Of every random draw.',
  lower_bound=0,
  upper_bound=2**32 - 1,
)

# Flags whose values are paths.
_PATHS = ('images', 'data_dir')


def restore() -> TrainedVAE:
  """The trained model that the flags name, its config included.

  Raises:
    UserError: if there is no such run or checkpoint, or it cannot be used.
  """
  if command_line.WORKDIR.value is None:
    raise UserError('name the run with --workdir=FOLDER (--help lists all).')
  config = workdirs.load_config(workdir())
  if DATA_DIR.value is not None:
    config.data.dir = DATA_DIR.value
    schema.validate(config)
  devices.check()
  return loading.restore(config, workdir(), CHECKPOINT.value)


def check_data(data: splits.DataSet) -> None:
  """Checks that the model was trained on this data, as far as can be told.

  Other data that the user names with `--data_dir` is only remarked on.

  Raises:
    UserError: if the run's own data is no longer what it was.
  """
  try:
    workdirs.check_data(workdir(), data.identity())
  except UserError as error:
    if DATA_DIR.value is None:
      raise
    print(f'note: {error}')


def workdir() -> epath.Path:
  """Of the run."""
  return paths.expand(command_line.WORKDIR.value)


def output(*default: str) -> epath.Path:
  """The folder for the results, which is made.

  Args:
    default: where it is in the workdir if `--output` is not given.

  Raises:
    UserError: if it cannot be written.
  """
  folder = paths.expand(OUTPUT.value or workdir().joinpath(*default))
  workdirs.check_writable(folder, '--output')
  return folder


def in_name(flag: flags.FlagHolder) -> str:
  """A flag and its value, as part of the name of a folder.

  Paths, and other values that do not fit into a name, are given by a digest.
  """
  values = flag.value if isinstance(flag.value, list) else [str(flag.value)]
  if flag.name in _PATHS:
    values = [str(paths.absolute(value)) for value in values]
  text = ','.join(values)
  if not re.fullmatch(r'[\w.,+-]{1,40}', text, re.ASCII):
    digest = hashlib.sha256(text.encode(errors='surrogateescape'))
    text = digest.hexdigest()[:12]
  return f'{flag.name}={text}'
