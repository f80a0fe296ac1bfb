"""Models, one module each, by the name that `config.model.name` gives.

A module has a Flax module class `Model`. Its dataclass fields, but for
`image_shape` and `axis_name`, are the settings of `config.model`, and `setup`
raises ValueError for those that it cannot take. Whoever trains, samples,
reconstructs or measures calls

  encode(images, train) → a posterior over z,
  decode(z, train) → a likelihood of images,
  prior() → a distribution of z (`vae.distributions`).

`vae.models.base.VAE` has these for networks with one latent.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from vae import registry

_NOT_SETTINGS = ('image_shape', 'axis_name', 'parent', 'name')


def find(name: str) -> type[nn.Module]:
  """The model class of a name; raises UserError if there is none."""
  return registry.find('vae.models', name, 'Model')


def fields(cls: type[nn.Module]) -> dict[str, registry.Field]:
  """The settings of a model, by name."""
  return registry.fields(cls, but=_NOT_SETTINGS)


def from_config(config, axis_name: str | None = None) -> nn.Module:
  """The model of `config.model`, for images as `config.data` describes them.

  Args:
    config: complete.
    axis_name: the pmap axis over which a global batch is laid.
  """
  size = config.data.image_size
  settings = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in config.model.items()
    if name != 'name'
  }
  # A config that is older than the choice of a model has the only one of then.
  return find(config.model.get('name', 'conv'))(
    image_shape=(size, size, config.data.channels),
    axis_name=axis_name,
    **settings,
  )


def check(config) -> None:
  """Raises ValueError if a model cannot take its settings; computes nothing."""
  _check(from_config(config))


# The points of a sweep share a few models, and tracing one takes half a second.
@functools.lru_cache(maxsize=64)
def _check(model: nn.Module) -> None:
  images = jnp.zeros((1, *model.image_shape))
  jax.eval_shape(lambda key: model.init(key, images), jax.random.key(0))
