"""An autoencoder with a finite grid of codes (FSQ; Mentzer et al. 2023).

The residual network with a spatial latent: at each position of the lowest
resolution the encoder chooses one of Π levels codes, by rounding. The posterior
is certain, and the prior uniform over the codes, so that the rate is the log of
their number: positions · Σ log levels nats, whatever the image.
"""

from typing import Any

import jax

from vae import discrete, models, registry
from vae.models import residual


class Model(models.Autoencoder):
  """A residual network with a spatial latent of codes.

  Attributes:
    image_shape: height and width are multiples of 2 ** len(channels).
    levels: number of values in each dimension of a code.
    channels: of each level, from the highest resolution down.
    num_blocks: residual blocks of each level.
  """

  levels: tuple[int, ...] = (8, 5, 5, 5)
  channels: tuple[int, ...] = (32, 64, 128)
  num_blocks: int = 1

  def setup(self):
    super().setup()
    registry.check_at_least(2, levels=self.levels)
    heads, size = {'codes': len(self.levels)}, self.latent_shape[:2]
    network = self.channels, self.num_blocks, self.dtype
    self.encoder = residual.Encoder(heads, True, *network)
    self.decoder = residual.Decoder(size, self.num_outputs, *network)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    size = residual.lowest_resolution(
      self.image_shape, self.channels, self.num_blocks
    )
    return (*size, len(self.levels))

  def encode(self, images: jax.Array, train: bool = False) -> Any:
    """The code of each position, with a straight-through gradient."""
    (z,) = self.encoded(images, train)
    return discrete.Codes(discrete.quantise(z, self.levels))

  def prior(self) -> discrete.UniformCodes:
    return discrete.UniformCodes(self.latent_shape, self.levels)
