"""First parameters by PCA: a convolutional VAE that begins as a linear one.

A rectifier r of slope a below zero loses nothing of a number with a pair of
channels, x and -x, as r(x) - r(-x) = (1 + a)·x: the looks-linear initialisation
of Balduzzi et al. 2017. With pairs the network of `models.conv` is linear at
first, and it can be the best linear one:

- A convolution gives the principal components of blocks of 2 × 2 pixels, and
  the next one those of 2 × 2 of these, as many as there are pairs of channels.
- The heads take the principal components v of all that is left, of variance λ,
  as the optimal linear VAE does (Lucas et al. 2019, section 4). With a loss of
  ½‖x - x̂‖²/σ² + β·KL and s = β·σ², it has a latent dimension for each λ > s,
    q(z|x) = N(√(λ - s)/λ · v·(x - mean), s/λ),  x̂ = mean + Σ √(λ - s)·z·v.
- The decoder goes the same way back.

What this leaves open is random, as in any run, if nothing of the above depends
on it, and else 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vae import layers

# Where a kernel's taps, in one direction, find the pixels of a block.
_TAPS, _TRANSPOSED_TAPS = (0, 1), (2, 1)


class _Signal(NamedTuple):
  """Numbers, and the channels of a layer that hold them.

  Attributes:
    numbers: [n, height, width, count].
    scale: of a number to its channel, or to the difference of a pair, [count].
    is_paired: whether number i is in the channels i and count + i.
  """

  numbers: np.ndarray
  scale: np.ndarray
  is_paired: bool

  def weights(self, matrix: np.ndarray) -> np.ndarray:
    """Weights of the channels for a matrix [..., count, outputs] of numbers."""
    weights = matrix * self.scale[:, None]
    if self.is_paired:
      weights = np.concatenate([weights, -weights], axis=-2)
    return weights


class _Level(NamedTuple):
  """Principal components of 2 × 2 blocks, as a convolution's output.

  Attributes:
    components: orthonormal, [2, 2, inputs, outputs], the strongest first.
    mean: of the components over all blocks, which BatchNorm takes off.
  """

  components: np.ndarray
  mean: np.ndarray


def initial_variables(
  variables: Any, images: np.ndarray, negative_slope: float, noise: float
) -> tuple[Any, int]:
  """The variables of a `models.conv` that is the linear VAE of some images.

  Args:
    variables: the random ones.
    images: [n, height, width, channels] in [0, 1].
    negative_slope: of the rectifiers.
    noise: s, in the module's words.

  Returns:
    The variables, and the number of latent dimensions that hold something.
  """
  variables = jax.tree.map(np.array, jax.device_get(variables))
  encoder, decoder = (
    _Network(
      variables['params'][name],
      variables.get('batch_stats', {}).get(name, {}),
      negative_slope,
    )
    for name in ('encoder', 'decoder')
  )
  signal, levels = _set_convolutions(encoder, images)
  signal, count = _set_dense(encoder, decoder, signal, levels, noise)
  _set_transposed_convolutions(decoder, signal, levels)
  return variables, count


class _Network(NamedTuple):
  """Encoder or decoder, whose arrays are changed in place."""

  params: dict
  statistics: dict
  negative_slope: float

  def set_layer(
    self,
    name: str,
    index: int,
    weights: np.ndarray,
    taps: tuple[int, int],
    outputs: np.ndarray,
    shift: np.ndarray | float = 0.0,
  ) -> _Signal:
    """Sets a convolution and its normalisation, for pairs of channels.

    Args:
      name: of the kind of convolution.
      index: of the layer.
      weights: from channels to numbers, [2, 2, inputs, count].
      taps: where the kernel has them.
      outputs: the numbers that they make, [n, height, width, count].
      shift: mean that the numbers have in the end, [count].
    """
    convolution = self.params[f'{name}_{index}']
    norm, statistics = (
      tree[f'BatchNorm_{index}'] for tree in (self.params, self.statistics)
    )
    kernel, pairs = convolution['kernel'], 2 * weights.shape[-1]
    both = np.concatenate([weights, -weights], axis=-1)
    # As large as the random weights, which the optimiser's steps go with.
    factor = np.linalg.norm(kernel[..., :pairs]) / np.linalg.norm(both)
    kernel[..., :pairs] = 0
    inputs = range(both.shape[2])
    kernel[np.ix_(taps, taps, inputs, range(pairs))] = factor * both
    # Channels without a pair feed none that has one.
    convolution['bias'][:pairs] = 0
    mean, variance = outputs.mean((0, 1, 2)), outputs.var((0, 1, 2))
    statistics['mean'][:pairs] = factor * _pair(mean)
    statistics['var'][:pairs] = factor**2 * np.tile(variance, 2)
    deviation = np.sqrt(variance + layers.EPSILON / factor**2)
    norm['bias'][:pairs] = _pair(shift / deviation)
    scale = deviation / (1 + self.negative_slope)
    return _Signal(outputs - mean + shift, scale, True)


def _set_convolutions(
  encoder: _Network, images: np.ndarray
) -> tuple[_Signal, list[_Level]]:
  """Sets the encoder but for its heads; returns what they see."""
  levels: list[_Level] = []
  signal = _Signal(images, np.ones(images.shape[-1]), False)
  while f'Conv_{len(levels)}' in encoder.params:
    index = len(levels)
    blocks = _blocks(signal.numbers)
    kernel = encoder.params[f'Conv_{index}']['kernel']
    count = min(blocks.shape[-1], kernel.shape[-1] // 2)
    _, components = _principal(blocks.reshape(-1, blocks.shape[-1]))
    components = components[:, :count]
    outputs = blocks @ components
    components = components.reshape(2, 2, -1, count)
    levels.append(_Level(components, outputs.mean((0, 1, 2))))
    signal = encoder.set_layer(
      'Conv', index, signal.weights(components), _TAPS, outputs
    )
  return signal, levels


def _set_dense(
  encoder: _Network,
  decoder: _Network,
  signal: _Signal,
  levels: Sequence[_Level],
  noise: float,
) -> tuple[_Signal, int]:
  """Sets the heads and the decoder's dense layer; returns what that makes."""
  shape = signal.numbers.shape[1:]
  flat = signal.numbers.reshape(len(signal.numbers), -1)
  mean = flat.mean(0)
  variances, axes = _principal(flat - mean)
  heads = encoder.params['mean'], encoder.params['logvar']
  latent_dim = len(heads[0]['bias'])
  count = min(latent_dim, int(np.sum(variances > noise)))
  variances, axes = variances[:count], axes[:, :count]
  signal_part = np.sqrt(variances - noise)

  # q(z|x).
  encode = axes * signal_part / variances
  for head in heads:
    head['kernel'][:], head['bias'][:] = 0, 0
  weights = signal.weights(encode.reshape(*shape, count))
  kernel = heads[0]['kernel'].reshape(*shape[:2], -1, latent_dim)
  kernel[:, :, : weights.shape[2], :count] = weights
  heads[0]['bias'][:count] = -mean @ encode
  heads[1]['bias'][:count] = np.log(noise / variances)

  # p(x|z). Draws of z for the statistics of the layers that follow.
  z = (flat - mean) @ encode
  draws = np.random.default_rng(0).normal(size=z.shape)
  z += np.sqrt(noise / variances) * draws
  decode = (axes * signal_part).T.reshape(count, *shape)
  mean = mean.reshape(shape) + (levels[-1].mean if levels else 0)
  dense = decoder.params['Dense_0']
  kernel = dense['kernel'].reshape(latent_dim, *shape[:2], -1)
  kernel[..., : shape[2]] = 0
  kernel[:count, ..., : shape[2]] = decode
  dense['bias'].reshape(*shape[:2], -1)[..., : shape[2]] = mean
  numbers = np.tensordot(z, decode, 1) + mean
  return _Signal(numbers, np.ones(shape[2]), False), count


def _set_transposed_convolutions(
  decoder: _Network, signal: _Signal, levels: Sequence[_Level]
) -> None:
  """Sets the rest of the decoder."""
  if not levels:
    return
  for index, level in enumerate(reversed(levels)):
    name = 'ConvTranspose'
    width = decoder.params[f'{name}_{index}']['kernel'].shape[-1]
    count = min(level.components.shape[2], width // 2)
    components = level.components[:, :, :count, : signal.numbers.shape[-1]]
    outputs = _pixels(np.tensordot(signal.numbers, components, (3, 3)))
    mean, shift = outputs.mean((0, 1, 2)), 0.0
    if index + 1 < len(levels):
      # The encoder took it off; the next components are of numbers with it.
      shift = mean + levels[-2 - index].mean[:count]
    weights = signal.weights(components.swapaxes(2, 3))
    signal = decoder.set_layer(
      name, index, weights, _TRANSPOSED_TAPS, outputs, shift
    )
  last = decoder.params['Conv_0']
  weights = signal.weights(np.eye(count))
  last['kernel'][:] = 0
  last['kernel'][1, 1, : len(weights)] = weights
  last['bias'][:] = mean


def _pair(values: np.ndarray) -> np.ndarray:
  return np.concatenate([values, -values], axis=-1)


def _blocks(pixels: np.ndarray) -> np.ndarray:
  """[n, height, width, count] as [n, height/2, width/2, 2 · 2 · count]."""
  n, height, width, count = pixels.shape
  blocks = pixels.reshape(n, height // 2, 2, width // 2, 2, count)
  return blocks.swapaxes(2, 3).reshape(n, height // 2, width // 2, -1)


def _pixels(blocks: np.ndarray) -> np.ndarray:
  """[n, height, width, 2, 2, count] as [n, 2 · height, 2 · width, count]."""
  n, height, width, _, _, count = blocks.shape
  return blocks.swapaxes(2, 3).reshape(n, 2 * height, 2 * width, count)


def _principal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean squares along the principal axes of [n, size] and the axes in columns.

  The largest first; of all axes those that are not 0 by the number of rows.
  """
  n, size = x.shape
  if n >= size:
    squares, axes = np.linalg.eigh(x.T @ x / n)
    return squares[::-1], axes[:, ::-1]
  squares, rows = np.linalg.eigh(x @ x.T / n)
  kept = squares > 1e-6 * squares[-1]
  squares, rows = squares[kept][::-1], rows[:, kept][:, ::-1]
  return squares, x.T @ rows / np.sqrt(n * squares)
