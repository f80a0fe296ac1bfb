"""What is measured of each image of a split, over all devices.

As in training, every random draw is a function of the key and the image's
position in its split: neither batch size nor devices change a number but by
rounding.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from evaluation import bounds
from evaluation import image_quality
from vae import devices
from vae import distributions
from vae import randomness
from vae import splits
from vae import steps

# Draws of z per image for the expectations under the posterior. The error of
# their mean over a split is far below that of the choice of images.
NUM_DRAWS = 8

# Images that are decoded at a time, on each device, for the importance-
# weighted bound: its memory, whatever the number of samples.
_DECODED_AT_ONCE = 128

# Of an image, [devices, per_device_batch, …] each.
Values = dict[str, jax.Array]


@functools.lru_cache(maxsize=8)
def make_measure_step(
  model: nn.Module, sample_posterior: bool, num_draws: int = NUM_DRAWS
) -> Callable[..., Values]:
  """Compiles what is measured of a batch in one pass.

  Args:
    model: the model.
    sample_posterior: whether z is drawn from q(z|x), or is its mean.
    num_draws: of z, for each image.

  Returns:
    A function of
      variables: parameters and statistics;
      key: of the draws;
      images: uint8 [devices, per_device_batch, height, width, channels];
      start: position in the split of the batch's first image;
    that returns, each [devices, per_device_batch, …],
      mean, logvar: of q(z|x), [latent_dim];
      distortion: E_q[-log p(x|z)], nats;
      squared_error, dequantised_squared_error: E_q‖x - x̂‖², of x in [0, 1]
        and of the dequantised image;
      mse, psnr, ssim: of the reconstruction through the posterior mean, cut
        to [0, 1]; no ssim for images smaller than its window.
  """

  def measure(vae, images, keys):
    x = steps.to_unit_range(images, steps.float_dtype(vae))
    y = bounds.dequantise(images, _uniform(keys, images.shape[1:]))
    posterior = vae.encode(x)
    mean, logvar = posterior.mean, posterior.logvar

    def draw(i):
      z = mean
      if sample_posterior:
        (z,) = posterior.sample(randomness.fold_in(keys, i + 1))
      likelihood = vae.decode(z)
      decoded = likelihood.mean
      return {
        'distortion': -likelihood.log_prob(x),
        'squared_error': _squared_error(x, decoded),
        'dequantised_squared_error': _squared_error(y, decoded),
      }

    draws = lax.map(draw, jnp.arange(num_draws if sample_posterior else 1))
    values = jax.tree.map(lambda a: a.mean(axis=0), draws)
    reconstruction = jnp.clip(vae.decode(mean).mean, 0, 1)
    values |= {
      'mean': mean,
      'logvar': logvar,
      'mse': image_quality.mean_squared_error(x, reconstruction),
      'psnr': image_quality.psnr(x, reconstruction),
    }
    if min(vae.image_shape[:2]) >= image_quality.WINDOW:
      values['ssim'] = image_quality.ssim(x, reconstruction)
    return values

  def step(variables, key, images, start):
    keys = _keys(key, start, len(images))
    return nn.apply(measure, model)(variables, images, keys)

  return jax.pmap(step, axis_name=devices.AXIS, in_axes=(None, None, 0, None))


@functools.lru_cache(maxsize=8)
def make_bound_step(model: nn.Module) -> Callable[..., Values]:
  """Compiles the importance-weighted bounds of a batch.

  Memory does not grow with the number of samples: they are drawn, decoded and
  summed in chunks.

  Returns:
    A function of
      variables, key, images, start: as of `make_measure_step`;
      num_samples: K;
      sigma: of a Gaussian likelihood of the dequantised images;
    that returns, each [devices, per_device_batch],
      bound: L_K of the image in [0, 1] under the model's own likelihood, nats;
      effective_sample_size: of its weights;
      half_bounds: L_K/2 of either half of the draws, [2];
      dequantised_bound, dequantised_effective_sample_size,
      dequantised_half_bounds: of the dequantised image under N(x̂, σ²).
  """

  def bound(vae, images, keys, num_samples, sigma):
    batch = len(images)
    chunk = max(1, _DECODED_AT_ONCE // batch)
    dtype = steps.float_dtype(vae)
    x = steps.to_unit_range(images, dtype)
    y = bounds.dequantise(images, _uniform(keys, images.shape[1:]))
    posterior, prior = vae.encode(x), vae.prior()

    def body(start, end, i, sums):
      ks = start + i * chunk + jnp.arange(chunk)
      z = jax.vmap(
        lambda k: posterior.sample(randomness.fold_in(keys, k + 1))[0]
      )(ks)
      likelihood = vae.decode(z)
      dequantised = distributions.Gaussian(likelihood.mean, sigma)
      log_likelihoods = jnp.stack(
        [likelihood.log_prob(x), dequantised.log_prob(y)], axis=1
      )
      ratio = prior.log_prob(z) - posterior.log_prob(z)
      log_weights = log_likelihoods + ratio[:, None]
      return sums.add(log_weights, ks < end)

    def sum_half(limits):
      start, end = limits
      sums = bounds.WeightSums.none((2, batch), dtype)
      num_chunks = -(-(end - start) // chunk)
      body_of_half = functools.partial(body, start, end)
      return lax.fori_loop(0, num_chunks, body_of_half, sums)

    middle = (num_samples + 1) // 2
    starts, ends = jnp.array([0, middle]), jnp.array([middle, num_samples])
    halves = lax.map(sum_half, (starts, ends))
    sums = halves.merge()
    values, sizes = sums.bound(), sums.effective_sample_size()
    of_halves = jax.vmap(bounds.WeightSums.bound)(halves)
    found = {}
    for i, prefix in enumerate(('', 'dequantised_')):
      found[f'{prefix}bound'] = values[i]
      found[f'{prefix}effective_sample_size'] = sizes[i]
      found[f'{prefix}half_bounds'] = of_halves[:, i].T
    return found

  def step(variables, key, images, start, num_samples, sigma):
    keys = _keys(key, start, len(images))
    return nn.apply(bound, model)(variables, images, keys, num_samples, sigma)

  return jax.pmap(
    step, axis_name=devices.AXIS, in_axes=(None, None, 0, None, None, None)
  )


def over_split(
  step: Callable[..., Any],
  split: splits.Split,
  batch_size: int,
  progress: Callable[[int], None] = lambda done: None,
) -> Any:
  """Applies a step to every image of a split, in order.

  Args:
    step: a function of images [devices, per_device_batch, height, width,
      channels] and the position of the first, that returns a tree of arrays
      [devices, per_device_batch, …].
    split: to be gone through.
    batch_size: global, at most.
    progress: told how many images are done.

  Returns:
    The tree of numpy arrays [num_examples, …].
  """
  topology = devices.Topology(jax.local_device_count())
  collected, running = [], None

  def collect(result):
    collected.append(
      jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[2:]), jax.device_get(result)
      )
    )

  for images, start in splits.eval_batches(split, batch_size, topology):
    ahead = step(images, start)
    # One batch behind, so that the device always has its next one.
    if running is not None:
      collect(running)
      progress(start)
    running = ahead
  collect(running)
  progress(split.num_examples)
  return jax.tree.map(
    lambda *parts: np.concatenate(parts)[: split.num_examples], *collected
  )


def _keys(key: jax.Array, start: jax.Array, per_device: int) -> jax.Array:
  """A key for each image of this device, by its position; [per_device]."""
  positions = start + randomness.global_positions(devices.AXIS, per_device)
  return randomness.example_keys(key, positions)


def _uniform(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The noise of each image's dequantisation, [batch, …]."""
  return randomness.uniform(randomness.fold_in(keys, 0), shape)


def _squared_error(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(a - b), axis=(-3, -2, -1))
