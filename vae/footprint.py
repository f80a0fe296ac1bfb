"""What a run takes of the memory of a device, at the least.

By arithmetic, so that it is known before anything is made or compiled, of
sizes of any kind. Each number is a lower bound: what lies below it in memory
may still be too little, as XLA keeps more than has to be kept; what lies above
it cannot be trained.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from vae.models.conv import mirrored

# Samples of the prior that a validation draws at a time, one grid of them.
NUM_SAMPLES_DRAWN = 144


class _Layer(NamedTuple):
  """A layer as its numbers.

  Attributes:
    num_parameters: kernel, bias and, of BatchNorm, scale and shift.
    num_statistics: BatchNorm's.
    inputs: numbers that it takes, for each image.
    outputs: numbers that it makes of them.
  """

  num_parameters: int
  num_statistics: int
  inputs: int
  outputs: int


def num_parameters(config) -> int:
  """Of the model that a config describes."""
  layers = [*_encoder(config), *_decoder(config)]
  return sum(layer.num_parameters for layer in layers) + bool(
    config.model.learn_sigma
  )


def state_bytes(config) -> int:
  """Of the parameters, their two moments in Adam, and BatchNorm's statistics.

  The step's number, and Adam's, are left out.
  """
  layers = [*_encoder(config), *_decoder(config)]
  num_statistics = sum(layer.num_statistics for layer in layers)
  itemsize = jnp.promote_types(config.model.dtype, jnp.float32).itemsize
  return (3 * num_parameters(config) + num_statistics) * itemsize


def training_bytes(config, per_device_batch: int) -> int:
  """Of what a training step holds when it turns to the gradient.

  The output of every layer, which its gradient needs. All else can be computed
  from these, and may be.
  """
  itemsize = jnp.dtype(config.model.dtype).itemsize
  encoded = sum(layer.outputs for layer in _encoder(config))
  decoded = sum(layer.outputs for layer in _decoder(config))
  numbers = encoded + config.objective.num_samples * decoded
  return per_device_batch * (itemsize * numbers + _image_bytes(config))


def evaluation_bytes(config, per_device_batch: int) -> int:
  """Of what an evaluation holds where it holds most: a layer's two sides."""
  itemsize = jnp.dtype(config.model.dtype).itemsize
  encoded = _widest(_encoder(config))
  decoded = config.objective.num_samples * _widest(_decoder(config))
  numbers = max(encoded, decoded)
  return per_device_batch * (itemsize * numbers + _image_bytes(config))


def drawing_bytes(config) -> int:
  """Of what drawing the samples of a validation holds where it holds most."""
  itemsize = jnp.dtype(config.model.dtype).itemsize
  return NUM_SAMPLES_DRAWN * itemsize * _widest(_decoder(config))


def _image_bytes(config) -> int:
  """Of an image as it comes, a byte for each number."""
  return config.data.image_size**2 * config.data.channels


def _widest(layers: Sequence[_Layer]) -> int:
  """Inputs and outputs of the layer that has the most of both."""
  return max(layer.inputs + layer.outputs for layer in layers)


def _encoder(config) -> list[_Layer]:
  """The layers from the image to mean and logvar."""
  layers = []
  size, channels = config.data.image_size, config.data.channels
  for features in config.model.hidden_channels:
    layers.append(_convolution(size, channels, size // 2, features))
    size, channels = size // 2, features
  head = _dense(size**2 * channels, config.model.latent_dim)
  return [*layers, head, head]


def _decoder(config) -> list[_Layer]:
  """The layers from z to the parameters of p(x|z)."""
  hidden = tuple(config.model.hidden_channels)
  size = config.data.image_size // 2 ** len(hidden)
  channels = (config.data.channels, *hidden)[-1]
  layers = [_dense(config.model.latent_dim, size**2 * channels)]
  if not hidden:
    return layers
  for features in config.model.decoder_channels or mirrored(hidden):
    layers.append(_convolution(size, channels, 2 * size, features))
    size, channels = 2 * size, features
  last = _convolution(
    size, channels, size, config.data.channels, batch_norm=False
  )
  return [*layers, last]


def _convolution(
  size: int,
  channels: int,
  output_size: int,
  features: int,
  batch_norm: bool = True,
) -> _Layer:
  """A 3×3 convolution, and the BatchNorm after it."""
  return _Layer(
    num_parameters=(9 * channels + 1 + 2 * batch_norm) * features,
    num_statistics=2 * batch_norm * features,
    inputs=size**2 * channels,
    outputs=output_size**2 * features,
  )


def _dense(inputs: int, outputs: int) -> _Layer:
  return _Layer((inputs + 1) * outputs, 0, inputs, outputs)
