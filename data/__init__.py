"""Sources of images, one module each, found by name.

A source is a module with a function `find(data)`, which gets `config.data` and
returns an `EncodedSplit` for each of 'train', 'validation' and 'test'.
"""

import runs  # noqa: F401 (Sets the environment of TensorFlow.)

# isort: split
import ml_collections

from data.encoded import EncodedSplit
from vae import registry
from vae.errors import shown, UserError


def find(data: ml_collections.ConfigDict) -> dict[str, EncodedSplit]:
  """Finds the train, validation and test split that `config.data` describes.

  Raises:
    UserError: if there is no such source, or data is missing or damaged.
  """
  find_splits = registry.find('data', data.source, 'find')
  try:
    return find_splits(data)
  except OSError as error:
    raise UserError(
      f'config.data.dir is {shown(data.dir)!r}; '
      f'{shown(error.filename or "it")} cannot be read '
      f'({error.strerror or shown(error)}).'
    ) from error
