"""Names of the metrics for readers, by group, and which way is better."""

from collections.abc import Iterator, Sequence

MORE, LESS = 'higher', 'lower'

# Title and better way of each metric by its key, in reading order; without a
# way where neither is better by itself.
_GROUPS: dict[str, dict[str, tuple[str, str]]] = {
  'Likelihood': {
    'elbo': ('Evidence lower bound', MORE),
    'rate': ('Rate, KL to the prior', ''),
    'distortion': ('Distortion', LESS),
    'iw_bound': ('Importance-weighted bound', MORE),
    'iw_bound_monte_carlo_error': ('… its Monte-Carlo error', LESS),
    'iw_effective_samples': ('… its effective sample size', MORE),
    'sigma': ("The likelihood's σ", ''),
    'optimal_sigma': ('Optimal σ', LESS),
    'elbo_optimal_sigma': ('Evidence lower bound at the optimal σ', MORE),
    'bits_per_dim': ('Bits per dimension', LESS),
    'bits_per_dim_optimal_sigma': ('Bits per dimension at the optimal σ', LESS),
    'bits_per_dim_iw': ('Bits per dimension, importance-weighted', LESS),
    'bits_per_dim_iw_monte_carlo_error': ('… its Monte-Carlo error', LESS),
    'bits_per_dim_iw_effective_samples': (
      '… its effective sample size',
      MORE,
    ),
    'bits_per_dim_pixel_gaussian': ('Independent Gaussian pixels', ''),
  },
  'Reconstructions': {
    'mse_of_mean': ('Mean squared error', LESS),
    'psnr': ('Peak signal-to-noise ratio', MORE),
    'ssim': ('Structural similarity', MORE),
  },
  'Latent space': {
    'active_units': ('Active dimensions', ''),
    'dimensions_of_90_percent': ('Dimensions with 90 % of the rate', ''),
    'mutual_information': ('Mutual information of x and z', ''),
    'total_correlation': ('Total correlation', LESS),
    'gaussian_total_correlation': ('Total correlation of a Gaussian', LESS),
    'dimension_wise_kl': ('KL of the dimensions to the prior', LESS),
    'prior_in_holes': ('Draws of the prior in holes of q(z)', LESS),
    'mixture_in_holes': ('Draws of the mixture in holes of q(z)', LESS),
  },
  'Labels in the code': {
    'linear_accuracy': ('Accuracy of a linear probe', MORE),
    'majority_accuracy': ('… of naming the commonest class', ''),
    'mig': ('Mutual information gap', MORE),
    'dci_disentanglement': ('DCI disentanglement', MORE),
    'dci_completeness': ('DCI completeness', MORE),
    'dci_informativeness': ('DCI informativeness', MORE),
    'sap': ('Separated attribute predictability', MORE),
    'sap_svm': ('… by a linear SVM', MORE),
  },
  'Image quality': {
    'fid_samples': ('FID of samples', LESS),
    'fid_reconstructions': ('FID of reconstructions', LESS),
    'kid_samples': ('KID of samples', LESS),
    'kid_reconstructions': ('KID of reconstructions', LESS),
  },
}

# Of metrics of evaluators that are not the project's.
_OTHERS = 'Other numbers'


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
