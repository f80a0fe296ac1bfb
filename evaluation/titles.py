"""Names of the metrics for readers, by group, and which way is better."""

from collections.abc import Iterator, Sequence

_HIGHER, _LOWER = 'higher', 'lower'

# Title and better way of each metric by its key, in reading order; the way is
# empty if neither is better.
_GROUPS: dict[str, dict[str, tuple[str, str]]] = {
  'Likelihood': {
    'elbo': ('Evidence lower bound', _HIGHER),
    'rate': ('Rate, KL to the prior', ''),
    'distortion': ('Distortion', _LOWER),
    'iw_bound': ('Importance-weighted bound', _HIGHER),
    'iw_bound_monte_carlo_error': ('… its Monte-Carlo error', _LOWER),
    'iw_effective_samples': ('… its effective sample size', _HIGHER),
    'sigma': ("The likelihood's σ", ''),
    'optimal_sigma': ('Optimal σ', _LOWER),
    'elbo_optimal_sigma': ('Evidence lower bound at the optimal σ', _HIGHER),
    'bits_per_dim': ('Bits per dimension', _LOWER),
    'bits_per_dim_optimal_sigma': (
      'Bits per dimension at the optimal σ',
      _LOWER,
    ),
    'bits_per_dim_iw': ('Bits per dimension, importance-weighted', _LOWER),
    'bits_per_dim_iw_monte_carlo_error': ('… its Monte-Carlo error', _LOWER),
    'bits_per_dim_iw_effective_samples': (
      '… its effective sample size',
      _HIGHER,
    ),
    'bits_per_dim_pixel_gaussian': ('Independent Gaussian pixels', ''),
  },
  'Reconstructions': {
    'mse_of_mean': ('Mean squared error', _LOWER),
    'psnr': ('Peak signal-to-noise ratio', _HIGHER),
    'ssim': ('Structural similarity', _HIGHER),
  },
  'Latent space': {
    'active_units': ('Active dimensions', ''),
    'dimensions_of_90_percent': ('Dimensions with 90 % of the rate', ''),
    'mutual_information': ('Mutual information of x and z', ''),
    'total_correlation': ('Total correlation', _LOWER),
    'gaussian_total_correlation': ('Total correlation of a Gaussian', _LOWER),
    'dimension_wise_kl': ('KL of the dimensions to the prior', _LOWER),
    'prior_in_holes': ('Draws of the prior in holes of q(z)', _LOWER),
    'mixture_in_holes': ('Draws of the mixture in holes of q(z)', _LOWER),
  },
  'Labels in the code': {
    'linear_accuracy': ('Accuracy of a linear probe', _HIGHER),
    'majority_accuracy': ('… of naming the commonest class', ''),
    'mig': ('Mutual information gap', _HIGHER),
    'dci_disentanglement': ('DCI disentanglement', _HIGHER),
    'dci_completeness': ('DCI completeness', _HIGHER),
    'dci_informativeness': ('DCI informativeness', _HIGHER),
    'sap': ('Separated attribute predictability', _HIGHER),
    'sap_svm': ('… by a linear SVM', _HIGHER),
  },
  'Image quality': {
    'fid_samples': ('FID of samples', _LOWER),
    'fid_reconstructions': ('FID of reconstructions', _LOWER),
    'kid_samples': ('KID of samples', _LOWER),
    'kid_reconstructions': ('KID of reconstructions', _LOWER),
  },
}

# The group of metrics of users' own evaluators.
_OTHERS = 'Other numbers'


def better(key: str) -> str:
  """Which way of a metric is better: higher, lower, or nothing."""
  return next(titles[key][1] for titles in _GROUPS.values() if key in titles)


def grouped(
  rows: Sequence[tuple[str, ...]],
) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
  """Rows that begin with a key, by group: title, key, the rest, better way."""
  left = list(rows)
  for group, titles in _GROUPS.items():
    found = [row for row in left if row[0] in titles]
    left = [row for row in left if row[0] not in titles]
    if found:
      yield (
        group,
        [(titles[key][0], key, *rest, titles[key][1]) for key, *rest in found],
      )
  if left:
    yield _OTHERS, [(key, key, *rest, '') for key, *rest in left]
