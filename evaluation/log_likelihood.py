"""How likely a model finds the images of a split: bounds on log p(x)."""

import jax
import numpy as np

from evaluation import bounds
from evaluation import per_image
from evaluation import posterior
from evaluation.measurements import Measurements
from runs.progress import track
from vae import devices
from vae import randomness
from vae import splits
from vae.loading import TrainedVAE

_NATS, _BITS = 'nats per image', 'bits per dimension'
_OPTIMAL = 'the optimal σ, which is fitted to the same images'

# A bound by fewer samples than these, in effect, is called loose.
_FEW_SAMPLES = 10

# Images that are decoded between two signs of progress, on each device.
_DECODED_PER_DISPATCH = 20_000


def add_elbo(
  results: Measurements,
  trained: TrainedVAE,
  split: splits.Split,
  values: per_image.Values,
) -> float:
  """Adds the ELBO and its parts, also under the best Gaussian likelihood.

  Args:
    results: to be added to.
    trained: the model.
    split: that was measured.
    values: of `per_image.make_measure_step`, [num_examples, …] each.

  Returns:
    σ of the best Gaussian around the dequantised images.
  """
  dimensions = int(np.prod(split.image_shape))
  squares = values['squared_error'].astype(np.float64)
  dequantised = values['dequantised_squared_error'].astype(np.float64)
  rate = posterior.kl(values['mean'], values['logvar']).sum(axis=1)
  gaussian = trained.model.likelihood == 'gaussian'

  results.mean(
    'elbo', -values['distortion'] - rate, _NATS, '-distortion - rate'
  )
  results.mean('rate', rate, _NATS, 'KL(q(z|x) ‖ N(0, I))')
  results.mean('distortion', values['distortion'], _NATS, 'E_q[-log p(x|z)]')

  if not gaussian:
    results.notes.append(
      'log p(x): the cross-entropy of grey values, in elbo, distortion and '
      'iw_bound, is no density (its normaliser is missing); compare models by '
      'what is at the optimal σ.'
    )

  # The yardstick that models of any σ and likelihood share.
  best_sigma = bounds.optimal_sigma(squares.mean() / dimensions)
  sigma = bounds.optimal_sigma(dequantised.mean() / dimensions)

  if gaussian:
    z = np.zeros((1, *trained.latent_shape), np.float32)
    likelihood = trained.model.apply(trained.variables, z, method='decode')
    model_sigma = float(likelihood.sigma)
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
    -bounds.gaussian_distortion(squares, dimensions, best_sigma) - rate,
    _NATS,
    f'ELBO of the Gaussian likelihood at {_OPTIMAL}',
  )

  def in_bits(name, log_prob, about):
    values = bounds.bits_per_dimension(log_prob, dimensions)
    results.mean(name, values, _BITS, about)

  if gaussian:
    in_bits(
      'bits_per_dim',
      -bounds.gaussian_distortion(dequantised, dimensions, model_sigma) - rate,
      "dequantised, ELBO at the model's σ",
    )
  in_bits(
    'bits_per_dim_optimal_sigma',
    -bounds.gaussian_distortion(dequantised, dimensions, sigma) - rate,
    f'dequantised, ELBO at {_OPTIMAL}',
  )
  return sigma


def add_importance_weighted(
  results: Measurements,
  trained: TrainedVAE,
  split: splits.Split,
  sigma: float,
  num_samples: int,
  batch_size: int,
  seed: int,
) -> None:
  """Adds the bound L_K on log p(x), and how much it is to be trusted.

  Args:
    results: to be added to.
    trained: the model.
    split: to be gone through.
    sigma: of the Gaussian likelihood of the dequantised images.
    num_samples: K.
    batch_size: global, at most.
    seed: of the draws of z.
  """
  step = per_image.make_bound_step(trained.model)
  variables = devices.replicate(trained.variables)
  key = randomness.bound_key(seed)
  # Few images at a time where each takes long, so that progress shows.
  at_once = max(1, _DECODED_PER_DISPATCH // num_samples)
  at_once *= jax.local_device_count()
  with track(
    f'importance-weighted bound, K = {num_samples:,}', split.num_examples
  ) as tell:
    weighted = per_image.over_split(
      lambda x, start: step(variables, key, x, start, num_samples, sigma),
      split,
      min(batch_size, at_once),
      tell,
    )

  def add(name, prefix, unit, convert, about):
    """Adds a bound and how tight it is; `convert` is linear, from nats."""
    bound = convert(weighted[f'{prefix}bound'].astype(np.float64))
    halves = convert(weighted[f'{prefix}half_bounds'].astype(np.float64))
    size = weighted[f'{prefix}effective_sample_size'].mean()
    if num_samples > 1:  # Else there are no two halves.
      about += f'; {bound.mean() - halves.mean():+.2g} from K/2 to K'
    if size < min(_FEW_SAMPLES, num_samples / 2):
      about += (
        f'; a loose bound that still improves with K: of {num_samples:,} '
        f'samples {size:.3g} count'
      )
    results.mean(name, bound, unit, about)
    if num_samples > 1:
      error = np.sqrt(bounds.monte_carlo_variance(halves).sum()) / len(bound)
      results.number(
        f'{name}_monte_carlo_error',
        error,
        unit,
        f'of {name}, over draws of z, at most: from two halves of the draws',
      )
    return size

  size = add(
    'iw_bound',
    '',
    _NATS,
    lambda nats: nats,
    f'log p(x) ≥ L_K, K = {num_samples:,}',
  )
  results.number(
    'iw_effective_samples',
    size,
    f'of {num_samples:,}',
    "effective sample size of the weights, at the model's own likelihood",
  )
  dimensions = int(np.prod(split.image_shape))
  size = add(
    'bits_per_dim_iw',
    'dequantised_',
    _BITS,
    lambda nats: bounds.bits_per_dimension(nats, dimensions),
    f'dequantised, L_K at {_OPTIMAL}, K = {num_samples:,}',
  )
  results.number(
    'bits_per_dim_iw_effective_samples',
    size,
    f'of {num_samples:,}',
    'effective sample size of the weights of bits_per_dim_iw, at the optimal σ',
  )


def add_pixel_gaussian(
  results: Measurements,
  train: splits.Split,
  split: splits.Split,
  batch_size: int,
) -> None:
  """Adds what an image costs without a model of how its pixels hang together.

  Args:
    results: to be added to.
    train: that the pixels' Gaussians are fitted to.
    split: to be gone through.
    batch_size: of images that are read at a time.
  """
  baseline = bounds.PixelGaussian()
  for batch in _in_order(train, batch_size):
    baseline.add(batch)
  log_probs = [
    baseline.log_prob(batch) for batch in _in_order(split, batch_size)
  ]
  results.mean(
    'bits_per_dim_pixel_gaussian',
    bounds.bits_per_dimension(
      np.concatenate(log_probs), int(np.prod(split.image_shape))
    ),
    _BITS,
    'for comparison: independent Gaussian pixels, fitted to the train split',
  )


def _in_order(split, batch_size):
  return split.batches(np.arange(split.num_examples), batch_size)
