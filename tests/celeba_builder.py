"""TFDS's celeb_a, of the tests' images; TFDS takes a name only once."""

import numpy as np
import tensorflow_datasets as tfds

from data.encoded import SPLITS


class CelebA(tfds.core.GeneratorBasedBuilder):
  """Writes a data set as TFDS's celeb_a is on disk, of other images."""

  name = 'celeb_a'
  VERSION = tfds.core.Version('2.1.0')
  folder = None

  def _info(self):
    image = tfds.features.Image(shape=(218, 178, 3), encoding_format='jpeg')
    # In another order than the list has.
    attributes = dict.fromkeys(self._attributes()[0][::-1], np.bool_)
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {'image': image, 'attributes': attributes}
      ),
      disable_shuffling=True,
    )

  def _attributes(self):
    lines = (self.folder / 'list_attr_celeba.txt').read_text().splitlines()
    _, names, *rows = map(str.split, lines)
    return names, rows

  def _split_generators(self, dl_manager):
    return dict(zip(SPLITS, map(self._generate_examples, '012'), strict=True))

  def _generate_examples(self, number):
    lines = (self.folder / 'list_eval_partition.txt').read_text().splitlines()
    attributes, rows = self._attributes()
    for index, (line, row) in enumerate(zip(lines, rows, strict=True)):
      name, partition = line.split()
      if partition == number:
        signs = [sign == '1' for sign in row[1:]]
        found = dict(zip(attributes, signs, strict=True))
        path = self.folder / 'img_align_celeba' / name
        yield index, {'image': path, 'attributes': found}
