"""What the codes of a split's images are like, and what can be read in them."""

import numpy as np

from evaluation import aggregate_posterior
from evaluation import disentanglement
from evaluation import per_image
from evaluation import posterior
from evaluation.measurements import Measurements
from evaluation.measurements import Null
from vae import splits
from vae.splits import Labels

# Images whose codes the readers of labels and the mixture are fitted to, and
# as many at most that the readers are tested on; the customary number
# (Locatello et al. 2019).
MAX_FITTED = 10_000

# Images that a mixture, and what is near to what, can be told from at all.
_MIN_FITTED = 5

# Random halves of the latents, permutations of the latents' dimensions and,
# as 40 attributes of CelebA take minutes each time, permutations of labels.
_HALVINGS = 10
_SHUFFLES = 20
_LABEL_PERMUTATIONS = 3


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
  if draws_z:
    rate_split = aggregate_posterior.split_rate(mean, logvar, seed)
    results.dimensions['aggregate_kl'] = rate_split.dimension_kl.tolist()
    _add_rate_split(results, rate_split, len(mean))
    latents = aggregate_posterior.draw(mean, logvar, seed)
    _add_gaussian_total_correlation(results, latents, seed)
  _add_holes(results, (mean, logvar), fitted, seed, draws_z)


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
    results.number(
      'dimensions_of_90_percent',
      posterior.dimensions_that_carry(kl, 0.9),
      f'of {len(kl)}',
      'the fewest dimensions that carry 90 % of the rate together',
    )


def _add_rate_split(results, rate_split, num_images):
  log_count = f'log {num_images:,} = {np.log(num_images):.2f}'
  results.interval(
    'mutual_information',
    rate_split.mutual_information,
    'nats',
    f'I(x; z); the lower bound is at most {log_count}, the upper one the rate',
  )
  results.interval(
    'total_correlation',
    rate_split.total_correlation,
    'nats',
    'KL(q(z) ‖ Π q(z_j)): rate - I(x; z) - Σ KL(q(z_j) ‖ N(0, 1)), at least 0',
  )
  information, correlation = (
    rate_split.mutual_information,
    rate_split.total_correlation,
  )
  if not correlation.lower and np.log(num_images) - information.lower < 0.1:
    results.notes.append(
      f'total correlation: not identifiable with {num_images:,} images, as '
      f'they bound I(x; z) from below by {log_count} nats at most.'
    )
  results.number(
    'dimension_wise_kl',
    rate_split.dimension_kl.sum(),
    'nats',
    'Σ KL(q(z_j) ‖ N(0, 1)) of the mixture of these images, an upper bound',
    rate_split.dimension_kl_error,
  )


def _add_gaussian_total_correlation(results, latents, seed):
  num_images, latent_dim = latents.shape
  if num_images <= latent_dim:
    results.notes.append(
      f'Gaussian total correlation: {latent_dim} dimensions need more images '
      f'than {num_images}.'
    )
    return
  measure = aggregate_posterior.gaussian_total_correlation
  generator = np.random.default_rng([seed, 3])
  null = [
    measure(generator.permuted(latents, axis=0))[0] for _ in range(_SHUFFLES)
  ]
  value, error = measure(latents)
  results.number(
    'gaussian_total_correlation',
    value,
    'nats',
    '-½ log det of the correlations of z, less its bias: the total correlation '
    'if q(z) is Gaussian; null: each dimension permuted over the images',
    error,
    Null.of(null),
  )


def _add_holes(results, posteriors, fitted, seed, draws_z):
  if min(len(posteriors[0]), len(fitted[0])) < _MIN_FITTED:
    results.notes.append(f'holes: they need at least {_MIN_FITTED} images.')
    return

  def latents_of(mean, logvar, *noise):
    return aggregate_posterior.draw(mean, logvar, noise) if draws_z else mean

  at_most = splits.spread(len(posteriors[0]), MAX_FITTED)
  mean, logvar = (a[at_most] for a in posteriors)
  latents = np.stack(
    [latents_of(mean, logvar, seed, 1, i) for i in range(_HALVINGS)]
  )
  print('fitting the mixture …', flush=True)
  # Their own noise, or where both are it alone they would be the same.
  mixture = aggregate_posterior.fit_mixture(latents_of(*fitted, seed, 2), seed)
  generator = np.random.default_rng([seed, 4])
  prior = generator.standard_normal(latents.shape, np.float32)
  # It draws one component after the other.
  drawn = mixture.sample(latents[..., 0].size)[0].astype(np.float32)
  drawn = generator.permutation(drawn).reshape(latents.shape)
  null, *shares = aggregate_posterior.shares_in_holes(
    latents, prior, drawn, seed=seed
  )
  for name, share, what in (
    ('prior_in_holes', shares[0], 'the prior'),
    (
      'mixture_in_holes',
      shares[1],
      f'{mixture.n_components} Gaussians fitted to q(z)',
    ),
  ):
    results.number(
      name,
      share.mean(),
      'share',
      f'of draws from {what}: farther from q(z) than 95 % of its own; ± is '
      f'the deviation over {_HALVINGS} halvings and draws of z; null: '
      'held-out draws from q(z)',
      share.std(ddof=1),
      Null.of(null),
    )


def add_labels(
  results: Measurements,
  fitted: tuple[np.ndarray, Labels | None, np.ndarray],
  tested: tuple[np.ndarray, Labels | None],
  fitted_name: str,
  seed: int,
) -> None:
  """Adds how well labels can be read from the codes, and from permuted labels.

  Args:
    results: to be added to.
    fitted: codes that the readers are fitted to, [n, latent_dim], the labels
      of their split, and the codes' positions in it.
    tested: codes of a whole split, and its labels.
    fitted_name: of the split of `fitted`.
    seed: of the readers and of the permutations.
  """
  fitted_codes, fitted_labels, positions = fitted
  codes, labels = tested
  if labels is None or fitted_labels is None:
    results.notes.append('labels: the data has none.')
    return
  test_positions = splits.spread(len(codes), MAX_FITTED)
  codes = codes[test_positions]
  factors = fitted_labels.values[positions], labels.values[test_positions]

  def evaluate(factors):
    return disentanglement.evaluate(
      fitted_codes, factors[0], codes, factors[1], seed
    )

  print(f'reading {len(labels.names)} labels from the codes …', flush=True)
  scores = evaluate(factors)
  by_chance = []
  for i in range(_LABEL_PERMUTATIONS):
    print(
      f'reading permuted labels, {i + 1} of {_LABEL_PERMUTATIONS} …', flush=True
    )
    permuted = disentanglement.permute(*factors, [seed, i])
    by_chance.append(evaluate(permuted))

  images = (
    f'fitted to {len(fitted_codes):,} {fitted_name} images, '
    f'{len(codes):,} tested'
  )
  not_comparable = 'not comparable with published figures'
  about = {
    'linear_accuracy': f'logistic regression on the means, {images}; ± is over '
    'the tested images; null, here and below: permuted labels',
    'linear_balanced_accuracy': 'the same, mean over classes',
    'majority_accuracy': 'of always naming the most frequent class',
    'mig': 'mutual information gap (Chen et al. 2018), 20 bins, of '
    f'{len(fitted_codes):,} images of the {fitted_name} split',
    'dci_disentanglement': 'Eastwood & Williams 2018, random forest; '
    f'{not_comparable}, which have gradient boosting',
    'dci_completeness': f'the same; {not_comparable}',
    'dci_informativeness': "the same; the forest's held-out accuracy; "
    f'{not_comparable}',
    'sap': 'separated attribute predictability (Kumar et al. 2018), thresholds '
    f'and balanced accuracy; {not_comparable}: those are sap_svm',
    'sap_svm': 'the same by a linear SVM and plain accuracy, as in published '
    'figures (Locatello et al. 2019)',
  }
  errors = dict(
    zip(
      ('linear_accuracy', 'linear_balanced_accuracy', 'majority_accuracy'),
      scores.probe.standard_errors,
      strict=True,
    )
  )
  chance = [other.means() for other in by_chance]
  for name, value in scores.means().items():
    null = Null.of([means[name] for means in chance])
    results.number(
      name,
      value,
      'at most 1',
      about[name],
      errors.get(name),
      # Of it permuted labels have the same.
      null if name != 'majority_accuracy' else None,
    )

  def null_of(name):
    return np.mean([getattr(other, name) for other in by_chance], axis=0)

  columns = {
    'linear_accuracy': scores.probe.accuracy,
    'linear_balanced_accuracy': scores.probe.balanced_accuracy,
    'majority_accuracy': scores.probe.majority_accuracy,
    'mig': scores.mig,
    'mig_null': null_of('mig'),
    'sap': scores.sap,
    'sap_null': null_of('sap'),
    'sap_svm': scores.sap_svm,
    'sap_svm_null': null_of('sap_svm'),
  }
  results.labels = {
    label: {name: float(column[i]) for name, column in columns.items()}
    for i, label in enumerate(labels.names)
  }
