"""Objectives, one module each, by the name that `config.objective.name` gives.

A module has a `flax.struct` dataclass `Objective`. Its fields are the settings
of `config.objective`; floats that are pytree nodes may differ between runs that
share a compiled program, all else is compiled in. It is called with a bound
model and a `Batch`, on each device, and returns metrics of each example, nats
per image: `loss`, whose mean over the global batch is minimised, and what else
is to be logged. An `Objective` with a network of its own has a method
`critic(model)`, which returns a Flax module, and `critic_input(model)`, the
shape of its input; `model.variables['params']['critic']` are its parameters.
"""

import functools
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from vae import devices, registry
from vae.errors import UserError

# A field that is compiled in.
static = functools.partial(struct.field, pytree_node=False)


@struct.dataclass
class Batch:
  """A device's part of the global batch, as an objective sees it.

  Attributes:
    images: [batch, height, width, channels], in [0, 1].
    mask: bool [batch], False for padding, which does not count.
    keys: [batch], of each example's draws of z.
    noise_keys: [batch], of each example's other draws.
    epoch: training epochs before this step; in evaluation infinite.
    train: whether the batch is trained on.
    num_train_examples: size of the training split.
    axis_name: the pmap axis of the global batch, or None.
  """

  images: jax.Array
  mask: jax.Array
  keys: jax.Array
  noise_keys: jax.Array
  epoch: jax.Array | float
  train: bool = static()
  num_train_examples: int = static()
  axis_name: str | None = static()


def mean(batch: Batch, values: jax.Array) -> jax.Array:
  """The mean over the examples of the global batch, of values [batch, …]."""
  counts = batch.mask.reshape(-1, *[1] * (values.ndim - 1))
  sums = jnp.where(counts, values, 0).sum(axis=0), batch.mask.sum()
  total, count = devices.sum_over(sums, batch.axis_name)
  return total / count


def gather(batch: Batch, values: Any) -> Any:
  """Gathers a tree of arrays [batch, …] over the global batch, in order."""
  if batch.axis_name is None:
    return values
  return lax.all_gather(values, batch.axis_name, tiled=True)


def find(name: str) -> type:
  """The objective class of a name; raises UserError if there is none."""
  return registry.find('vae.objectives', name, 'Objective')


def from_config(config) -> Any:
  """The objective that `config.objective` describes."""
  settings = registry.settings(config.objective)
  return find(config.objective.name)(**settings)


def critic(config, model) -> tuple[Any, tuple[int, ...]] | None:
  """The objective's own network and the shape of its input, if it has one."""
  objective = from_config(config)
  if not hasattr(objective, 'critic'):
    return None
  return objective.critic(model), objective.critic_input(model)


def check_diagonal(config) -> None:
  """Raises ValueError unless the posterior is a diagonal Gaussian."""
  if config.model.get('posterior') != 'diagonal':
    raise ValueError(
      f'name is {config.objective.name}; it needs a model with '
      'posterior=diagonal.'
    )


def check(config) -> None:
  """Raises ValueError if an objective cannot take its settings."""
  objective = from_config(config)
  if hasattr(objective, 'check'):
    objective.check(config)


def check_values(objective: Any, values: Any, batch_size: int) -> None:
  """Raises UserError unless an objective's values are of each example."""
  name = type(objective).__module__
  if 'loss' not in values:
    raise UserError(
      f'the objective {name} returns {", ".join(values)}; its loss is missing.'
    )
  for key, value in values.items():
    if jnp.shape(value) != (batch_size,):
      raise UserError(
        f'the objective {name} returns {key} of shape '
        f'{list(jnp.shape(value))}; each value must be one number for each '
        f'example, [{batch_size}].'
      )
