"""Where images come from: a module for each source, found by its name.

A source is a module with a function `find(data)`, which gets `config.data` and
returns an `EncodedSplit` for each of 'train', 'validation' and 'test'.
"""

import importlib

import runs  # noqa: F401 (Sets the environment of TensorFlow.)

# isort: split
import ml_collections

from data.encoded import EncodedSplit
from vae.errors import shown
from vae.errors import UserError

SOURCES = ('celeba', 'cartoon_faces', 'folder', 'tfds')


def find(data: ml_collections.ConfigDict) -> dict[str, EncodedSplit]:
  """Finds the train, validation and test split of a data set.

  Args:
    data: `config.data`; its `source` names a module of this package or one of
      the user's own on `sys.path`.

  Raises:
    UserError: if data is missing or damaged.
  """
  known = data.source in SOURCES
  source = importlib.import_module(
    f'data.{data.source}' if known else data.source
  )
  if not hasattr(source, 'find'):
    raise UserError(
      f'config.data.source is {data.source}, a module without a function '
      f'find(data); name one of {", ".join(SOURCES)}, or a module that has it.'
    )
  try:
    return source.find(data)
  except OSError as error:
    raise UserError(
      f'config.data.dir is {shown(data.dir)!r}; '
      f'{shown(error.filename or "it")} cannot be read '
      f'({error.strerror or shown(error)}).'
    ) from error
