import numpy as np
import pytest

from evaluation import disentanglement
from evaluation.disentanglement import completeness
from evaluation.disentanglement import dci
from evaluation.disentanglement import evaluate
from evaluation.disentanglement import linear_probe
from evaluation.disentanglement import mean
from evaluation.disentanglement import mutual_information
from evaluation.disentanglement import mutual_information_gap
from evaluation.disentanglement import sap

NUM_TRAIN, NUM_TEST = 2000, 1000


def binary_factors(num_factors, seed=0):
  """Train and test factors, independent, each with two equal classes."""
  total = NUM_TRAIN + NUM_TEST
  factors = np.random.default_rng(seed).integers(0, 2, (total, num_factors))
  return factors[:NUM_TRAIN], factors[NUM_TRAIN:]


def jitter(codes, scale=0.05, seed=1):
  return codes + scale * np.random.default_rng(seed).normal(size=codes.shape)


def with_codes(encode, factors):
  """Codes and factors, train and test, as the metrics take them."""
  train, test = factors
  return encode(train), train, encode(test), test


def random_codes(factors, latent_dim=4):
  generator = np.random.default_rng(9)
  train, test = (generator.normal(size=(len(f), latent_dim)) for f in factors)
  return train, factors[0], test, factors[1]


def test_perfect_codes():
  data = with_codes(jitter, binary_factors(4))
  scores = evaluate(*data)
  np.testing.assert_allclose(scores.mig, 1, atol=0.02)
  # The best code is always right, the second one by chance.
  np.testing.assert_allclose(scores.sap, 0.5, atol=0.05)
  np.testing.assert_array_equal(scores.dci.importances, np.eye(4))
  assert scores.means() == pytest.approx(
    {
      'linear_accuracy': 1,
      'linear_balanced_accuracy': 1,
      'majority_accuracy': 0.5,
      'mig': 1,
      'dci_disentanglement': 1,
      'dci_completeness': 1,
      'dci_informativeness': 1,
      'sap': 0.5,
      'sap_svm': 0.5,
    },
    abs=0.03,
  )


def test_order_sign_and_units_of_codes_do_not_matter():
  data = with_codes(lambda f: jitter(f, 0.5), binary_factors(4))
  order, scale, shift = [2, 0, 3, 1], [-3.0, 0.01, 200.0, -1.0], [5, 0, -7, 1]
  changed = list(data)
  for part in (0, 2):
    changed[part] = (data[part] * scale + shift)[:, order]
  expected, actual = evaluate(*data), evaluate(*changed)
  # A change of sign decides otherwise which bin an edge belongs to, and the
  # solvers stop elsewhere.
  assert actual.means() == pytest.approx(expected.means(), abs=0.005)
  assert expected.means()['sap'] == pytest.approx(0.34, abs=0.03)
  np.testing.assert_allclose(
    actual.dci.importances, expected.dci.importances[order], atol=0.02
  )


def test_every_factor_in_two_codes():
  num_factors = 6
  encode = lambda f: jitter(np.concatenate([f, f], axis=1))
  data = with_codes(encode, binary_factors(num_factors))
  scores = evaluate(*data)
  np.testing.assert_allclose(scores.mig, 0, atol=0.01)
  np.testing.assert_allclose(scores.sap, 0, atol=0.01)
  assert scores.dci.disentanglement == pytest.approx(1, abs=0.01)
  # Which of the two a tree takes is a toss-up, so that the shares of ten
  # trees are only about equal, and their entropy is below log 2.
  equal_shares = 1 - np.log(2) / np.log(2 * num_factors)
  assert scores.dci.completeness == pytest.approx(equal_shares, abs=0.05)


def test_completeness_of_equal_shares():
  importances = np.array([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]])
  assert disentanglement.disentanglement(importances) == pytest.approx(1)
  expected = 1 - np.log(2) / np.log(4)
  assert completeness(importances) == pytest.approx(expected)


def test_disentanglement_weighs_codes_by_their_importance():
  # Codes with shares (1), (¼, ¾), dead; weights ⅓, ⅔, 0.
  importances = np.array([[1.0, 0.0], [0.5, 1.5], [0.0, 0.0]])
  entropy = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
  expected = 1 / 3 + 2 / 3 * (1 - entropy)
  actual = disentanglement.disentanglement(importances)
  assert actual == pytest.approx(expected)


def test_importances_without_any_use():
  assert disentanglement.disentanglement(np.zeros((3, 2))) == 0
  assert completeness(np.zeros((3, 2))) == 0


def test_one_code_of_two_factors():
  # Its levels 0 to 3 tell both factors; the next code tells the next two.
  encode = lambda f: jitter(2 * f[:, ::2] + f[:, 1::2])
  scores = dci(*with_codes(encode, binary_factors(4)))
  assert scores.informativeness == pytest.approx(1, abs=0.001)
  assert scores.completeness == pytest.approx(1, abs=0.02)
  expected = 1 - np.log(2) / np.log(4)
  assert scores.disentanglement == pytest.approx(expected, abs=0.02)


def test_rotated_codes():
  turn = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
  encode = lambda f: jitter((2 * f - 1) @ turn, 0.3)
  scores = evaluate(*with_codes(encode, binary_factors(2)))
  np.testing.assert_allclose(scores.mig, 0, atol=0.03)
  np.testing.assert_allclose(scores.sap, 0, atol=0.05)
  assert scores.dci.disentanglement < 0.2
  assert scores.dci.completeness < 0.2
  # All is still there.
  assert scores.probe.accuracy.min() > 0.98
  assert scores.dci.informativeness > 0.95


def test_random_codes():
  scores = evaluate(*random_codes(binary_factors(4)))
  np.testing.assert_allclose(scores.mig, 0, atol=0.01)
  np.testing.assert_allclose(scores.sap, 0, atol=0.05)
  np.testing.assert_allclose(scores.sap_svm, 0, atol=0.05)
  np.testing.assert_allclose(scores.probe.balanced_accuracy, 0.5, atol=0.05)
  assert scores.dci.disentanglement < 0.1
  assert scores.dci.completeness < 0.1
  assert scores.dci.informativeness == pytest.approx(0.5, abs=0.05)


def test_permuted_factors_give_the_scores_of_random_codes():
  # A third of the images have the first attribute, and never the second.
  first, second = binary_factors(2)
  factors = [
    part * [1, 0] + (1 - part[:, :1]) * part * [0, 1]
    for part in (first, second)
  ]
  codes = [jitter(part, 0.5) for part in factors]
  permuted = disentanglement.permute(*factors, seed=0)
  for part, other in zip(factors, permuted, strict=True):
    # The same images, in another order.
    np.testing.assert_array_equal(
      np.sort(part @ [1, 2]), np.sort(other @ [1, 2])
    )
  chance = evaluate(codes[0], permuted[0], codes[1], permuted[1])
  random = evaluate(*random_codes(factors, latent_dim=2))
  assert chance.means() == pytest.approx(random.means(), abs=0.06)
  assert chance.probe.balanced_accuracy == pytest.approx(0.5, abs=0.05)
  found = evaluate(codes[0], factors[0], codes[1], factors[1]).means()
  for name in ('linear_balanced_accuracy', 'mig', 'dci_completeness', 'sap'):
    assert found[name] > chance.means()[name] + 0.1


def test_dead_codes_change_nothing():
  data = with_codes(jitter, binary_factors(3))
  dead = lambda f: np.pad(jitter(f), ((0, 0), (0, 2)), constant_values=0.3)
  padded = with_codes(dead, binary_factors(3))
  expected, actual = evaluate(*data), evaluate(*padded)
  assert actual.means() == pytest.approx(expected.means(), abs=1e-6)
  np.testing.assert_array_equal(actual.dci.importances[3:], 0)


@pytest.mark.parametrize('latent_dim', [1, 2])
def test_one_live_code_has_its_gap_to_zero(latent_dim):
  width = ((0, 0), (0, latent_dim - 1))
  data = with_codes(lambda f: np.pad(jitter(f), width), binary_factors(1))
  scores = evaluate(*data)
  np.testing.assert_allclose(scores.sap, 1)
  np.testing.assert_allclose(scores.mig, 1)
  assert scores.dci.completeness == 1
  # There are no two factors that a code could be of use to.
  assert np.isnan(scores.dci.disentanglement)


def test_collapsed_code():
  data = with_codes(lambda f: np.zeros((len(f), 3)), binary_factors(2))
  scores = evaluate(*data)
  np.testing.assert_array_equal(scores.mig, 0)
  np.testing.assert_array_equal(scores.sap, 0)
  assert scores.dci.disentanglement == scores.dci.completeness == 0
  np.testing.assert_array_equal(scores.probe.balanced_accuracy, 0.5)


def test_factors_of_many_values():
  generator = np.random.default_rng(3)
  total = NUM_TRAIN + NUM_TEST
  factors = generator.integers(0, [3, 10], (total, 2))
  factors = factors[:NUM_TRAIN], factors[NUM_TRAIN:]
  scores = evaluate(*with_codes(lambda f: f.astype(float), factors))
  # The other code's information is not 0, but as biased as the docstring has
  # it, for the 10 and the 3 bins that are not empty.
  bias = 9 * 2 / (2 * NUM_TRAIN)
  expected = 1 - bias / np.log([3, 10])
  np.testing.assert_allclose(scores.mig, expected, atol=0.003)
  np.testing.assert_allclose(scores.sap, [1 - 1 / 3, 1 - 1 / 10], atol=0.05)
  assert scores.dci.informativeness > 0.99
  assert scores.dci.disentanglement > 0.95
  assert scores.dci.completeness > 0.95


def test_bias_of_information():
  generator = np.random.default_rng(3)
  codes = generator.uniform(size=(2000, 50))
  factors = generator.integers(0, 4, (2000, 8))
  information = mutual_information(codes, factors)
  assert information.mean() == pytest.approx(19 * 3 / (2 * 2000), rel=0.05)


def test_information_is_that_of_the_table():
  codes = np.repeat([0.0, 0.0, 1.0, 1.0], [3, 1, 1, 3])[:, None]
  factors = np.repeat([0, 1, 0, 1], [3, 1, 1, 3])[:, None]
  # Joint shares ⅜ and ⅛, marginal ones ½.
  expected = 2 * 3 / 8 * np.log(1.5) + 2 * 1 / 8 * np.log(0.5)
  assert mutual_information(codes, factors) == pytest.approx(expected)
  gap = mutual_information_gap(codes, factors)
  assert gap == pytest.approx(expected / np.log(2))


@pytest.mark.parametrize('num_levels, expected', [(20, 1), (40, 0)])
def test_codes_fall_into_twenty_bins(num_levels, expected):
  # Of 20 levels each has its bin, of 40 an odd one and an even one share it.
  levels = np.tile(np.arange(num_levels), 10)[:, None]
  gap = mutual_information_gap(levels.astype(float), levels % 2)
  assert gap == pytest.approx(expected, abs=1e-9)


def test_gap_is_to_the_second_best_code():
  factors = np.tile([0, 1], 4000)[:, None]
  flips = np.random.default_rng(0).random((8000, 3)) < [0.0, 0.1, 0.4]
  gap = mutual_information_gap((factors ^ flips).astype(float), factors)
  # What a binary channel that errs at a tenth takes away.
  expected = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9))
  assert gap == pytest.approx(expected, abs=0.03)


def test_sap_is_by_balanced_accuracy():
  # One image in ten has the attribute. The first code shows it in all of
  # them and also in a fifth of the rest, the second one in half of either.
  generator = np.random.default_rng(5)
  total = NUM_TRAIN + NUM_TEST
  factors = (generator.random((total, 1)) < 0.1).astype(int)
  chances = np.where(factors, [1.0, 0.5], [0.2, 0.5])
  codes = jitter(generator.random((total, 2)) < chances)
  parts = slice(NUM_TRAIN), slice(NUM_TRAIN, None)
  data = [x[part] for part in parts for x in (codes, factors)]
  assert sap(*data) == pytest.approx(0.9 - 0.5, abs=0.08)


def test_sap_svm_is_the_gap_of_accuracies():
  # Codes that err in a tenth and in three tenths of the images.
  generator = np.random.default_rng(5)
  total = NUM_TRAIN + NUM_TEST
  factors = generator.integers(0, 2, (total, 1))
  codes = jitter(factors ^ (generator.random((total, 2)) < [0.1, 0.3]))
  parts = slice(NUM_TRAIN), slice(NUM_TRAIN, None)
  data = [x[part] for part in parts for x in (codes, factors)]
  assert disentanglement.sap_svm(*data) == pytest.approx(0.2, abs=0.05)


def test_sap_svm_cannot_cut_out_inner_values():
  # Each of the ten values has its interval of the code, which thresholds find.
  generator = np.random.default_rng(3)
  factors = generator.integers(0, 10, (NUM_TRAIN + NUM_TEST, 1))
  factors = factors[:NUM_TRAIN], factors[NUM_TRAIN:]
  data = with_codes(lambda f: jitter(f.astype(float)), factors)
  assert sap(*data) > 0.95
  assert disentanglement.sap_svm(*data) < 0.5


def test_balanced_accuracy_is_the_mean_of_recalls():
  labels = np.array([0, 0, 0, 0, 2, 2])
  named = np.array([0, 0, 0, 1, 2, 0])
  actual = disentanglement.balanced_accuracy(labels, named)
  assert actual == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_linear_probe_of_a_sum_of_codes():
  generator = np.random.default_rng(2)
  codes = generator.normal(size=(NUM_TRAIN + NUM_TEST, 5))
  heights = codes @ [1, -2, 0.5, 0, 3]
  apart = np.abs(heights) > 0.3
  codes, factors = codes[apart], (heights[apart] > 0)[:, None].astype(int)
  probe = linear_probe(
    *(codes[:NUM_TRAIN], factors[:NUM_TRAIN]),
    *(codes[NUM_TRAIN:], factors[NUM_TRAIN:]),
  )
  assert probe.accuracy > 0.99
  assert probe.majority_accuracy < 0.6


def test_linear_probe_of_random_codes_names_the_majority():
  generator = np.random.default_rng(2)
  total = NUM_TRAIN + NUM_TEST
  factors = (generator.random((total, 1)) < 0.8).astype(int)
  probe = linear_probe(
    *random_codes((factors[:NUM_TRAIN], factors[NUM_TRAIN:]))
  )
  expected = factors[NUM_TRAIN:].mean()
  assert probe.majority_accuracy == pytest.approx(expected)
  assert probe.accuracy == pytest.approx(expected, abs=0.01)
  assert probe.balanced_accuracy == pytest.approx(0.5, abs=0.02)


def test_errors_of_the_probe_are_binomial():
  # Three copies of a factor are no three times as many images.
  train, test = binary_factors(1)
  factors = np.repeat(train, 3, axis=1), np.repeat(test, 3, axis=1)
  codes = [jitter(part[:, :1].astype(float), 0.5) for part in factors]
  probe = linear_probe(codes[0], factors[0], codes[1], factors[1])
  share = probe.accuracy[0]
  assert 0.7 < share < 0.95
  expected = np.sqrt(share * (1 - share) / NUM_TEST)
  assert probe.standard_errors[0] == pytest.approx(expected, rel=0.01)


def test_errors_of_the_probe_cover_other_test_images():
  generator = np.random.default_rng(0)

  def draw(count):
    factors = (generator.random((count, 2)) < [0.2, 0.5]).astype(int)
    return factors + 0.6 * generator.normal(size=factors.shape), factors

  train = draw(300)
  probes = [linear_probe(*train, *draw(400)) for _ in range(60)]
  values = [
    (
      mean(probe.accuracy),
      mean(probe.balanced_accuracy),
      mean(probe.majority_accuracy),
    )
    for probe in probes
  ]
  stated = np.mean([probe.standard_errors for probe in probes], axis=0)
  np.testing.assert_allclose(stated, np.std(values, axis=0, ddof=1), rtol=0.3)


def test_majority_is_that_of_training():
  codes = np.zeros((10, 1))
  train = np.repeat([0, 1], [7, 3])[:, None]
  test = np.repeat([0, 1], [2, 8])[:, None]
  probe = linear_probe(codes, train, codes, test)
  assert probe.majority_accuracy == pytest.approx(0.2)


def test_exclusive_or_is_not_linear():
  factors = binary_factors(2)
  exclusive_or = [part[:, :1] ^ part[:, 1:] for part in factors]

  def accuracy(encode):
    train, test = (encode(jitter(2 * part - 1)) for part in factors)
    return linear_probe(train, exclusive_or[0], test, exclusive_or[1]).accuracy

  # No line has more than three of the four corners on their right side.
  assert accuracy(lambda codes: codes) < 0.78
  # Yet the codes tell it: the sign of their product does.
  assert accuracy(lambda codes: codes.prod(axis=1, keepdims=True)) == 1


@pytest.mark.parametrize('constant_part', ['train', 'test', 'both'])
def test_factor_of_one_value_is_left_out(constant_part):
  factors = binary_factors(4)
  codes = [jitter(part, 0.5) for part in factors]
  for name, part in zip(('train', 'test'), factors, strict=True):
    if constant_part in (name, 'both'):
      part[:, 1] = 1
  actual = evaluate(codes[0], factors[0], codes[1], factors[1])
  kept = [0, 2, 3]
  expected = evaluate(
    *(codes[0], factors[0][:, kept], codes[1], factors[1][:, kept])
  )
  for values, others in (
    (actual.probe.accuracy, expected.probe.accuracy),
    (actual.probe.balanced_accuracy, expected.probe.balanced_accuracy),
    (actual.probe.majority_accuracy, expected.probe.majority_accuracy),
    (actual.sap, expected.sap),
    (actual.sap_svm, expected.sap_svm),
    (actual.dci.accuracy, expected.dci.accuracy),
    (actual.dci.importances.T, expected.dci.importances.T),
  ):
    assert np.all(np.isnan(values[1]))
    np.testing.assert_array_equal(values[kept], others)
  np.testing.assert_array_equal(actual.mig[kept], expected.mig)
  # It needs no test images, and so misses nothing in them.
  assert np.isnan(actual.mig[1]) == (constant_part != 'test')
  means = actual.means()
  assert means.pop('mig') == mean(actual.mig)
  assert means.items() <= expected.means().items()


def test_without_any_factor_to_score():
  factors = np.zeros((50, 2), int)
  codes = np.random.default_rng(0).normal(size=(50, 3))
  scores = evaluate(codes, factors, codes, factors)
  assert all(np.isnan(value) for value in scores.means().values())


def test_seed_fixes_the_result():
  data = with_codes(lambda f: jitter(f, 1.0), binary_factors(3))
  first, again, other = (dci(*data, seed=seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first.importances, again.importances)
  assert first.disentanglement == again.disentanglement
  assert first.informativeness == again.informativeness
  assert not np.array_equal(first.importances, other.importances)
