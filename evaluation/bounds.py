"""Bounds on log p(x), nats per image, and their units.

The ELBO bounds log p(x) of an image from below, the importance-weighted bound
(Burda et al. 2016) more tightly.
"""

from collections.abc import Callable, Iterable
import functools
import math

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from evaluation import reconstruction
from vae import (
  conditioning,
  devices,
  distributions,
  likelihoods,
  numerics,
)

_NATS, _BITS = 'nats per image', 'bits per dimension'
_OPTIMAL = 'the optimal σ, which is fitted to the same images'

# Pixel values that each device decodes at a time: the memory of the bound,
# whatever the number of samples. And between two lines of progress.
_DECODED_AT_ONCE = 128 * 64 * 64 * 3
_DECODED_PER_DISPATCH = 20_000 * 64 * 64 * 3


def evaluate(context, results) -> None:
  """Adds ELBO, importance-weighted bound, and bits of a model of pixels."""
  if not context.draws_z:
    return
  sigma = add_elbo(results, context, context.images)
  _add_importance_weighted(results, context, sigma)
  train, measured = (
    split.batches(np.arange(split.num_examples), context.settings.batch_size)
    for split in (context.data.train, context.split)
  )
  log_prob = pixel_gaussian(train, measured)
  bits = bits_per_dimension(log_prob, np.prod(context.split.image_shape))
  about = 'for comparison: independent Gaussian pixels of the train split'
  results.mean('bits_per_dim_pixel_gaussian', bits, _BITS, about)


def add_elbo(results, context, values: dict[str, np.ndarray]) -> float:
  """Adds the ELBO and its parts, also under the best Gaussian likelihood.

  Returns σ of that likelihood of the dequantised images.
  """
  dimensions = int(np.prod(context.split.image_shape))
  names = 'rate', 'distortion', 'squared_error', 'dequantised_squared_error'
  rate, distortion, squares, dequantised = (
    values[name].astype(np.float64) for name in names
  )
  results.mean('elbo', -distortion - rate, _NATS, '-distortion - rate')
  about = 'KL(q(z|x) ‖ p(z))'
  if isinstance(context.trained.prior, distributions.SecondStage):
    about += ', at most: log p(z) is bounded by draws'
  results.mean('rate', rate, _NATS, about)
  results.mean('distortion', distortion, _NATS, 'E_q[-log p(x|z)]')
  if values['is_mass'].all():
    bits = (distortion + rate) / (dimensions * np.log(2))
    about = 'of the images themselves, by the ELBO'
    results.mean('bits_per_dim', bits, _BITS, about)
  elif not values['is_density'].all():
    results.notes.append(
      'log p(x): the cross-entropy of grey values, in elbo, distortion and '
      'iw_bound, is not a density (its normaliser is missing); compare models '
      'by the values at the optimal σ.'
    )

  # The yardstick that models of any σ and likelihood share.
  elbo, best_sigma = elbo_optimal_sigma(rate, squares, dimensions)
  sigma = optimal_sigma(dequantised.mean() / dimensions)
  if 'sigma' in values:
    # The shortest decimal of the float32.
    model_sigma = float(str(values['sigma'][0]))
    results.number('sigma', model_sigma, 'of [0, 1]', "the likelihood's σ")
  about = 'σ of the best Gaussian likelihood, fitted to the same images'
  results.number('optimal_sigma', best_sigma, 'of [0, 1]', about)
  about = f'ELBO of the Gaussian likelihood at {_OPTIMAL}'
  results.mean('elbo_optimal_sigma', elbo, _NATS, about)

  def in_bits(name, sigma, about):
    log_prob = -gaussian_distortion(dequantised, dimensions, sigma) - rate
    bits = bits_per_dimension(log_prob, dimensions)
    results.mean(name, bits, _BITS, f'dequantised, ELBO at {about}')

  if 'sigma' in values:
    in_bits('bits_per_dim', model_sigma, "the model's σ")
  in_bits('bits_per_dim_optimal_sigma', sigma, _OPTIMAL)
  return sigma


def elbo_optimal_sigma(
  rate: np.ndarray, squares: np.ndarray, dimensions: int
) -> tuple[np.ndarray, float]:
  """The ELBO of each image under the best Gaussian likelihood, and its σ.

  Of rates [n], nats, and squared errors [n], summed over the dimensions.
  """
  sigma = optimal_sigma(squares.mean() / dimensions)
  return -gaussian_distortion(squares, dimensions, sigma) - rate, sigma


def _add_importance_weighted(results, context, sigma: float) -> None:
  num_samples = context.settings.num_importance_samples
  step = make_bound_step(
    context.trained.model, num_samples, context.binarize, context.is_binary
  )
  key = numerics.bound_key(context.settings.seed)
  # Few images at a time if each takes long, so that progress shows.
  pixels = math.prod(context.split.image_shape)
  at_once = max(1, _DECODED_PER_DISPATCH // (num_samples * pixels))
  weighted = context.over_split(
    lambda images, start: step(context.variables, key, images, start, sigma),
    f'importance-weighted bound, K = {num_samples:,}',
    batch_size=min(
      context.settings.batch_size, at_once * jax.local_device_count()
    ),
  )
  dimensions = int(np.prod(context.split.image_shape))
  bounded = [('iw_bound', _NATS, 'log p(x) ≥ L_K')]
  if context.is_binary:
    results.notes.append('bits_per_dim_iw: the images are black and white.')
  else:
    about = f'dequantised, L_K at {_OPTIMAL}'
    bounded.append(('bits_per_dim_iw', _BITS, about))
  for i, (name, unit, about) in enumerate(bounded):
    bound, halves, sizes = (
      weighted[key][:, i].astype(np.float64)
      for key in ('bound', 'half_bounds', 'sample_size')
    )
    if unit == _BITS:
      bound = bits_per_dimension(bound, dimensions)
      halves = bits_per_dimension(halves, dimensions)
    results.mean(name, bound, unit, f'{about}, K = {num_samples:,}')
    if num_samples > 1:  # Else there are no two halves.
      error = np.sqrt(monte_carlo_variance(halves).sum()) / len(halves)
      about = f'of {name} over draws of z, at most: from their two halves'
      results.number(f'{name}_monte_carlo_error', error, unit, about)
    about = f'effective sample size of the weights of {name}'
    name = f'{name.removesuffix("_bound")}_effective_samples'
    results.number(name, sizes.mean(), f'of {num_samples:,}', about)


@functools.lru_cache(maxsize=8)
def make_bound_step(
  model: nn.Module,
  num_samples: int,
  binarize: bool = False,
  is_binary: bool = False,
) -> Callable[..., dict[str, jax.Array]]:
  """Compiles the importance-weighted bounds of a batch.

  Returns:
    A function with the arguments of `reconstruction.make_step`'s, and σ of a
    Gaussian around the mean images. Under the model's own likelihood of the
    image and, unless the images are binary, under that Gaussian of the
    dequantised image, it returns L_K as `bound`, nats, [devices,
    per_device_batch, 2 or 1], the `sample_size` that its weights are worth
    likewise, and L_K/2 of either half of the draws as `half_bounds`, […, 2 or
    1, 2].
  """

  def step(variables, key, images, start, sigma):
    at = reconstruction.positions(start, len(images))
    keys = numerics.example_keys(key, at)
    x = reconstruction.unit_range(model, images, at, binarize)
    y = None if is_binary else reconstruction.dequantise(images, keys)
    log_weights = nn.apply(_log_weights, model)(
      conditioning.at(variables, at), x, y, keys, num_samples, sigma
    )
    bound, sample_size = weigh(log_weights)
    # One sample alone has no second half.
    middle = (num_samples + 1) // 2 % num_samples
    halves = log_weights[: middle or 1], log_weights[middle:]
    half_bounds = jnp.stack([weigh(half)[0] for half in halves], axis=-1)
    return {
      'bound': bound,
      'sample_size': sample_size,
      'half_bounds': half_bounds,
    }

  return jax.pmap(
    step, axis_name=devices.AXIS, in_axes=(None, None, 0, None, None)
  )


def _log_weights(vae, x, y, keys, num_samples, sigma) -> jax.Array:
  """log p(x|z) p(z) / q(z|x), also with y in the place of x; [K, batch, …]."""
  posterior, prior = vae.encode(x), vae.prior()
  draw = functools.partial(reconstruction.draw_z, posterior, keys)
  of_prior = lambda z, k: reconstruction.log_prior(prior, z, keys, k)

  def log_weights(ks):
    z = jax.vmap(draw)(ks)
    log_prior = jax.vmap(of_prior)(z, ks)
    likelihood = vae.decode(z)
    log_p = [likelihood.log_prob(x)]
    if y is not None:
      log_p.append(likelihoods.Gaussian(likelihood.mean, sigma).log_prob(y))
    log_ratio = log_prior - posterior.log_prob(z)
    return jnp.stack(log_p, axis=-1) + log_ratio[..., None]

  num_chunks = -(-num_samples // max(1, _DECODED_AT_ONCE // x.size))
  chunk = -(-num_samples // num_chunks)  # As even as they can be.
  ks = jnp.arange(num_chunks * chunk).reshape(-1, chunk)
  chunks = lax.map(log_weights, ks).astype(x.dtype)
  return chunks.reshape(-1, *chunks.shape[2:])[:num_samples]


def weigh(log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The bound of K weights, log w [K, …], and their effective sample size.

  L_K = log (1/K) Σ w; Burda et al. 2016, equation 8. (Σ w)² / Σ w², from 1 to
  K, is the number of equal weights that are worth as much.
  """
  # As log w of a large image has many nats, weights are relative to the
  # greatest: float32 has too few digits for the logarithms of both sums.
  log_maximum = log_weights.max(axis=0)
  weights = jnp.exp(log_weights - log_maximum)
  bound = log_maximum + jnp.log(weights.mean(axis=0))
  return bound, weights.sum(axis=0) ** 2 / jnp.square(weights).sum(axis=0)


def monte_carlo_variance(half_bounds: np.ndarray) -> np.ndarray:
  """Variance of L_K over draws of z, at most, from L_K/2 of halves [..., 2].

  Half the square of their difference is expected to be the variance of L_K/2,
  up to twice that of L_K. Unlike the delta method, 1 / (effective sample size)
  - 1 / K, this holds if a single weight outweighs all others too.
  """
  return np.square(np.diff(half_bounds, axis=-1))[..., 0] / 2


def optimal_sigma(mse: float) -> float:
  """σ that maximises the ELBO; Rybkin et al. 2021, section 3.2.

  σ² is the mean squared error over images, pixels and draws of z.
  """
  # A perfect reconstruction would have an infinite density.
  return float(np.sqrt(max(mse, np.finfo(np.float32).tiny)))


def gaussian_distortion(
  squared_errors: np.ndarray, dimensions: int, sigma: float
) -> np.ndarray:
  """-log N(x; x̂, σ² I) from ‖x - x̂‖², nats."""
  log_normalizer = dimensions * (np.log(sigma) + 0.5 * np.log(2 * np.pi))
  return squared_errors / (2 * sigma**2) + log_normalizer


def bits_per_dimension(log_prob: np.ndarray, dimensions: int) -> np.ndarray:
  """Bits that an 8-bit image costs under a density of dequantised images.

  -log p(y) / (D ln 2) + 8, with log p(y), or a lower bound on it, in nats.
  """
  return -log_prob / (dimensions * np.log(2)) + 8


def pixel_gaussian(
  train: Iterable[np.ndarray], measured: Iterable[np.ndarray]
) -> np.ndarray:
  """E_u log p((x + u) / 256) of independent Gaussian pixels, nats.

  The baseline of any model: mean and variance of each pixel are those of the
  dequantised training images. Of batches uint8 [batch, height, width,
  channels]; returns [num_measured].
  """
  noise = 1 / (12 * 256**2)  # Variance of u / 256.
  # Compiling the bounds (benchmarks/tpu_compile.py) needs no scikit-learn.
  from sklearn.preprocessing import StandardScaler

  moments = StandardScaler()
  for images in train:
    moments.partial_fit(images.reshape(len(images), -1).astype(np.float64))
  variance = moments.var_ / 256**2 + noise
  log_probs = []
  for images in measured:
    differences = images.reshape(len(images), -1) - moments.mean_
    errors = (differences / 256) ** 2 + noise
    density = errors / variance + np.log(2 * np.pi * variance)
    log_probs.append(-0.5 * density.sum(axis=1))
  return np.concatenate(log_probs)
