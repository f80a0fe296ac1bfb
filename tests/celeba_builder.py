"""TFDS's celeb_a, of the tests' images; TFDS takes a name only once."""

import io

import numpy as np
import tensorflow_datasets as tfds

import data
from tests.conftest import make_small_config


class CelebA(tfds.core.GeneratorBasedBuilder):
  """Writes the images of `folder` as TFDS's celeb_a is on disk."""

  name = 'celeb_a'
  VERSION = tfds.core.Version('2.1.0')
  folder = None

  def _info(self):
    self._found = data.find(make_small_config(self.folder).data)
    image = tfds.features.Image(shape=(218, 178, 3), encoding_format='jpeg')
    # In another order than the list has.
    names = self._found['train'].labels().names[::-1]
    features = {'image': image, 'attributes': dict.fromkeys(names, np.bool_)}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {name: self._generate_examples(s) for name, s in self._found.items()}

  def _generate_examples(self, split):
    labels = split.labels()
    for index, row in enumerate(labels.values):
      attributes = dict(zip(labels.names, map(bool, row), strict=True))
      image = io.BytesIO(split.content(index))
      yield index, {'image': image, 'attributes': attributes}
