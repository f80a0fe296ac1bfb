"""How fast a training step can be at most, where memory is what limits it."""

from collections.abc import Sequence
import math
import statistics
import time

import jax
import jax.numpy as jnp

from vae import model as models


def minimum_bytes(config, batch_size: int, dtype: str, fused: bool) -> int:
  """Bytes that a training step moves through device memory at least.

  The article's network does few operations for each number that it moves: on
  a GPU the step is limited by memory. Let an image have D numbers and the
  decoder's dense layer F outputs; the convolutions before a BatchNorm have A
  outputs together; the parameters are P, and a number of the dtype has s
  bytes. BatchNorm needs the statistics of the whole batch before it can give a
  first number, so that each of these A numbers has to be in memory in between,
  and each of their gradients. Counted are the arrays that grow with the batch
  and the parameters; not the latents (128 numbers beside 256,000), and nothing
  twice that a kernel reads twice (the taps of a convolution). Arrays that a
  GPU's cache can hold, those of small batches, need not move: there a step can
  be faster than this.

  `fused=False`: the convolutions are kernels of a library, that read arrays and
  write one. All between two convolutions is fused as far as the statistics
  allow. Each number x before a BatchNorm, with y after it and the rectifier, is
    written by its convolution, read for the statistics, read to be normalised
      (y written), y read by the next convolution: 5;
    in the gradient, dy written by the next convolution's gradient with respect
      to its input, y read for that with respect to its kernel, x and dy read
      for BatchNorm's two sums, x and dy read to be made dx, which is written,
      and read by this convolution's two gradients: 9;
  together 14·A·s bytes. The dense layer's outputs are written, read, read for
  the kernel's gradient; their gradient is written, and read twice: 6·F·s. The
  decoder's outputs are written, read by the loss, which writes their gradient,
  which is read twice: 5·D·s. The images, of one byte, are read, written in the
  dtype, read by the first convolution and for its kernel's gradient; and once
  more as bytes by the loss: (2 + 3·s)·D.

  `fused=True`: every fusion that one could think of. A convolution normalises
  and rectifies what it reads, and sums the statistics of what it writes; the
  two gradients of a convolution are one kernel, which makes dx of x and dy as
  it reads them. Then y and dx are never in memory: x is written and read; in
  the gradient it is read by both neighbours, dy is written and read: 6·A·s.
  Likewise 5·F·s, 2·D·s (the loss is part of the last convolution, and only the
  outputs' gradient is stored), and 3·D. No library has such kernels.

  Both: the parameters, float32, are read forwards and backwards; their gradient
  is written; Adam reads it, the parameters and its two moments, and writes
  these three: 40·P.

  Args:
    config: of the run.
    batch_size: images of a step.
    dtype: of the activations.
    fused: which of the two is counted.
  """
  size, widths = config.data.image_size, list(config.model.hidden_channels)
  image = size**2 * config.data.channels
  # Of the encoder's convolutions, then of the decoder's, which mirror them.
  encoder = [c * (size >> (i + 1)) ** 2 for i, c in enumerate(widths)]
  decoder = [
    c * (size >> i) ** 2 for i, c in enumerate([widths[0], *widths[:-1]])
  ]
  start = encoder[-1]
  normalised = sum(encoder) + sum(decoder)
  s = jnp.dtype(dtype).itemsize
  if fused:
    per_image = (6 * normalised + 5 * start + 2 * image) * s + 3 * image
  else:
    per_image = (14 * normalised + 6 * start + 8 * image) * s + 2 * image
  return batch_size * per_image + 40 * _num_parameters(config)


def copy_bandwidth(num_bytes: int) -> float:
  """Bytes a second, read and written, of x + 1 in place; a median."""
  increment = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = increment(jnp.zeros(num_bytes // 4, jnp.float32))
  seconds = []
  for _ in range(10):
    jax.block_until_ready(x)
    start = time.perf_counter()
    # Several, so that a GPU is not waited for each time.
    for _ in range(10):
      x = increment(x)
    jax.block_until_ready(x)
    seconds.append((time.perf_counter() - start) / 10)
  return 2 * x.nbytes / statistics.median(seconds)


def _num_parameters(config) -> int:
  model = models.from_config(config)
  images = jnp.zeros((1, *model.image_shape))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
  sizes: Sequence[int] = [math.prod(s.shape) for s in jax.tree.leaves(shapes)]
  return sum(sizes)
