"""The flags of the scripts that use what a run has trained."""

from absl import flags
from etils import epath

import run_config
from vae import trained as trained_models
from vae.errors import UserError
from vae.trained import TrainedVAE

SPLITS = ('train', 'validation', 'test')

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run is kept that trained the model.'
)
CHECKPOINT = flags.DEFINE_string(
  'checkpoint', 'best', 'best (by val/loss), last, or a step.'
)
SPLIT = flags.DEFINE_enum(
  'split', 'test', SPLITS, "Which of the data's splits to use."
)
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where the data is, if no longer where it was trained on.'
)
SEED = flags.DEFINE_integer('seed', 0, 'Of every random draw.', lower_bound=0)


def restore() -> TrainedVAE:
  """The trained model that the flags name, its config included.

  Raises:
    UserError: if there is no such run or checkpoint, or it cannot be used.
  """
  if WORKDIR.value is None:
    raise UserError('name the run with --workdir=FOLDER (--help lists all).')
  workdir = epath.Path(WORKDIR.value)
  config = run_config.load(workdir)
  if DATA_DIR.value is not None:
    config.data.dir = DATA_DIR.value
    run_config.validate(config)
  return trained_models.restore(config, workdir, CHECKPOINT.value)
