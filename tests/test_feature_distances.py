import numpy as np
import pytest
from scipy import linalg
from scipy import stats

from evaluation import feature_distances


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def random_cov(size, rank=None, seed=0):
  factors = random(size, rank or 2 * size, seed=seed)
  return factors @ factors.T / factors.shape[1]


def frechet(cov_1, cov_2, difference=0.0):
  mean = np.zeros(len(cov_1))
  return feature_distances.frechet_distance(
    mean, cov_1, mean + difference, cov_2
  )


@pytest.mark.parametrize('rank', [None, 3])
def test_frechet_of_equal_gaussians_is_zero(rank):
  cov = random_cov(10, rank)
  assert frechet(cov, cov) == pytest.approx(0, abs=1e-6)


def test_frechet_of_equal_covariances_is_the_means_distance():
  cov = random_cov(4)
  assert frechet(cov, cov, [3, 0, 0, 4]) == pytest.approx(25)


def test_frechet_of_diagonal_covariances():
  first, second = [4, 9, 0, 1], [1, 16, 25, 0]
  expected = 1 + 1 + 25 + 1
  assert frechet(np.diag(first), np.diag(second)) == pytest.approx(expected)


def test_frechet_of_commuting_covariances():
  basis = stats.ortho_group.rvs(6, random_state=0)
  first, second = np.random.default_rng(0).uniform(0, 5, (2, 6))
  expected = np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
  actual = frechet((basis * first) @ basis.T, (basis * second) @ basis.T)
  assert actual == pytest.approx(expected)


@pytest.mark.parametrize('size', [2, 7, 40])
def test_frechet_is_that_of_a_general_matrix_root(size):
  first, second = random_cov(size), random_cov(size, seed=1)
  difference = random(size, seed=2)
  root = linalg.sqrtm(first @ second).real
  expected = difference @ difference + np.trace(first + second - 2 * root)
  assert frechet(first, second, difference) == pytest.approx(expected)
  assert frechet(second, first, difference) == pytest.approx(expected)


def test_frechet_does_not_see_rotations():
  first, second, mean = random_cov(8), random_cov(8, seed=1), random(8)
  turn = stats.ortho_group.rvs(8, random_state=0)
  turned = frechet(turn @ first @ turn.T, turn @ second @ turn.T, turn @ mean)
  assert turned == pytest.approx(frechet(first, second, mean))


def test_frechet_of_rank_deficient_covariances():
  # The root has the singular values of the factors' product as eigenvalues.
  first, second = random(50, 3), random(50, 5, seed=1)
  nuclear = np.linalg.svd(first.T @ second, compute_uv=False).sum()
  expected = np.sum(first**2) + np.sum(second**2) - 2 * nuclear
  actual = frechet(first @ first.T, second @ second.T)
  assert actual == pytest.approx(expected, rel=1e-5)


def test_fid_is_the_distance_of_the_moments():
  first, second = random(30, 4), 2 * random(20, 4, seed=1) + 1
  expected = feature_distances.frechet_distance(
    first.mean(axis=0), np.cov(first.T), second.mean(axis=0), np.cov(second.T)
  )
  assert feature_distances.fid(first, second) == pytest.approx(expected)


def test_fid_of_fewer_images_than_dimensions():
  few = random(5, 20).astype(np.float32)
  assert feature_distances.fid(few, few) == pytest.approx(0, abs=1e-5)
  assert feature_distances.fid(few, few + 2) == pytest.approx(80)


def test_fid_is_computed_in_float64():
  # In float32 the variance would drown in the mean.
  features = (random(100, 3) + 4096).astype(np.float32)
  assert feature_distances.fid(features, 2 * features - 4096) == pytest.approx(
    np.square(features.mean(axis=0, dtype=np.float64) - 4096).sum()
    + np.var(features, axis=0, dtype=np.float64, ddof=1).sum(),
    rel=1e-6,
  )


def plain_mmd2(x, y):
  """The definition, pair by pair."""

  def kernel(a, b):
    return (np.dot(a, b) / len(a) + 1) ** 3

  def mean_within(a):
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]
    return np.mean([kernel(a[i], a[j]) for i, j in pairs])

  across = np.mean([kernel(a, b) for a in x for b in y])
  return mean_within(x) + mean_within(y) - 2 * across


def test_mmd_is_the_plain_sum():
  x, y = random(7, 5), random(9, 5, seed=1) + 0.5
  assert feature_distances.mmd2(x, y) == pytest.approx(plain_mmd2(x, y))


def test_mmd_is_zero_on_average_for_one_distribution():
  estimates = np.array(
    [feature_distances.mmd2(*random(2, 10, 4, seed=i)) for i in range(2000)]
  )
  error = estimates.std() / np.sqrt(len(estimates))
  assert abs(estimates.mean()) < 3 * error
  # And so it is below zero about as often as above.
  assert (estimates < 0).mean() > 0.3


def test_kid_of_small_sets_takes_all_their_images():
  x, y = random(12, 6).astype(np.float32), random(12, 6, seed=1) + 1
  mean, deviation = feature_distances.kid(x, y, num_subsets=3)
  assert mean == pytest.approx(plain_mmd2(x.astype(np.float64), y))
  assert deviation == pytest.approx(0, abs=1e-9)


def test_kid_grows_with_the_shift():
  x, y = random(200, 8), random(150, 8, seed=1)
  near, shifted, far = (
    feature_distances.kid(x, y + shift, num_subsets=5)[0]
    for shift in (0, 0.5, 1)
  )
  assert abs(near) < shifted < far


def test_kid_of_subsets():
  x, y = random(300, 4), random(300, 4, seed=1) + 0.5
  everything = feature_distances.mmd2(x, y)
  mean, deviation = feature_distances.kid(x, y, num_subsets=400, subset_size=50)
  assert deviation > 0
  assert mean == pytest.approx(everything, abs=4 * deviation / np.sqrt(400))
  smaller = feature_distances.kid(x, y, num_subsets=400, subset_size=25)
  assert smaller[1] > deviation


def test_kids_seed_draws_the_subsets():
  x, y = random(60, 4), random(60, 4, seed=1)

  def kid(seed):
    return feature_distances.kid(x, y, 5, subset_size=20, seed=seed)

  assert kid(0) == kid(0)
  assert kid(0) != kid(1)
