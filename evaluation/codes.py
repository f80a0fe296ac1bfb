"""What the codes of a split's images are like, and what can be read in them."""

import numpy as np

from evaluation.measurements import Measurements
from evaluation.measurements import Metric
from vae import aggregate_posterior
from vae import disentanglement
from vae import per_image
from vae import posterior
from vae import splits
from vae.splits import Labels

# Images whose codes the readers of labels and the mixture are fitted to, and
# as many at most that the readers are tested on; the customary number
# (Locatello et al. 2019).
MAX_FITTED = 10_000

# Images that a mixture, and what is near to what, can be told from at all.
_MIN_FITTED = 5


def add_posterior(
  results: Measurements,
  values: per_image.Values,
  fitted: tuple[np.ndarray, np.ndarray],
  seed: int,
  draws_z: bool,
) -> None:
  """Adds what q(z|x) and q(z) are like: active units, the rate's parts, holes.

  Args:
    results: to be added to.
    values: with `mean` and `logvar`, [num_examples, latent_dim] each.
    fitted: mean and logvar of other images, that a mixture is fitted to.
    seed: of the draws of z.
    draws_z: whether z is drawn, or is the mean.
  """
  mean, logvar = values['mean'], values['logvar']
  add_dimensions(results, values, draws_z)
  latents, fitted_latents = mean, fitted[0]
  if draws_z:
    latents = aggregate_posterior.draw(mean, logvar, seed)
    # Their own noise, or where both are it alone they would be the same.
    fitted_latents = aggregate_posterior.draw(*fitted, [seed, 1])
    rate_split = aggregate_posterior.split_rate(mean, logvar, seed)
    results.dimensions['aggregate_kl'] = rate_split.dimension_kl.tolist()
    _add_rate_split(results, rate_split, len(mean))
  _add_holes(results, latents, fitted_latents, seed)


def add_dimensions(
  results: Measurements, values: per_image.Values, draws_z: bool
) -> None:
  """Adds which dimensions are active, and whether the posterior collapsed."""
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


def _add_holes(results, latents, fitted_latents, seed):
  if min(len(latents), len(fitted_latents)) < _MIN_FITTED:
    results.notes.append(f'holes: they need at least {_MIN_FITTED} images.')
    return
  about = 'draws that q(z) hardly reaches; 0.05 would be as q(z) itself'
  at_most = splits.spread(len(latents), MAX_FITTED)
  latents = latents[at_most]
  generator = np.random.default_rng([seed, 2])
  prior = generator.standard_normal(latents.shape).astype(np.float32)
  print('fitting the mixture …', flush=True)
  mixture = aggregate_posterior.fit_mixture(fitted_latents, seed)
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


def add_labels(
  results: Measurements,
  fitted: tuple[np.ndarray, Labels | None, np.ndarray],
  tested: tuple[np.ndarray, Labels | None],
  seed: int,
) -> None:
  """Adds how well labels can be read from the codes.

  Args:
    results: to be added to.
    fitted: codes that the readers are fitted to, [n, latent_dim], the labels
      of their split, and the codes' positions in it.
    tested: codes of a whole split, and its labels.
    seed: of the readers.
  """
  fitted_codes, fitted_labels, positions = fitted
  codes, labels = tested
  if labels is None or fitted_labels is None:
    results.notes.append('labels: the data has none.')
    return
  test_positions = splits.spread(len(codes), MAX_FITTED)
  print(f'reading {len(labels.names)} labels from the codes …', flush=True)
  scores = disentanglement.evaluate(
    fitted_codes,
    fitted_labels.values[positions],
    codes[test_positions],
    labels.values[test_positions],
    seed,
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
