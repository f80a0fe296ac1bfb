"""A VAE with a learned table of codes (VQ-VAE; van den Oord et al. 2017).

The residual network with a spatial latent: each position of the lowest
resolution has the nearest of `num_codes` vectors. The table follows moving
averages of what it stands for (appendix A.1 of the paper), or the gradient of
`vae.objectives.vq`. A code that stands for almost nothing starts again at one
of the positions of the batch that are farthest from all codes.
"""

import math
from typing import Any, Literal

import jax
from jax import lax
import jax.numpy as jnp

from vae import autoregressive, discrete, models, registry
from vae.models import residual

# Of the moving averages; and the share of the mean use below which a code
# starts again.
_DECAY, _DEAD = 0.99, 0.01


class Model(models.Autoencoder):
  """A residual network with a spatial latent of codes of a table.

  Attributes:
    image_shape: height and width are multiples of 2 ** len(channels).
    num_codes: of the table.
    code_dim: size of a code.
    table: how it is learned.
    channels: of each level, from the highest resolution down.
    num_blocks: residual blocks of each level.
    latent_prior: of the codes; `autoregressive` has a transformer, which is
      trained beside the model and changes nothing of it.
  """

  latent_prior: Literal['uniform', 'autoregressive'] = 'uniform'
  num_codes: int = 512
  code_dim: int = 64
  table: Literal['averages', 'gradient'] = 'averages'
  channels: tuple[int, ...] = (32, 64, 128)
  num_blocks: int = 1

  def setup(self):
    super().setup()
    registry.check_at_least(1, num_codes=self.num_codes, code_dim=self.code_dim)
    heads, size = {'codes': self.code_dim}, self.latent_shape[:2]
    network = self.channels, self.num_blocks, self.dtype
    self.encoder = residual.Encoder(heads, True, *network)
    self.decoder = residual.Decoder(size, self.num_outputs, *network)
    dtype = self.param_dtype
    shape = self.num_codes, self.code_dim

    def initial(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -1, 1) / self.num_codes

    if self.table == 'gradient':
      self.vectors = self.param('vectors', initial, shape, dtype)
    else:
      collection = 'table', 'averages'
      self.averages = self.variable(
        *collection,
        lambda: {
          'sums': initial(self.make_rng('params'), shape, dtype),
          'uses': jnp.ones(self.num_codes, dtype),
        },
      )
    if self.latent_prior == 'autoregressive':
      self.prior_network = autoregressive.Transformer(
        self.num_codes, dtype=dtype
      )

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    size = residual.lowest_resolution(
      self.image_shape, self.channels, self.num_blocks
    )
    return (*size, self.code_dim)

  def codes(self) -> jax.Array:
    """The table, [num_codes, code_dim]."""
    if self.table == 'gradient':
      return self.vectors
    averages = self.averages.value
    return averages['sums'] / averages['uses'][:, None]

  def encode(self, images: jax.Array, train: bool = False) -> Any:
    """The nearest code at each position, with a straight-through gradient."""
    (encoded,) = self.encoded(images, train)
    table = self.codes()
    chosen = discrete.nearest(encoded, table)
    code = table[chosen]
    if train and self.table == 'averages' and not self.is_initializing():
      self._follow(lax.stop_gradient(encoded), chosen, table)
    mean = encoded + lax.stop_gradient(code - encoded)
    return discrete.NearestCodes(mean, encoded, code)

  def _follow(self, encoded, chosen, table) -> None:
    """Moves the averages towards the encodings of the global batch."""
    flat, chosen = encoded.reshape(-1, self.code_dim), chosen.ravel()
    if self.axis_name is not None:
      flat, chosen = lax.all_gather((flat, chosen), self.axis_name, tiled=True)
    uses = jnp.zeros(self.num_codes, flat.dtype).at[chosen].add(1)
    sums = jnp.zeros_like(table).at[chosen].add(flat)
    averages = self.averages.value
    uses = _DECAY * averages['uses'] + (1 - _DECAY) * uses
    sums = _DECAY * averages['sums'] + (1 - _DECAY) * sums
    distances = jnp.square(flat - table[chosen]).sum(axis=-1)
    _, farthest = lax.top_k(distances, min(self.num_codes, len(flat)))
    is_dead = uses < _DEAD * uses.mean()
    # The first dead code gets the farthest, and so on.
    order = (jnp.cumsum(is_dead) - 1) % len(farthest)
    fresh = flat[farthest[order]] * uses.mean()
    self.averages.value = {
      'sums': jnp.where(is_dead[:, None], fresh, sums),
      'uses': jnp.where(is_dead, uses.mean(), uses),
    }

  def prior(self) -> discrete.CodePrior:
    table = lax.stop_gradient(self.codes())
    if self.latent_prior == 'uniform':
      return discrete.CodePrior(table, self.latent_shape)
    if self.is_initializing():
      positions = math.prod(self.latent_shape[:2])
      self.prior_network(jnp.zeros((1, positions), jnp.int32))
    network = self.prior_network.unbind()
    return discrete.CodePrior(table, self.latent_shape, *network)
