"""Where the encoded images of a data set are: in a folder, or with TFDS.

Nothing is decoded here. Each data set is found, checked for completeness and
handed on as its three splits.
"""

from collections.abc import Iterable
import re
import socket
import tempfile

from etils import epath
import tensorflow_datasets as tfds

from data import cartoon_faces
from data import celeba
from data import image_folder
from data.encoded import EncodedSplit
from data.encoded import is_hidden
from data.encoded import SPLITS
from data.encoded import TfdsSplit
from runs import progress
from runs import workdirs
from vae import ordinary_files
from vae import paths
from vae.errors import shown
from vae.errors import UserError

# A folder of a TFDS data set.
_VERSION = re.compile(r'\d+\.\d+\.\d+')

_CELEBA_DRIVE = ('drive.google.com', 443)

_HOW_TO_GET_CELEBA = (
  '{reason} Get it from Kaggle (kaggle datasets download -d '
  'jessicali9530/celeba-dataset && unzip -q celeba-dataset.zip -d celeba) and '
  'name the folder with --config.data.dir=celeba; or with TFDS, on a machine '
  'that reaches the official drive, which often refuses (python -c "import '
  "tensorflow_datasets as tfds; tfds.load('celeb_a')\"), and leave "
  'config.data.dir empty. --config=configs/faces.py needs no download.'
)


def find(source: str, directory: str) -> dict[str, EncodedSplit]:
  """The train, validation and test split of a data set.

  Args:
    source: `config.data.source`.
    directory: `config.data.dir`.

  Raises:
    UserError: what is missing, or wrong with the data, and what to do.
  """
  try:
    if source == 'celeba':
      return _find_celeba(directory)
    if source == 'cartoon_faces':
      return _prepare_cartoon_faces(directory)
    return image_folder.find(_existing_folder(directory))
  except OSError as error:  # A folder that may not be listed, say.
    raise UserError(
      f'config.data.dir is {shown(directory)!r}; '
      f'{shown(error.filename or "it")} cannot be read '
      f'({error.strerror or shown(error)}).'
    ) from error


# CelebA.


def _find_celeba(directory: str) -> dict[str, EncodedSplit]:
  """CelebA as an unpacked archive or as TFDS has it, whichever is there."""
  if directory:
    unpacked = celeba.find(_existing_folder(directory))
    if unpacked is not None:
      return unpacked
  builder = _find_prepared('celeb_a', directory)
  if builder is not None:
    return _tfds_splits(builder, 'attributes')
  if directory:
    reason = (
      f'config.data.dir is {directory}; it holds neither img_align_celeba/ '
      "with its list_eval_partition, nor TFDS's celeb_a."
    )
    raise UserError(_HOW_TO_GET_CELEBA.format(reason=reason))
  return _tfds_splits(_download_celeba(), 'attributes')


def _download_celeba() -> tfds.core.DatasetBuilder:
  """Has TFDS fetch CelebA, where that has a chance."""
  # Without a network TFDS retries for minutes; so ask first.
  try:
    socket.create_connection(_CELEBA_DRIVE, timeout=3).close()
  except OSError:
    reason = (
      f'CelebA is not in {tfds.core.constants.DATA_DIR}, and its official '
      'drive cannot be reached from here.'
    )
    raise UserError(_HOW_TO_GET_CELEBA.format(reason=reason)) from None
  builder = tfds.builder('celeb_a')
  try:
    builder.download_and_prepare()
  except Exception as error:  # Whatever it was, the ways out are the same.
    cause = str(error).strip().split('\n')[0]
    reason = f'TFDS could not download CelebA ({cause}).'
    raise UserError(_HOW_TO_GET_CELEBA.format(reason=reason)) from error
  return builder


# TFDS.


def _find_prepared(
  name: str, directory: str
) -> tfds.core.DatasetBuilder | None:
  """The newest prepared version of a TFDS data set, or None."""
  versions = [
    path
    for path in _list(_tfds_folder(directory) / name)
    if _VERSION.fullmatch(path.name) and (path / 'dataset_info.json').exists()
  ]
  if not versions:
    return None
  newest = max(versions, key=lambda v: tuple(map(int, v.name.split('.'))))
  try:
    if '://' not in str(newest):
      for description in ('dataset_info.json', 'features.json'):
        ordinary_files.check(newest / description)
    return tfds.builder_from_directory(newest)
  except Exception as error:  # Damaged descriptions make it raise anything.
    raise UserError(
      f'{shown(newest)} holds no intact data set ({shown(error)}); delete the '
      'folder and prepare it again.'
    ) from error


def _tfds_folder(directory: str) -> epath.Path:
  folder = epath.Path(directory or tfds.core.constants.DATA_DIR).expanduser()
  if str(folder).startswith('~'):
    raise UserError(
      f'config.data.dir is {shown(directory)}; there is no such user.'
    )
  return folder


def _list(folder: epath.Path) -> list[epath.Path]:
  """What is in a folder, if it is one; `glob` takes `[` in it for a pattern."""
  return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_for_tfds(folder: epath.Path) -> bool:
  """Whether TFDS's data sets are in a folder, or nothing is."""
  found = [path for path in _list(folder) if not is_hidden(path.name)]
  return not found or any(
    path.name == 'cartoon_faces'  # Of which a killed run left a part.
    or any(_VERSION.fullmatch(version.name) for version in _list(path))
    for path in found
  )


def _prepare_cartoon_faces(directory: str) -> dict[str, EncodedSplit]:
  """The embedded data set; renders it if this machine has not yet.

  Raises:
    UserError: if that fails, or the folder is not one for it.
  """
  builder = _find_prepared('cartoon_faces', directory)
  if builder is None:
    root = _tfds_folder(directory)
    if directory and not _is_for_tfds(root):
      raise UserError(
        f'config.data.dir is {shown(directory)}, which holds other files, and '
        'config.data.source is cartoon_faces, which would be rendered into it; '
        'for the images there add --config.data.source=folder (or celeba), for '
        'the cartoon faces name an empty folder.'
      )
    if paths.is_remote(root):
      workdirs.check_writable(root, '--config.data.dir')
    progress.say(f'Rendering the cartoon faces into {root} …')
    tfds.disable_progress_bar()
    try:
      with tempfile.TemporaryDirectory() as name:
        aside = epath.Path(name)
        # TensorFlow, which TFDS writes with, waits for ever for a bucket that
        # is missing.
        place = aside / 'data' if paths.is_remote(root) else root
        builder = cartoon_faces.CartoonFaces(data_dir=place)
        # TFDS makes a folder for downloads, of which there are none.
        builder.download_and_prepare(download_dir=aside / 'downloads')
        if place != root:
          paths.copy(place, root)
          builder = _find_prepared('cartoon_faces', directory)
    except (OSError, NotImplementedError) as error:
      # Another process may have been faster, or TFDS cannot clear away below
      # a folder with ** in its name.
      builder = _find_prepared('cartoon_faces', directory)
      if builder is not None:
        return _tfds_splits(builder, 'factors', cartoon_faces.FACTORS)
      reason = getattr(error, 'strerror', None) or error
      raise UserError(
        f'the cartoon faces cannot be written to {root} ({reason}); name a '
        'folder that can be written with --config.data.dir.'
      ) from error
  return _tfds_splits(builder, 'factors', cartoon_faces.FACTORS)


def _tfds_splits(
  builder: tfds.core.DatasetBuilder,
  label_feature: str,
  label_names: Iterable[str] | None = None,
) -> dict[str, EncodedSplit]:
  """The splits of a prepared data set.

  Args:
    builder: of the data set.
    label_feature: the feature that is a dictionary of labels, if there.
    label_names: their order; alphabetical by default.
  """
  missing = [split for split in SPLITS if split not in builder.info.splits]
  if missing:
    raise UserError(
      f'{builder.data_dir} has no {missing[0]} split; delete the folder and '
      'prepare it again.'
    )
  for split in SPLITS:
    _check_records(builder, split)
  if label_feature not in builder.info.features:
    label_names = ()
  elif label_names is None:
    # The order of CelebA's own list, whichever TFDS keeps its features in.
    label_names = sorted(builder.info.features[label_feature])
  return {
    split: TfdsSplit(builder, split, label_feature, label_names)
    for split in SPLITS
  }


def _check_records(builder: tfds.core.DatasetBuilder, split: str) -> None:
  """Makes sure that the files of a split are there."""
  for path in map(str, builder.info.splits[split].filepaths):
    if '://' in path:
      continue
    try:
      ordinary_files.check(path, max_bytes=None)
    except OSError as error:
      raise UserError(
        f'{shown(path)} cannot be read ({error.strerror}); delete its folder '
        'and prepare it again.'
      ) from error


# A folder of images.


def _existing_folder(directory: str) -> epath.Path:
  try:
    folder = epath.Path(directory).expanduser()
    if folder.is_dir():
      return folder
    found = folder.exists()
  except (RuntimeError, ValueError):  # No such user, or a zero byte.
    found = False
  raise UserError(
    f'config.data.dir is {shown(directory)}; '
    f'{"it is no folder" if found else "there is no such folder"}.'
  )
