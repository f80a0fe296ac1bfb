"""Image data sets of TFDS, by name and split expressions."""

from collections.abc import Mapping, Sequence
import os
import socket
import urllib.request

from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from data import (
  digest,
  EncodedSplit,
  files_digest,
  is_hidden,
  MemorySplit,
  SPLITS,
)
from runs import progress, tf
from vae import paths
from vae.errors import shown, UserError
from vae.splits import Labels

# A server of TFDS's, which stands for the network.
_SERVER = ('storage.googleapis.com', 443)


def find(data) -> dict[str, EncodedSplit]:
  """Finds the data set `data.name` in `data.dir`, or has TFDS download it."""
  builder = prepare(data.name, data.dir)
  return make_splits(builder, {split: data[split] for split in SPLITS})


def prepare(
  name: str, directory: str, downloads: bool = True
) -> tfds.core.DatasetBuilder:
  """Finds a data set in TFDS's data directory, or has TFDS prepare it there.

  Its name may have `/CONFIG` and `:VERSION`. `downloads` says whether preparing
  it needs the network.

  Raises:
    UserError: if TFDS cannot prepare it, or the directory is for other files.
  """
  root = epath.Path(directory or tfds.core.constants.DATA_DIR).expanduser()
  if builder := _find_prepared(name, root):
    return builder
  if paths.is_remote(root):
    raise UserError(
      f'{shown(root)} holds no {shown(name)}; prepare it on a disk and copy it '
      'there.'
    )
  if directory:
    _check_purpose(root, name)
  progress.say(f'Preparing {name} with TFDS in {root} …')
  try:
    builder = tfds.builder(name, data_dir=root)
    if not downloads:
      tfds.disable_progress_bar()
    elif not urllib.request.getproxies():  # TFDS would retry for minutes.
      socket.create_connection(_SERVER, timeout=5).close()
    builder.download_and_prepare()
  except Exception as error:  # Each data set has errors of its own.
    if builder := _find_prepared(name, root):  # By another process.
      return builder
    reason = getattr(error, 'strerror', None) or str(error).split('\n')[0]
    raise UserError(
      f'TFDS cannot prepare {shown(name)} in {shown(root)} ({shown(reason)}); '
      'name another folder, or a copy of one that was prepared elsewhere, with '
      '--config.data.dir.'
    ) from error
  return _find_prepared(name, root)


def _find_prepared(
  name: str, root: epath.Path
) -> tfds.core.DatasetBuilder | None:
  try:
    return tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
  except tfds.core.registered.DatasetNotFoundError:
    return None
  except Exception as error:  # Damaged descriptions make it raise anything.
    raise UserError(
      f'{shown(root / name)} holds no intact data set ({shown(error)}); delete '
      'the folder and prepare it again.'
    ) from error


def _check_purpose(root: epath.Path, name: str) -> None:
  """Refuses a folder of images: the user forgot to name the source."""
  found = list(root.iterdir()) if root.is_dir() else []
  found = [path for path in found if not is_hidden(path.name)]
  if any(path.name in (name, 'downloads') for path in found):
    return
  below = [p.name for path in found if path.is_dir() for p in path.iterdir()]
  if found and not any(map(tfds.core.Version.is_valid, below)):
    raise UserError(
      f'config.data.dir is {shown(root)}, which holds other files than data '
      f'sets of TFDS, and {name} would be prepared in it; for the images there '
      'add --config.data.source=folder (or celeba), or name an empty folder.'
    )


def make_splits(
  builder: tfds.core.DatasetBuilder,
  expressions: Mapping[str, str] | None = None,
  label_names: Sequence[str] = (),
) -> dict[str, EncodedSplit]:
  """Makes the splits of a prepared data set.

  TFDS's expression for a split is by default its name, and the labels are in
  alphabetical order.

  Raises:
    UserError: if there is no such split, or no image in the examples.
  """
  info, found = builder.info, {}
  features = _flat(info.features)
  images = [
    name
    for name, feature in info.features.items()
    if isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8
  ]
  if not images:
    raise UserError(
      f'{info.full_name} has no images of 8 bits; its features are '
      f'{", ".join(info.features)}.'
    )
  image = 'image' if 'image' in images else images[0]
  labels = {
    name: features[name]
    for name in label_names or sorted(features)
    if isinstance(features[name], tfds.features.ClassLabel)
    or (features[name].shape == () and features[name].np_dtype == np.bool_)
  }
  for split in SPLITS:
    expression = (expressions or {}).get(split) or split
    try:
      found[split] = _TfdsSplit(builder, expression, image, labels)
    except ValueError as error:
      raise UserError(
        f'config.data.{split} is {expression!r}, but {info.full_name} has the '
        f'splits {", ".join(info.splits)}; name a part of one with '
        f"--config.data.{split}, such as 'train[90%:]'."
      ) from error
  return found


def _flat(features) -> dict:
  """Features, or their values, by name, with those of dictionaries."""
  flat = {}
  for name, feature in features.items():
    nested = isinstance(feature, (dict, tfds.features.FeaturesDict))
    flat.update(feature.items() if nested else {name: feature})
  return flat


class _TfdsSplit(EncodedSplit):
  """Images of a TFDS split, in the order of its files.

  Records can only be read one after the other, so the encoded images are held
  in host memory while they are decoded (CelebA: 1.4 GB).
  """

  def __init__(self, builder, split, image, labels):
    self._builder, self._split = builder, split
    self._image, self._labels = image, labels
    self._info = builder.info.splits[split]
    self.num_examples = self._info.num_examples

  def items(self, indices):
    images = MemorySplit(self._read(lambda example: example[self._image]))
    return images.items(indices).map(images.open)

  def labels(self):
    if not self._labels:
      return None

    def values(example):
      flat = _flat(example)
      return tf.stack([tf.cast(flat[name], tf.int32) for name in self._labels])

    classes = {}
    for name, feature in self._labels.items():
      names = getattr(feature, 'names', [])
      # Numbers are names only if it is plain what they number.
      if not all(map(str.isdecimal, names)) or names and len(self._labels) == 1:
        classes[name] = names
    return Labels(tuple(self._labels), np.array(self._read(values)), classes)

  def name(self, index):
    return f'{self._builder.info.full_name} {self._split} example {index}'

  def fingerprint(self):
    names = [os.fsencode(os.path.basename(p)) for p in self._info.filepaths]
    files = files_digest(str(self._builder.data_dir), names)
    return files and digest(self._split, files)

  def names_digest(self, indices):
    name = self._builder.info.full_name
    return digest(name, self._split, *indices.tolist())

  def _read(self, function):
    """A function's values for all examples, in order."""
    examples = self._builder.as_dataset(
      self._split,
      decoders={self._image: tfds.decode.SkipDecoding()},
      read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    # A file that was cut between two records looks whole.
    complete = tf.data.experimental.assert_cardinality(self.num_examples)
    examples = examples.apply(complete).map(function).batch(256)
    try:
      return [
        value for batch in examples.as_numpy_iterator() for value in batch
      ]
    except tf.errors.OpError as error:
      raise UserError(
        f'the records of the {self._split} split in '
        f'{shown(self._builder.data_dir)} are damaged; delete the folder and '
        'prepare it again.'
      ) from error
