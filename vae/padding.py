"""Padding of the latent dimension, so that runs of several share a program.

A narrow run's parameters and z are the first part of a wider one's. The
collection `padding` has `mask`, 1 for the dimensions of the run, by which z is
multiplied, and in training `sizes`, the own shape of each parameter.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

COLLECTION = 'padding'


def pad(tree: Any, target: Any) -> Any:
  """Zeros behind the arrays of a tree, up to the shapes of `target`."""

  def pad(array, wanted):
    if array.shape == wanted.shape:
      return array
    missing = np.subtract(wanted.shape, array.shape)
    return np.pad(array, [(0, more) for more in missing])

  return jax.tree.map(pad, tree, target)


def collection(
  narrow: nn.Module, wide: nn.Module, params: Any = None
) -> dict[str, Any]:
  """The collection `padding` of a model that is padded to the size of `wide`.

  It is there without padding too, and empty for models without a latent_dim.
  `params`, the arrays or shapes of the narrow model, are given in training.
  """
  if not hasattr(narrow, 'latent_dim'):
    return {}
  mask = np.arange(wide.latent_dim) < narrow.latent_dim
  content: dict[str, Any] = {'mask': mask.astype(np.float32)}
  if params is not None:
    content['sizes'] = jax.tree.map(
      lambda array: np.array(array.shape or (1,), np.int32), params
    )
  return {COLLECTION: content}


def cut(grads: Any, collections: Mapping[str, Any]) -> Any:
  """The gradients, with zeros for the padding if there is any."""
  sizes = collections.get(COLLECTION, {}).get('sizes')
  return grads if sizes is None else jax.tree.map(_cut, grads, sizes)


def _cut(array: jax.Array, sizes: jax.Array) -> jax.Array:
  """The array with zeros beyond the sizes of its axes."""
  for axis in range(array.ndim):
    index = lax.broadcasted_iota(jnp.int32, array.shape, axis)
    array = jnp.where(index < sizes[axis], array, 0)
  return array
