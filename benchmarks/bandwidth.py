"""The bound that memory sets to the speed of a training step."""

import statistics
import time

import jax
import jax.numpy as jnp

from vae import models, steps


def minimum_bytes(config, batch_size: int, dtype: str, fused: bool) -> int:
  """Least number of bytes that a training step moves through device memory.

  Let an image have D numbers and the decoder's dense layer F outputs; the
  convolutions before a BatchNorm have A outputs together; the parameters are
  P, and a number of the dtype has s bytes. BatchNorm needs the statistics of
  the whole batch before its first output, so that each of the A numbers has to
  be in memory in between, and each of their gradients. Latents are left out,
  and so are repeated reads within a kernel. Small batches can stay in a GPU's
  cache, and then a step can be faster.

  `fused=False`, convolutions of a library, which read arrays and write one, and
  all else fused as far as the statistics allow. Each number x before a
  BatchNorm, with y after it and the rectifier, is
    written by its convolution, read for the statistics, read to be normalised
      (y written), y read by the next convolution: 5;
    in the gradient, dy written by the next convolution's gradient for its
      input, y read for that for its kernel, x and dy read for BatchNorm's two
      sums, x and dy read to make dx, which is written and read by this
      convolution's two gradients: 9.
  With 6·F·s for the dense layer, 5·D·s for outputs and loss and (2 + 3·s)·D for
  the images it is (14·A + 6·F + 8·D)·s + 2·D bytes an image.

  `fused=True`, every conceivable fusion: a convolution normalises its inputs
  and sums the statistics of its outputs, and its two gradients are one kernel.
  x is written and read, in the gradient it is read by both neighbours, and dy
  is written and read: (6·A + 5·F + 2·D)·s + 3·D bytes. No library has this.

  Both: parameters, gradient and Adam's two moments in float32, 40·P bytes.

  Args:
    config: of the run.
    batch_size: images of a step.
    dtype: of the activations.
    fused: which of the two is counted.
  """
  size, widths = config.data.image_size, list(config.model.hidden_channels)
  image = size**2 * config.data.channels
  # Outputs of the encoder's convolutions, then of the decoder's mirror image.
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
  program = steps.Program(models.from_config(config))
  num_parameters = steps.num_parameters(steps.abstract_state(program))
  return batch_size * per_image + 40 * num_parameters


def copy_bandwidth(num_bytes: int) -> float:
  """Bytes per second, read and written, of x + 1 in place; a median."""
  increment = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = increment(jnp.zeros(num_bytes // 4, jnp.float32))
  seconds = []
  for _ in range(10):
    jax.block_until_ready(x)
    start = time.perf_counter()
    # Ten, so that the dispatches to a GPU overlap.
    for _ in range(10):
      x = increment(x)
    jax.block_until_ready(x)
    seconds.append((time.perf_counter() - start) / 10)
  return 2 * x.nbytes / statistics.median(seconds)
