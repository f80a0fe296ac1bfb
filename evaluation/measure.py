"""All measurements of a trained model on a split, by name and with units.

`evaluation/per_image.py` measures each image; here that becomes numbers about
the split.
"""

import dataclasses
import functools

import numpy as np

from evaluation import codes
from evaluation import inception_distances
from evaluation import log_likelihood
from evaluation import per_image
from evaluation.measurements import Measurements
from runs.progress import track
from vae import devices
from vae import numerics
from vae import randomness
from vae import splits
from vae.loading import TrainedVAE

# What can be asked for.
GROUPS = ('bounds', 'reconstruction', 'posterior', 'labels', 'fid')

_THROUGH = 'of reconstructions through the posterior mean'

# Draws of z per image where many models are to be compared quickly.
_DRAWS_OF_SUMMARY = 4


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
  with numerics.precise(trained.model.dtype):
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
  with numerics.precise(trained.model.dtype):
    values = _measure_images(
      trained, split, settings, lambda done: None, _DRAWS_OF_SUMMARY
    )
  log_likelihood.add_elbo(results, trained, split, values)
  _add_mse(results, values)
  codes.add_dimensions(results, values, draws_z=True)
  return results


def fitted_split(split_name: str) -> str:
  """The split that readers of codes are fitted to, to be tested on another."""
  return 'validation' if split_name == 'train' else 'train'


def _measure(trained, data, split_name, settings, results):
  split = getattr(data, split_name)
  draws_z = trained.config.objective.sample_posterior
  if not draws_z:
    results.notes.append(
      'z is the mean (sample_posterior=False): a plain autoencoder has no '
      'rate and no bound.'
    )
  if set(settings.groups) - {'fid'}:
    with track('encoding and decoding', split.num_examples) as tell:
      values = _measure_images(trained, split, settings, tell)
  if 'bounds' in settings.groups and draws_z:
    sigma = log_likelihood.add_elbo(results, trained, split, values)
    log_likelihood.add_importance_weighted(
      results,
      trained,
      split,
      sigma,
      settings.num_importance_samples,
      settings.batch_size,
      settings.seed,
    )
    log_likelihood.add_pixel_gaussian(
      results, data.train, split, settings.batch_size
    )
  if 'reconstruction' in settings.groups:
    _add_reconstruction(results, values)
  if {'posterior', 'labels'} & set(settings.groups):
    fitted_name = fitted_split(split_name)
    other = getattr(data, fitted_name)
    positions = splits.spread(other.num_examples, codes.MAX_FITTED)
    fitted = _encode(trained, other, positions, settings)
    if 'posterior' in settings.groups:
      codes.add_posterior(results, values, fitted, settings.seed, draws_z)
    if 'labels' in settings.groups:
      codes.add_labels(
        results,
        (fitted[0], other.labels(), positions),
        (values['mean'], split.labels()),
        fitted_name,
        settings.seed,
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
  parts = []
  with track('encoding images to fit to', len(positions)) as tell:
    for batch in split.batches(positions, settings.batch_size):
      posterior = trained.encode(batch)
      parts.append((posterior.mean, posterior.logvar))
      tell(sum(len(mean) for mean, _ in parts))
  return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _add_mse(results, values):
  results.mean(
    'mse_of_mean',
    values['mse'],
    'mean over pixels',
    f'{_THROUGH}, clipped to [0, 1]; val/mse of training has z drawn and '
    'nothing clipped',
  )


def _add_reconstruction(results, values):
  _add_mse(results, values)
  results.mean('psnr', values['psnr'], 'dB', _THROUGH)
  if 'ssim' in values:
    results.mean('ssim', values['ssim'], 'at most 1', _THROUGH)
  else:
    results.notes.append('ssim: the images are smaller than its window.')
