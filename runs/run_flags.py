"""Flags of the scripts that use a trained model."""

import hashlib
import re

from absl import flags
from etils import epath

from runs import command_line, workdirs
from vae import conditioning, devices, loading, paths, splits
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


def split_names(text: str) -> list[str]:
  """Names separated by commas; those of folders that exist may have commas.

  A sweep's points have them, as in `beta=0.5,latent_dim=16`.
  """
  names: list[str] = []
  left = text.split(',')
  while left:
    ends = [
      end
      for end in range(len(left), 0, -1)
      if end == 1 or paths.expand(','.join(left[:end])).exists()
    ]
    names.append(','.join(left[: ends[0]]))
    left = left[ends[0] :]
  return names


def restore() -> TrainedVAE:
  """The trained model that the flags name; raises a UserError without one."""
  if command_line.WORKDIR.value is None:
    raise UserError('name the run with --workdir=FOLDER (--help lists all).')
  devices.check()
  config = workdirs.load_config(workdir(), DATA_DIR.value)
  return loading.restore(config, workdir(), CHECKPOINT.value)


def check_data(config, data: splits.DataSet) -> None:
  """Raises a UserError if the run's data changed; notes if it is another's."""
  try:
    identity = data.identity() | conditioning.identity(config, data)
    workdirs.check_data(workdir(), identity)
  except UserError as error:
    if DATA_DIR.value is None:
      raise
    print(f'note: {error}')


def workdir() -> epath.Path:
  """The run's workdir."""
  return paths.expand(command_line.WORKDIR.value)


def output(*default: str) -> epath.Path:
  """The folder for the results, which is made, by default in the workdir."""
  folder = paths.expand(OUTPUT.value or workdir().joinpath(*default))
  workdirs.check_writable(folder, '--output')
  return folder


def in_name(flag: flags.FlagHolder) -> str:
  """A flag and its value, or of paths their digest, for a folder's name."""
  text = str(flag.value)
  if flag.name in ('images', 'data_dir'):
    values = flag.value if isinstance(flag.value, list) else [flag.value]
    text = repr([str(paths.absolute(value)) for value in values])
  if not re.fullmatch(r'[\w.+-]{1,40}', text, re.ASCII):
    digest = hashlib.sha256(text.encode(errors='surrogateescape'))
    text = digest.hexdigest()[:12]
  return f'{flag.name}={text}'
