"""Bounds on log p(x), nats per image, and their units.

The ELBO bounds log p(x) of an image from below, the importance-weighted bound
(Burda et al. 2016) more tightly.
"""

from collections.abc import Callable
import functools

from flax import linen as nn
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from evaluation import reconstruction
from vae import devices, distributions, numerics, steps

_NATS, _BITS = 'nats per image', 'bits per dimension'
_OPTIMAL = 'the optimal σ, which is fitted to the same images'

# Below this effective sample size a bound is called loose.
_FEW_SAMPLES = 10

# Images that each device decodes at a time: the memory of the bound, whatever
# the number of samples. And between two lines of progress.
_DECODED_AT_ONCE = 128
_DECODED_PER_DISPATCH = 20_000


def evaluate(context, results) -> None:
  """Adds ELBO, importance-weighted bound, and bits of a model of pixels."""
  if not context.draws_z:
    return
  sigma = add_elbo(results, context, context.images)
  _add_importance_weighted(results, context, sigma)
  size, baseline = context.settings.batch_size, PixelGaussian()
  train, split = context.data.train, context.split
  for batch in train.batches(np.arange(train.num_examples), size):
    baseline.add(batch)
  log_probs = [
    baseline.log_prob(batch)
    for batch in split.batches(np.arange(split.num_examples), size)
  ]
  results.mean(
    'bits_per_dim_pixel_gaussian',
    bits_per_dimension(np.concatenate(log_probs), np.prod(split.image_shape)),
    _BITS,
    'for comparison: independent Gaussian pixels, fitted to the train split',
  )


def add_elbo(results, context, values: dict[str, np.ndarray]) -> float:
  """Adds the ELBO and its parts, also under the best Gaussian likelihood.

  Returns σ of the best Gaussian around the dequantised images; `values` are
  those of `reconstruction.make_step`, [num_images, …] each.
  """
  dimensions = int(np.prod(context.split.image_shape))
  names = 'rate', 'distortion', 'squared_error', 'dequantised_squared_error'
  rate, distortion, squares, dequantised = (
    values[name].astype(np.float64) for name in names
  )
  results.mean('elbo', -distortion - rate, _NATS, '-distortion - rate')
  results.mean('rate', rate, _NATS, 'KL(q(z|x) ‖ p(z))')
  results.mean('distortion', distortion, _NATS, 'E_q[-log p(x|z)]')
  if not values['is_density'].all():
    results.notes.append(
      'log p(x): the cross-entropy of grey values, in elbo, distortion and '
      'iw_bound, is no density (its normaliser is missing); compare models by '
      'what is at the optimal σ.'
    )

  # The yardstick that models of any σ and likelihood share.
  best_sigma = optimal_sigma(squares.mean() / dimensions)
  sigma = optimal_sigma(dequantised.mean() / dimensions)
  if 'sigma' in values:
    # Of float32 the digits that it has.
    model_sigma = float(str(values['sigma'][0]))
    results.number('sigma', model_sigma, 'of [0, 1]', "the likelihood's σ")
  results.number(
    'optimal_sigma',
    best_sigma,
    'of [0, 1]',
    'σ of the best Gaussian likelihood around these reconstructions, fitted to '
    'the same images',
  )
  results.mean(
    'elbo_optimal_sigma',
    -gaussian_distortion(squares, dimensions, best_sigma) - rate,
    _NATS,
    f'ELBO of the Gaussian likelihood at {_OPTIMAL}',
  )

  def in_bits(name, sigma, about):
    log_prob = -gaussian_distortion(dequantised, dimensions, sigma) - rate
    bits = bits_per_dimension(log_prob, dimensions)
    results.mean(name, bits, _BITS, f'dequantised, ELBO at {about}')

  if 'sigma' in values:
    in_bits('bits_per_dim', model_sigma, "the model's σ")
  in_bits('bits_per_dim_optimal_sigma', sigma, _OPTIMAL)
  return sigma


def _add_importance_weighted(results, context, sigma: float) -> None:
  """Adds the bound L_K on log p(x), under two likelihoods."""
  num_samples = context.settings.num_importance_samples
  step = make_bound_step(context.trained.model)
  key = numerics.bound_key(context.settings.seed)
  # Few images at a time if each takes long, so that progress shows.
  at_once = max(1, _DECODED_PER_DISPATCH // num_samples)
  weighted = context.over_split(
    lambda images, start: step(
      context.variables, key, images, start, num_samples, sigma
    ),
    f'importance-weighted bound, K = {num_samples:,}',
    batch_size=min(
      context.settings.batch_size, at_once * jax.local_device_count()
    ),
  )
  about = f'log p(x) ≥ L_K, K = {num_samples:,}'
  own, around = ({k: v[:, i] for k, v in weighted.items()} for i in (0, 1))
  add_bound(results, 'iw_bound', own, num_samples, _NATS, about)
  dimensions = int(np.prod(context.split.image_shape))
  bits = {k: bits_per_dimension(v, dimensions) for k, v in around.items()}
  bits['sample_size'] = around['sample_size']
  about = f'dequantised, L_K at {_OPTIMAL}, K = {num_samples:,}'
  add_bound(results, 'bits_per_dim_iw', bits, num_samples, _BITS, about)


def add_bound(
  results,
  name: str,
  weighted: dict[str, np.ndarray],
  num_samples: int,
  unit: str,
  about: str,
) -> None:
  """Adds a bound, its Monte-Carlo error and its effective sample size.

  `weighted` has `bound`, `half_bounds` and `sample_size` of each image, as of
  `make_bound_step`, in this unit; K is `num_samples`.
  """
  bound = weighted['bound'].astype(np.float64)
  halves = weighted['half_bounds'].astype(np.float64)
  size = weighted['sample_size'].mean()
  if num_samples > 1:  # Else there are no two halves.
    about += f'; {bound.mean() - halves.mean():+.2g} from K/2 to K'
  if size < min(_FEW_SAMPLES, num_samples / 2):
    about += (
      f'; a loose bound that still improves with K: of {num_samples:,} '
      f'samples {size:.3g} count'
    )
  results.mean(name, bound, unit, about)
  if num_samples > 1:
    results.number(
      f'{name}_monte_carlo_error',
      np.sqrt(monte_carlo_variance(halves).sum()) / len(bound),
      unit,
      f'of {name}, over draws of z, at most: from two halves of the draws',
    )
  results.number(
    f'{name.removesuffix("_bound")}_effective_samples',
    size,
    f'of {num_samples:,}',
    f'effective sample size of the weights of {name}',
  )


@functools.lru_cache(maxsize=8)
def make_bound_step(model: nn.Module) -> Callable[..., dict[str, jax.Array]]:
  """Compiles the importance-weighted bounds of a batch.

  In chunks of samples, so that memory does not grow with their number.

  Returns:
    A function as of `reconstruction.make_step`, of K and of σ of a Gaussian
    around the mean images, that returns, under the model's own likelihood of
    the image, and under that Gaussian of the dequantised image,
      bound: L_K, nats, [devices, per_device_batch, 2];
      sample_size: effective sample size of its weights, likewise;
      half_bounds: L_K/2 of either half of the draws, […, 2, 2].
  """

  def bound(vae, images, keys, num_samples, sigma):
    chunk = max(1, _DECODED_AT_ONCE // len(images))
    x = steps.to_unit_range(images, steps.float_dtype(vae))
    y = reconstruction.dequantise(images, keys)
    posterior, prior = vae.encode(x), vae.prior()
    draw = functools.partial(reconstruction.draw_z, posterior, keys)

    def sum_half(limits):
      start, end = limits

      def add_chunk(i, sums):
        ks = start + i * chunk + jnp.arange(chunk)
        z = jax.vmap(draw)(ks)
        likelihood = vae.decode(z)
        around = distributions.Gaussian(likelihood.mean, sigma)
        log_weights = jnp.stack(
          [likelihood.log_prob(x), around.log_prob(y)], axis=-1
        )
        log_weights += (prior.log_prob(z) - posterior.log_prob(z))[..., None]
        log_weights = jnp.where(
          (ks < end)[:, None, None], log_weights, -jnp.inf
        )
        return sums.add(log_weights.astype(x.dtype))

      nothing = WeightSums.of(jnp.full((1, len(x), 2), -jnp.inf, x.dtype))
      return lax.fori_loop(0, -(-(end - start) // chunk), add_chunk, nothing)

    middle = (num_samples + 1) // 2
    starts, ends = jnp.array([0, middle]), jnp.array([middle, num_samples])
    halves = lax.map(sum_half, (starts, ends))
    sums = halves.merge()
    return {
      'bound': sums.bound(num_samples),
      'sample_size': sums.effective_sample_size(),
      'half_bounds': jnp.moveaxis(
        jax.vmap(WeightSums.bound)(halves, ends - starts), 0, -1
      ),
    }

  def step(variables, key, images, start, num_samples, sigma):
    keys = reconstruction.example_keys(key, start, len(images))
    return nn.apply(bound, model)(variables, images, keys, num_samples, sigma)

  return jax.pmap(
    step, axis_name=devices.AXIS, in_axes=(None, None, 0, None, None, None)
  )


@struct.dataclass
class WeightSums:
  """Sums of importance weights w, […], relative to the greatest of them.

  log w of a large image has so many nats that float32 could not add to the
  logarithm of a sum.

  Attributes:
    log_maximum: log max w.
    total: Σ w / max w.
    total_of_squares: Σ (w / max w)².
  """

  log_maximum: jax.Array
  total: jax.Array
  total_of_squares: jax.Array

  @classmethod
  def of(cls, log_weights: jax.Array) -> 'WeightSums':
    """The sums of log w [n, …] over the first axis; -∞ counts as no weight."""
    ones = jnp.isfinite(log_weights).astype(log_weights.dtype)
    return cls(log_weights, ones, ones).merge()

  def add(self, log_weights: jax.Array) -> 'WeightSums':
    """Adds weights, log w [n, …]."""
    both = self, WeightSums.of(log_weights)
    return jax.tree.map(lambda *a: jnp.stack(a), *both).merge()

  def merge(self) -> 'WeightSums':
    """The sums over the first axis as well, [n, …] to […]."""
    log_maximum = self.log_maximum.max(axis=0)
    relative = self.log_maximum - log_maximum
    scale = jnp.where(self.total > 0, jnp.exp(relative), 0)
    return WeightSums(
      log_maximum,
      (self.total * scale).sum(axis=0),
      (self.total_of_squares * scale**2).sum(axis=0),
    )

  def bound(self, count: jax.Array | int) -> jax.Array:
    """L_K = log (1/K) Σ_k w_k; Burda et al. 2016, equation 8."""
    return self.log_maximum + jnp.log(self.total / count)

  def effective_sample_size(self) -> jax.Array:
    """(Σ w)² / Σ w², from 1 to K: number of equal weights worth as much."""
    return self.total**2 / self.total_of_squares


def monte_carlo_variance(half_bounds: np.ndarray) -> np.ndarray:
  """Variance of L_K over draws of z, at most, from L_K/2 of halves [..., 2].

  Half the square of their difference is expected to be the variance of L_K/2,
  up to twice that of L_K. Unlike the delta method, 1 / (effective sample size)
  - 1 / K, this holds if a single weight outweighs all others too.
  """
  return np.square(np.diff(half_bounds, axis=-1))[..., 0] / 2


def optimal_sigma(mse: float) -> float:
  """The shared σ of a Gaussian likelihood that maximises the ELBO.

  For fixed reconstructions σ² is the mean squared error over images, pixels
  and draws of z; Rybkin et al. 2021, section 3.2.
  """
  # A perfect reconstruction would have an infinite density.
  return float(np.sqrt(max(mse, np.finfo(np.float32).tiny)))


def gaussian_distortion(
  squared_errors: np.ndarray, dimensions: int, sigma: float
) -> np.ndarray:
  """-log N(x; x̂, σ² I) from ‖x - x̂‖², nats."""
  log_normalizer = dimensions * (np.log(sigma) + 0.5 * np.log(2 * np.pi))
  return squared_errors / (2 * sigma**2) + log_normalizer


def bits_per_dimension(log_prob, dimensions: int):
  """Bits that an 8-bit image costs under a density of dequantised images.

  bpd = -log p(y) / (D ln 2) + 8, with log p(y), or a lower bound on it, in nats
  per image, and D = pixels × channels.
  """
  return -log_prob / (dimensions * np.log(2)) + 8


class PixelGaussian:
  """Each pixel an independent Gaussian: the baseline of any model.

  Mean and variance are those of the dequantised training images.
  """

  # Variance of the dequantisation noise, u/256.
  _NOISE = 1 / (12 * 256**2)

  def __init__(self):
    self._count, self._sum, self._squares = 0, 0.0, 0.0

  def add(self, images: np.ndarray) -> None:
    """Adds training images, uint8 [batch, height, width, channels]."""
    images = images.astype(np.float64)
    self._count += len(images)
    self._sum += images.sum(axis=0)
    self._squares += np.square(images).sum(axis=0)

  def log_prob(self, images: np.ndarray) -> np.ndarray:
    """E_u log p((x + u) / 256) of uint8 images; [batch], nats."""
    mean = self._sum / self._count
    variance = (self._squares / self._count - mean**2) / 256**2 + self._NOISE
    squares = ((images - mean) / 256) ** 2 + self._NOISE
    density = squares / variance + np.log(2 * np.pi * variance)
    return -0.5 * density.sum(axis=(1, 2, 3))
