"""FID and KID: distances of a model's images from real ones.

Distances are between Inception features [n, dimensions] of two sets of at least
two images, in float64; 0 for equal distributions, and smaller is better.
"""

import functools

import jax
import numpy as np

from evaluation import inception
from vae import devices
from vae import figures
from vae import splits
from vae.errors import UserError

# Images that go through the Inception network at a time, on each device.
_BATCH_SIZE = 32


def check(context) -> str | None:
  """Loads the network's weights, unless that fails and no file was named."""
  try:
    inception.load(context.settings.inception_weights)
  except UserError as error:
    if context.settings.inception_weights:
      raise
    return str(error)
  return None


def evaluate(context, results) -> None:
  """Adds FID and KID of samples and of reconstructions."""
  weights = inception.load(context.settings.inception_weights)
  weights = devices.replicate(weights)
  trained, split, seed = context.trained, context.split, context.settings.seed
  num_devices = jax.local_device_count()
  # A batch is padded to its full size: it is no larger than the split.
  per_device = min(_BATCH_SIZE, -(-split.num_examples // num_devices))

  def features(label, images):
    return context.over_split(
      lambda batch, start: _extract()(weights, batch),
      f'Inception features of {label}',
      images,
      per_device * num_devices,
    )

  def uint8_batches(function, batches):
    # The floats of a large split would fill the memory.
    images = [figures.to_uint8(function(batch)) for batch in batches]
    return splits.ArraySplit(np.concatenate(images))

  real = features('images', split)
  print('decoding samples and reconstructions …', flush=True)
  positions, size = np.arange(split.num_examples), context.settings.batch_size
  z = trained.sample_latents(split.num_examples, seed)
  z = [z[start : start + size] for start in range(0, len(z), size)]
  made = {
    'samples': uint8_batches(trained.decode, z),
    'reconstructions': uint8_batches(
      trained.reconstruct, split.batches(positions, size)
    ),
  }
  for name, images in made.items():
    found = features(name, images)
    about = f'of {len(found):,} {name} against the {len(real):,} images'
    results.number(f'fid_{name}', fid(real, found), 'Fréchet distance', about)
    value, _ = kid(real, found, seed=seed)
    results.number(f'kid_{name}', value, 'squared MMD', about)


@functools.cache
def _extract():
  """The network's features, compiled once for all models."""
  return jax.pmap(inception.features, in_axes=(None, 0))


def fid(features_1: np.ndarray, features_2: np.ndarray) -> float:
  """Fréchet Inception Distance (Heusel et al. 2017).

  The Fréchet distance of the Gaussians with the features' means and unbiased
  covariances. It is biased: the fewer the images, the larger it is, so that
  only distances between equally many images can be compared.
  """
  moments = []
  for features in (features_1, features_2):
    features = np.asarray(features, np.float64)
    moments += [features.mean(axis=0), np.cov(features, rowvar=False)]
  return frechet_distance(*moments)


def frechet_distance(
  mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray
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
  """
  values, vectors = np.linalg.eigh(cov_1)
  # Rounding makes some of the eigenvalues that are zero negative.
  root = vectors * np.sqrt(np.maximum(values, 0))
  product = root.T @ cov_2 @ root
  values = np.linalg.eigvalsh((product + product.T) / 2)
  trace_of_root = np.sum(np.sqrt(np.maximum(values, 0)))
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

  The mean and the deviation, over random subsets of both sets, of the unbiased
  squared MMD, which does not depend on the number of images but for its noise,
  and can be below zero. Subsets are drawn without replacement, and are smaller
  if a set has fewer images. The deviation is of use only if the sets are
  several times as large as the subsets.
  """
  features_1, features_2 = (
    np.asarray(a, np.float64) for a in (features_1, features_2)
  )
  size = min(subset_size, len(features_1), len(features_2))
  choice = functools.partial(np.random.default_rng(seed).choice, replace=False)
  estimates = [
    mmd2(choice(features_1, size), choice(features_2, size))
    for _ in range(num_subsets)
  ]
  return float(np.mean(estimates)), float(np.std(estimates))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
  """Unbiased squared MMD of [n, d] and [m, d] under the kernel (xᵀy/d + 1)³.

  The kernel is Bińkowski et al.'s (2018, section 4), the estimator Gretton et
  al.'s (2012, eq. 3): means over all pairs, but of none with itself.
  """

  def kernel(a, b):
    product = a @ b.T / a.shape[-1] + 1
    return product * product * product  # Faster than NumPy's power.

  def mean_within(a):
    values = kernel(a, a)
    return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

  return mean_within(x) + mean_within(y) - 2 * kernel(x, y).mean()
