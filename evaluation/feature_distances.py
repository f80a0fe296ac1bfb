"""Distances between two sets of images, taken between their features.

Both are zero for equal distributions, and smaller is better. They are computed
in float64, on the host.
"""

import numpy as np


def fid(features_1: np.ndarray, features_2: np.ndarray) -> float:
  """Fréchet Inception Distance (Heusel et al. 2017).

  It is biased: the fewer the images, the larger it is, so that only distances
  between equally many images can be compared.

  Args:
    features_1: of one set of images, [n, dimensions], at least 2 images.
    features_2: of the other, [m, dimensions], at least 2 images.

  Returns:
    The Fréchet distance of the Gaussians that have the features' means and
    unbiased covariances.
  """
  return frechet_distance(*_moments(features_1), *_moments(features_2))


def frechet_distance(
  mean_1: np.ndarray,
  cov_1: np.ndarray,
  mean_2: np.ndarray,
  cov_2: np.ndarray,
) -> float:
  """‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½) (Heusel et al. 2017, eq. 6).

  The matrix under the root is not symmetric, but has the eigenvalues of
  C1^½ C2 C1^½, which is. The trace of the root is the sum of their roots,
  real whatever the rank of the covariances.

  Args:
    mean_1: [dimensions].
    cov_1: [dimensions, dimensions], symmetric, no eigenvalue below zero.
    mean_2: as `mean_1`.
    cov_2: as `cov_1`.

  Returns:
    The squared distance between the two Gaussians, at least 0.
  """
  mean_1, cov_1, mean_2, cov_2 = (
    np.asarray(a, np.float64) for a in (mean_1, cov_1, mean_2, cov_2)
  )
  values, vectors = np.linalg.eigh(cov_1)
  # Rounding makes some of the eigenvalues that are zero negative.
  root = vectors * np.sqrt(np.maximum(values, 0))
  product = root.T @ cov_2 @ root
  trace_of_root = np.sum(
    np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0))
  )
  squares = np.sum(np.square(mean_1 - mean_2))
  distance = squares + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_of_root
  return max(float(distance), 0.0)


def kid(
  features_1: np.ndarray,
  features_2: np.ndarray,
  num_subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """Kernel Inception Distance (Bińkowski et al. 2018).

  The mean, over random subsets of both sets, of the unbiased squared MMD. Being
  unbiased, it does not depend on the number of images but for its noise, and
  can be below zero.

  Args:
    features_1: of one set of images, [n, dimensions], at least 2 images.
    features_2: of the other, [m, dimensions], at least 2 images.
    num_subsets: how many pairs of subsets are drawn.
    subset_size: images in each subset, drawn without replacement; less where
      a set has fewer images.
    seed: of the subsets.

  Returns:
    Mean and standard deviation over the subsets. The deviation tells how far
    an estimate from one subset is from the mean, and is of use only where the
    sets are several times as large as the subsets.
  """
  features_1, features_2 = (
    np.asarray(a, np.float64) for a in (features_1, features_2)
  )
  size = min(subset_size, len(features_1), len(features_2))
  rng = np.random.default_rng(seed)
  estimates = [
    mmd2(
      rng.choice(features_1, size, replace=False),
      rng.choice(features_2, size, replace=False),
    )
    for _ in range(num_subsets)
  ]
  return float(np.mean(estimates)), float(np.std(estimates))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
  """Unbiased squared MMD under the kernel (xᵀy/d + 1)³.

  The kernel is Bińkowski et al.'s (2018, section 4), the estimator Gretton et
  al.'s (2012, eq. 3): means over all pairs, but of none with itself.

  Args:
    x: [n, d], float64.
    y: [m, d], float64.
  """

  def mean_within(a):
    kernel = _kernel(a, a)
    return (kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1))

  return mean_within(x) + mean_within(y) - 2 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """The kernel of all pairs, [n, m]."""
  kernel = x @ y.T / x.shape[-1] + 1
  return kernel * kernel * kernel  # Faster than NumPy's power.


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  features = np.asarray(features, np.float64)
  return features.mean(axis=0), np.cov(features, rowvar=False)
