"""All measurements of a trained model on a split, by name and with units.

What is measured of each image comes from `vae/per_image.py`; here it becomes
numbers about the split.
"""

import dataclasses
import functools

import jax
import numpy as np

from evaluation import inception_distances
from evaluation.measurements import Measurements
from evaluation.measurements import Metric
from report import progress
from vae import aggregate_posterior
from vae import bounds
from vae import devices
from vae import disentanglement
from vae import per_image
from vae import posterior
from vae import randomness
from vae import splits
from vae.trained import TrainedVAE

# What can be asked for.
GROUPS = ('bounds', 'reconstruction', 'posterior', 'labels', 'fid')

_NATS, _BITS = 'nats per image', 'bits per dimension'
_THROUGH = 'of reconstructions through the posterior mean'

# Images whose codes the readers of labels and the mixture are fitted to, and
# as many at most that the readers are tested on; the customary number
# (Locatello et al. 2019).
_MAX_FITTED = 10_000

# Draws of z per image where many models are to be compared quickly.
_DRAWS_OF_SUMMARY = 4

# Images that a mixture, and what is near to what, can be told from at all.
_MIN_FITTED = 5

# Images that are decoded between two signs of progress, on each device.
_DECODED_PER_DISPATCH = 20_000


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to measure.

  Attributes:
    groups: of `GROUPS`.
    num_importance_samples: K of the importance-weighted bound.
    batch_size: global.
    seed: of every random draw.
    inception_variables: of the network behind FID, or None where its weights
      cannot be had.
  """

  groups: tuple[str, ...] = GROUPS
  num_importance_samples: int = 100
  batch_size: int = 256
  seed: int = 0
  inception_variables: dict | None = None


def measure(
  trained: TrainedVAE,
  data: splits.DataSet,
  split_name: str,
  settings: Settings,
  results: Measurements | None = None,
) -> Measurements:
  """Measures a model on every image of a split, each once.

  Args:
    trained: the model.
    data: the train split is used too: to fit what needs fitting.
    split_name: `train`, `validation` or `test`.
    settings: what to measure, and how.
    results: to be filled, so that what is known shows before all is.
  """
  if results is None:
    results = Measurements(getattr(data, split_name).num_examples)
  # Else accelerators multiply with fewer bits than float32 has.
  with jax.default_matmul_precision('highest'):
    _measure(trained, data, split_name, settings, results)
  return results


def summarise(
  trained: TrainedVAE, split: splits.Split, settings: Settings
) -> Measurements:
  """Measures what a single pass over a split tells.

  Args:
    trained: the model.
    split: to be gone through, each image once.
    settings: batch size and seed count here; the groups do not.

  Returns:
    Rate, distortion, ELBO and what follows from them at the optimal σ, and
    which dimensions are active. Without sampling (a plain autoencoder) they
    mean little, as in training.
  """
  results = Measurements(split.num_examples)
  with jax.default_matmul_precision('highest'):
    values = _measure_images(
      trained, split, settings, lambda done: None, _DRAWS_OF_SUMMARY
    )
  _add_elbo(results, trained, split, values)
  results.mean('mse', values['mse'], 'mean over pixels', _THROUGH)
  _add_dimensions(results, values, draws_z=True)
  return results


def fitted_split(data: splits.DataSet, split_name: str) -> splits.Split:
  """The images that readers of codes are fitted to, to be tested on others."""
  return data.validation if split_name == 'train' else data.train


def _measure(trained, data, split_name, settings, results):
  split = getattr(data, split_name)
  draws_z = trained.config.objective.sample_posterior
  if not draws_z:
    results.notes.append(
      'z is the mean (sample_posterior=False): a plain autoencoder has no '
      'rate and no bound.'
    )
  if set(settings.groups) - {'fid'}:
    with progress('encoding and decoding', split.num_examples) as tell:
      values = _measure_images(trained, split, settings, tell)
  if 'bounds' in settings.groups and draws_z:
    sigma = _add_elbo(results, trained, split, values)
    _add_importance_weighted(results, trained, split, sigma, settings)
    _add_pixel_gaussian(results, data.train, split, settings)
  if 'reconstruction' in settings.groups:
    _add_reconstruction(results, values)
  if {'posterior', 'labels'} & set(settings.groups):
    other = fitted_split(data, split_name)
    positions = splits.spread(other.num_examples, _MAX_FITTED)
    fitted = _encode(trained, other, positions, settings)
    if 'posterior' in settings.groups:
      _add_posterior(results, values, fitted, settings, draws_z)
    if 'labels' in settings.groups:
      _add_labels(
        results,
        (fitted[0], other.labels(), positions),
        (values['mean'], split.labels()),
        settings,
      )
  if 'fid' in settings.groups and settings.inception_variables is not None:
    inception_distances.add(
      results,
      trained,
      split,
      settings.inception_variables,
      settings.batch_size,
      settings.seed,
    )


def _measure_images(
  trained, split, settings, tell, num_draws=per_image.NUM_DRAWS
):
  """`per_image.make_measure_step` over the split."""
  step = per_image.make_measure_step(
    trained.model, trained.config.objective.sample_posterior, num_draws
  )
  variables = devices.replicate(trained.variables)
  key = randomness.measure_key(settings.seed)
  return per_image.over_split(
    functools.partial(step, variables, key), split, settings.batch_size, tell
  )


def _encode(trained, split, positions, settings):
  """Mean and logvar of the images at these positions."""
  codes = []
  with progress('encoding images to fit to', len(positions)) as tell:
    for batch in split.batches(positions, settings.batch_size):
      codes.append(trained.encode(batch))
      tell(sum(len(mean) for mean, _ in codes))
  return tuple(map(np.concatenate, zip(*codes, strict=True)))


def _add_elbo(results, trained, split, values):
  """Returns σ of the best Gaussian around the dequantised images."""
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
    model_sigma = float(
      trained.model.apply(trained.variables, method='current_sigma')
    )
    results.number('sigma', model_sigma, 'of [0, 1]', "the likelihood's σ")
  results.number(
    'optimal_sigma',
    best_sigma,
    'of [0, 1]',
    'σ of the best Gaussian likelihood around these reconstructions, fitted to '
    'this split',
  )
  results.mean(
    'elbo_optimal_sigma',
    -bounds.gaussian_distortion(squares, dimensions, best_sigma) - rate,
    _NATS,
    'ELBO of the Gaussian likelihood at the optimal σ',
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
    'dequantised, ELBO at the optimal σ',
  )
  return sigma


def _add_importance_weighted(results, trained, split, sigma, settings):
  step = per_image.make_bound_step(trained.model)
  variables = devices.replicate(trained.variables)
  key = randomness.bound_key(settings.seed)
  count = settings.num_importance_samples
  # Few images at a time where each takes long, so that progress shows.
  at_once = max(1, _DECODED_PER_DISPATCH // count) * jax.local_device_count()
  with progress(
    f'importance-weighted bound, K = {count:,}', split.num_examples
  ) as tell:
    weighted = per_image.over_split(
      lambda images, start: step(variables, key, images, start, count, sigma),
      split,
      min(settings.batch_size, at_once),
      tell,
    )
  results.mean(
    'iw_bound', weighted['bound'], _NATS, f'log p(x) ≥ L_K, K = {count:,}'
  )
  if count > 1:  # One weight says nothing of how much they vary.
    variance = bounds.monte_carlo_variance(
      weighted['effective_sample_size'], count
    )
    results.number(
      'iw_bound_monte_carlo_error',
      np.sqrt(variance.sum()) / len(variance),
      _NATS,
      'of iw_bound, over draws of z',
    )
  results.number(
    'iw_effective_samples',
    weighted['effective_sample_size'].mean(),
    f'of {count:,}',
    'effective sample size of the weights; where it is small, L_K is not tight '
    'yet, and the Monte-Carlo error more than it says',
  )

  dimensions = int(np.prod(split.image_shape))
  results.mean(
    'bits_per_dim_iw',
    bounds.bits_per_dimension(weighted['dequantised_bound'], dimensions),
    _BITS,
    f'dequantised, L_K at the optimal σ, K = {count:,}',
  )
  results.number(
    'bits_per_dim_iw_effective_samples',
    weighted['dequantised_effective_sample_size'].mean(),
    f'of {count:,}',
    'the same of the weights of bits_per_dim_iw',
  )


def _add_pixel_gaussian(results, train, split, settings):
  """What an image costs without any model of how its pixels hang together."""
  baseline = bounds.PixelGaussian()
  for batch in _in_order(train, settings.batch_size):
    baseline.add(batch)
  log_probs = [
    baseline.log_prob(batch) for batch in _in_order(split, settings.batch_size)
  ]
  results.mean(
    'bits_per_dim_pixel_gaussian',
    bounds.bits_per_dimension(
      np.concatenate(log_probs), int(np.prod(split.image_shape))
    ),
    'bits per dimension',
    'for comparison: independent Gaussian pixels, fitted to the train split',
  )


def _add_reconstruction(results, values):
  results.mean('mse', values['mse'], 'mean over pixels', _THROUGH)
  results.mean('psnr', values['psnr'], 'dB', _THROUGH)
  if 'ssim' in values:
    results.mean('ssim', values['ssim'], 'at most 1', _THROUGH)
  else:
    results.notes.append('ssim: the images are smaller than its window.')


def _add_posterior(results, values, fitted, settings, draws_z):
  mean, logvar = values['mean'], values['logvar']
  _add_dimensions(results, values, draws_z)
  latents, fitted_latents = mean, fitted[0]
  if draws_z:
    latents = aggregate_posterior.draw(mean, logvar, settings.seed)
    # Their own noise, or where both are it alone they would be the same.
    fitted_latents = aggregate_posterior.draw(*fitted, [settings.seed, 1])
    rate_split = aggregate_posterior.split_rate(mean, logvar, settings.seed)
    results.dimensions['aggregate_kl'] = rate_split.dimension_kl.tolist()
    _add_rate_split(results, rate_split, len(mean))
  _add_holes(results, latents, fitted_latents, settings)


def _add_dimensions(results, values, draws_z):
  """Which dimensions are active, and whether the posterior has collapsed."""
  mean, logvar = values['mean'], values['logvar']
  active = posterior.active_dimensions(mean)
  results.number(
    'active_units',
    active.sum(),
    f'of {len(active)}',
    f'dimensions with Var_x(E_q[z]) > {posterior.ACTIVE_VARIANCE}',
  )
  results.dimensions['mean_variance'] = posterior.mean_variance(mean).tolist()
  if draws_z:
    kl = posterior.kl(mean, logvar).mean(axis=0)
    results.verdict = posterior.verdict(kl, active)
    results.dimensions['kl'] = kl.tolist()


def _add_rate_split(results, rate_split, num_images):
  rows = (
    (
      'mutual_information',
      rate_split.mutual_information,
      f'I(x; z) of these images; at most log {num_images:,} = '
      f'{np.log(num_images):.2f}',
    ),
    (
      'total_correlation',
      rate_split.total_correlation,
      'KL(q(z) ‖ Π q(z_j)) of these images',
    ),
    (
      'dimension_wise_kl',
      rate_split.dimension_kl.sum(),
      'Σ KL(q(z_j) ‖ N(0, 1)) of these images',
    ),
    (
      'mutual_information_upper_bound',
      rate_split.information_upper_bound,
      'on I(x; z) of the distribution that the images come from',
    ),
  )
  for (name, value, about), error in zip(
    rows, rate_split.standard_errors, strict=True
  ):
    results.metrics[name] = Metric(float(value), 'nats', about, error)


def _add_holes(results, latents, fitted_latents, settings):
  if min(len(latents), len(fitted_latents)) < _MIN_FITTED:
    results.notes.append(f'holes: they need at least {_MIN_FITTED} images.')
    return
  about = 'draws that q(z) hardly reaches; 0.05 would be as q(z) itself'
  at_most = splits.spread(len(latents), _MAX_FITTED)
  latents = latents[at_most]
  generator = np.random.default_rng([settings.seed, 2])
  prior = generator.standard_normal(latents.shape).astype(np.float32)
  mixture = aggregate_posterior.fit_mixture(fitted_latents, settings.seed)
  for name, candidates, what in (
    ('prior_in_holes', prior, 'the prior'),
    (
      'mixture_in_holes',
      mixture.sample(len(latents))[0],
      f'{mixture.n_components} Gaussians fitted to q(z)',
    ),
  ):
    share = aggregate_posterior.share_in_holes(latents, candidates)
    results.number(name, share, 'share', f'of {what}: {about}')


def _add_labels(results, fitted, tested, settings):
  """Takes codes, labels and the positions of the codes; codes and labels."""
  fitted_codes, fitted_labels, positions = fitted
  codes, labels = tested
  if labels is None or fitted_labels is None:
    results.notes.append('labels: the data has none.')
    return
  test_positions = splits.spread(len(codes), _MAX_FITTED)
  print(f'reading {len(labels.names)} labels from the codes …', flush=True)
  scores = disentanglement.evaluate(
    fitted_codes,
    fitted_labels.values[positions],
    codes[test_positions],
    labels.values[test_positions],
    settings.seed,
  )
  images = (
    f'fitted to {len(fitted_codes):,} other images, '
    f'{len(test_positions):,} tested'
  )
  about = {
    'linear_accuracy': f'logistic regression on the means, {images}',
    'linear_balanced_accuracy': 'the same, mean over classes',
    'majority_accuracy': 'of always naming the most frequent class',
    'mig': 'mutual information gap (Chen et al. 2018), 20 bins, of the images '
    'fitted to',
    'dci_disentanglement': 'Eastwood & Williams 2018, random forest',
    'dci_completeness': 'the same',
    'dci_informativeness': "the same; the forest's held-out accuracy",
    'sap': 'separated attribute predictability (Kumar et al. 2018)',
  }
  for name, value in scores.means().items():
    results.number(name, value, 'at most 1', about[name])
  columns = {
    'linear_accuracy': scores.probe.accuracy,
    'linear_balanced_accuracy': scores.probe.balanced_accuracy,
    'majority_accuracy': scores.probe.majority_accuracy,
    'mig': scores.mig,
    'sap': scores.sap,
  }
  results.labels = {
    label: {name: float(column[i]) for name, column in columns.items()}
    for i, label in enumerate(labels.names)
  }


def _in_order(split, batch_size):
  return split.batches(np.arange(split.num_examples), batch_size)
