"""Images that cannot be decoded: which, why, and what to say of them."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from data import image_files
from data.crops import Crop
from data.encoded import EncodedSplit
from data.encoded import some
from vae.errors import UserError

# What is wrong with an image's content, and so for as long as it is the same.
CORRUPT = tf.errors.InvalidArgumentError

# What is wrong with what holds the images: damaged records, or not as many.
DAMAGED = (tf.errors.DataLossError, tf.errors.FailedPreconditionError)

# What comes instead of an image: an error, or that a name in it is no UTF-8.
FAILURES = (tf.errors.OpError, UnicodeDecodeError)


def find(
  encoded: EncodedSplit, indices: np.ndarray, crop: Crop
) -> dict[int, Exception]:
  """Those of `indices` whose images cannot be read or decoded, and why.

  Raises:
    UserError: if it is not the images but what holds them.
  """
  found = {}
  images = iter(encoded.read(indices, crop.decode))
  for index in indices:
    try:
      next(images)  # After an error, the image after it.
    except DAMAGED as damage:
      raise encoded.unreadable() from damage
    except (*FAILURES, StopIteration) as failure:
      found[int(index)] = failure
  return found


def as_user_error(
  encoded: EncodedSplit, corrupt: list[int], crop: Crop
) -> UserError:
  """What to say of images that cannot be decoded, and were not skipped."""
  several = len(corrupt) > 1
  return UserError(
    f'{some_names(encoded, corrupt)} cannot be decoded '
    f'({"the first: " if several else ""}'
    f'{_reason(encoded, corrupt[0], crop)}); put '
    f'{"sound ones in their places" if several else "a sound one in its place"}'
    ', and the same command goes on. Or leave such images out with '
    '--config.data.skip_corrupt=True; a run with checkpoints has to begin anew '
    'for that, in another --workdir.'
  )


def _reason(encoded: EncodedSplit, index: int, crop: Crop) -> str:
  """Why an image cannot be decoded, in words that TensorFlow does not have."""
  try:
    image_files.decode(encoded.content(index), crop.channels)
  except OSError as error:
    return error.strerror or str(error)
  except ValueError as error:
    return str(error)
  return 'its data are damaged'


def some_names(encoded: EncodedSplit, indices: Sequence[int]) -> str:
  """The names of the first few, and how many more there are."""
  return some([encoded.name(index) for index in indices])
