"""Labels that a model is conditioned on (Sohn et al. 2015).

Encoder and decoder of a model with `num_classes` see the class of each image.
The class indices of a batch are `labels` in the collection `given`, beside the
parameters, so that objectives and evaluators handle images alone.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vae.errors import UserError
from vae.splits import Examples, Split

COLLECTION = 'given'


def num_classes(model: Any) -> int:
  """Of the label that a model sees; 0 if it sees none."""
  return getattr(model, 'num_classes', 0)


def labels_of(model: Any, config, split: Split) -> np.ndarray | None:
  """The class index of each example, int32 [num_examples].

  None if the model sees no labels. Raises UserError if the split has no such
  label, or more classes than the model.
  """
  count = num_classes(model)
  if not count:
    return None
  labels, name = split.labels(), config.data.label
  known = labels.names if labels else ()
  if labels is None or (name or known[0]) not in known:
    raise UserError(
      f'config.data.label is {name!r}, and config.model.num_classes={count} '
      'needs a label; the data set has '
      f'{", ".join(known) or "none"}.'
    )
  values = labels.values[:, known.index(name or known[0])]
  if not 0 <= values.min() <= values.max() < count:
    raise UserError(
      f'config.model.num_classes is {count}; the classes of '
      f'{name or known[0]} go from {values.min()} to {values.max()}.'
    )
  return values.astype(np.int32)


def batches(
  trained: Any, split: Split, positions: np.ndarray, batch_size: int
) -> Iterator[Examples]:
  """Images at some positions of a split, with their labels for a model."""
  labels = labels_of(trained.model, trained.config, split)
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
