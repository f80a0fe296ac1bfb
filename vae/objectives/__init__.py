"""Objectives, one module each, by the name that `config.objective.name` gives.

A module has a `flax.struct` dataclass `Objective`. Its fields are the settings
of `config.objective`; floats that are pytree nodes may differ between runs that
share a compiled program, all else is compiled in. It is called with a bound
model and a `Batch`, on each device, and returns metrics of each example, nats
per image: `loss`, whose mean over the global batch is minimised, and what else
is to be logged.
"""

from typing import Any

from flax import struct
import jax

from vae import registry


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
  train: bool = struct.field(pytree_node=False)
  num_train_examples: int = struct.field(pytree_node=False)
  axis_name: str | None = struct.field(pytree_node=False)


def find(name: str) -> type:
  """The objective class of a name; raises UserError if there is none."""
  return registry.find('vae.objectives', name, 'Objective')


def from_config(config) -> Any:
  """The objective that `config.objective` describes."""
  settings = registry.settings(config.objective)
  return find(config.objective.name)(**settings)


def check(config) -> None:
  """Raises ValueError if an objective cannot take its settings."""
  objective = from_config(config)
  if hasattr(objective, 'check'):
    objective.check()
