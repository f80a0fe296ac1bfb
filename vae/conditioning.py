"""Labels that a model is conditioned on (Sohn et al. 2015).

Encoder and decoder of a model with `num_classes` see the class of each image.
The class indices of a batch are `labels` in the collection `given`, beside the
parameters, so that objectives and evaluators handle images alone.
"""

from collections.abc import Iterator
from typing import Any
import zlib

import jax
import numpy as np

from vae.errors import UserError
from vae.splits import DataSet, Examples, Split

COLLECTION = 'given'


def num_classes(model: Any) -> int:
  """The number of classes of the label that a model sees, or 0."""
  return getattr(model, 'num_classes', 0)


def labels_of(config, split: Split) -> np.ndarray | None:
  """The class index of each example, int32 [num_examples].

  None if the model of the config sees no labels. Raises UserError if the split
  has no such label, or other classes than the model.
  """
  count = config.model.get('num_classes', 0)
  return None if not count else _read(config, count, split)[0]


def _read(config, count: int, split: Split) -> tuple[np.ndarray, list[str]]:
  """Class indices, and the names of the classes."""
  labels = split.labels()
  known = labels.names if labels else ()
  name = config.data.get('label', '')
  if not name and len(known) == 1:
    (name,) = known
  if labels is None or name not in known:
    shown = ', '.join(known) or 'none'
    raise UserError(
      f'config.data.label is {name!r}, and config.model.num_classes={count} '
      f'needs one of the labels of the data set: {shown}.'
    )
  values, names = labels.values[:, known.index(name)], labels.class_names(name)
  if len(names) > count or name in labels.classes and len(names) < count:
    raise UserError(
      f'config.model.num_classes is {count}; {name} has {len(names)} classes.'
    )
  return values.astype(np.int32), names


def identity(config, data: DataSet) -> dict[str, int | str]:
  """The classes and labels that a run must share with its data."""
  count = config.model.get('num_classes', 0)
  if not count:
    return {}
  values, names = _read(config, count, data.train)
  return {
    'classes': ', '.join(names),
    'train_labels': f'{zlib.crc32(values.tobytes()):08x}',
  }


def batches(
  config, split: Split, positions: np.ndarray, batch_size: int
) -> Iterator[Examples]:
  """Images at some positions of a split, with labels if the model sees any."""
  labels = labels_of(config, split)
  for index, images in enumerate(split.batches(positions, batch_size)):
    at = positions[index * batch_size :][:batch_size]
    yield Examples(images, None if labels is None else labels[at])


def given(variables: Any, labels: Any) -> Any:
  """The variables with the labels [batch] of a batch, if there are any."""
  if labels is None:
    return variables
  return {**variables, COLLECTION: {'labels': labels}}


def at(variables: Any, positions: jax.Array) -> Any:
  """Variables with the labels of a split, reduced to those of some positions.

  Padding beyond the split has the label of its last example.
  """
  if COLLECTION not in variables:
    return variables
  return given(variables, variables[COLLECTION]['labels'][positions])


def in_turn(model: Any, count: int) -> np.ndarray | None:
  """The classes in turn, int32 [count], if the model is conditioned on any."""
  if not num_classes(model):
    return None
  return np.arange(count, dtype=np.int32) % num_classes(model)
