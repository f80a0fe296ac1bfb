import numpy as np
import pytest

from evaluation import labels
from evaluation.labels import Data

NUM_TRAIN, NUM_TEST = 2000, 1000


def binary_factors(num_factors, seed=0):
  """Train and test factors, independent, each with two equal classes."""
  total = NUM_TRAIN + NUM_TEST
  factors = np.random.default_rng(seed).integers(0, 2, (total, num_factors))
  return factors[:NUM_TRAIN], factors[NUM_TRAIN:]


def jitter(codes, scale=0.05, seed=1):
  return codes + scale * np.random.default_rng(seed).normal(size=codes.shape)


def with_codes(encode, factors):
  train, test = factors
  return Data(encode(train), train, encode(test), test)


def random_codes(factors, latent_dim=4):
  generator = np.random.default_rng(9)
  return with_codes(
    lambda part: generator.normal(size=(len(part), latent_dim)), factors
  )


def means(data, seed=0):
  return labels.score(data, seed)[0]


def test_perfect_codes():
  data = with_codes(jitter, binary_factors(4))
  expected = dict.fromkeys(labels.ABOUT, 1)
  # The best code is always right, the second one by chance.
  expected |= dict.fromkeys(('majority_accuracy', 'sap', 'sap_svm'), 0.5)
  assert means(data) == pytest.approx(expected, abs=0.05)


def test_factor_in_two_codes_is_disentangled_but_incomplete():
  encode = lambda f: jitter(np.concatenate([f, f], axis=1))
  found = means(with_codes(encode, binary_factors(6)))
  # Which of the two a tree takes is a toss-up, so that the shares of ten trees
  # are only about equal.
  equal_shares = 1 - np.log(2) / np.log(12)
  assert found['mig'] == pytest.approx(0, abs=0.01)
  assert found['sap'] == pytest.approx(0, abs=0.01)
  assert found['dci_disentanglement'] == pytest.approx(1, abs=0.01)
  assert found['dci_completeness'] == pytest.approx(equal_shares, abs=0.05)


def test_code_of_two_factors_is_complete_but_entangled():
  # Its levels 0 to 3 have both factors; the next code the next two.
  encode = lambda f: jitter(2 * f[:, ::2] + f[:, 1::2])
  found = means(with_codes(encode, binary_factors(4)))
  assert found['dci_informativeness'] == pytest.approx(1, abs=0.001)
  assert found['dci_completeness'] == pytest.approx(1, abs=0.02)
  expected = 1 - np.log(2) / np.log(4)
  assert found['dci_disentanglement'] == pytest.approx(expected, abs=0.02)


def test_permuted_factors_give_the_scores_of_random_codes():
  # A third of the images have the first attribute, and never the second.
  first, second = binary_factors(2)
  factors = [
    part * [1, 0] + (1 - part[:, :1]) * part * [0, 1]
    for part in (first, second)
  ]
  data = with_codes(lambda f: jitter(f, 0.5), factors)
  permuted = data.permuted(0)
  # The same images, in another order.
  np.testing.assert_array_equal(
    np.sort(data.factors @ [1, 2]), np.sort(permuted.factors @ [1, 2])
  )
  chance = means(permuted)
  assert chance == pytest.approx(means(random_codes(factors, 2)), abs=0.06)
  found = means(data)
  for name in ('linear_accuracy', 'mig', 'dci_completeness', 'sap'):
    assert found[name] > chance[name] + 0.1


@pytest.mark.parametrize('latent_dim', [1, 3])
def test_dead_codes_change_nothing_and_a_live_one_has_its_gap_to_0(latent_dim):
  width = ((0, 0), (0, latent_dim - 1))
  found = means(
    with_codes(lambda f: np.pad(jitter(f), width), binary_factors(1))
  )
  for name in ('sap', 'mig', 'dci_completeness'):
    assert found[name] == pytest.approx(1)
  # There are no two factors that a code could be of use to.
  assert np.isnan(found['dci_disentanglement'])


def test_factors_of_many_values():
  generator = np.random.default_rng(3)
  factors = generator.integers(0, [3, 10], (NUM_TRAIN + NUM_TEST, 2))
  factors = factors[:NUM_TRAIN], factors[NUM_TRAIN:]
  _, by_factor, _ = labels.score(
    with_codes(lambda f: jitter(f.astype(float), 1e-6), factors)
  )
  # The other code's information is not 0, but as biased as Miller's formula
  # has it, for the 10 and the 3 bins that are not empty.
  bias = 9 * 2 / (2 * NUM_TRAIN)
  expected = 1 - bias / np.log([3, 10])
  np.testing.assert_allclose(by_factor['mig'], expected, atol=0.003)
  np.testing.assert_allclose(by_factor['sap'], [2 / 3, 9 / 10], atol=0.05)
  # A line cannot cut out inner values.
  assert by_factor['sap_svm'][1] < 0.5


def test_importances_are_weighed_as_in_the_paper():
  # Codes with shares (1), (¼, ¾), dead; weights ⅓, ⅔, 0.
  importances = np.array([[1.0, 0.0], [0.5, 1.5], [0.0, 0.0]])
  entropy = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
  expected = 1 / 3 + 2 / 3 * (1 - entropy)
  assert labels.disentanglement(importances) == pytest.approx(expected)
  shares = np.array([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]])
  assert labels.completeness(shares) == pytest.approx(1 - np.log(2) / np.log(4))
  assert labels.disentanglement(np.zeros((3, 2))) == 0
  assert labels.completeness(np.zeros((3, 2))) == 0


def test_sap_is_by_balanced_accuracy_and_the_svms_by_plain():
  # One image in ten has the attribute. The first code shows it in all of
  # them and also in a fifth of the rest, the second one in half of either.
  generator = np.random.default_rng(5)
  total = NUM_TRAIN + NUM_TEST
  factors = (generator.random((total, 1)) < 0.1).astype(int)
  chances = np.where(factors, [1.0, 0.5], [0.2, 0.5])
  codes = jitter(generator.random((total, 2)) < chances)
  train, test = slice(NUM_TRAIN), slice(NUM_TRAIN, None)
  data = Data(codes[train], factors[train], codes[test], factors[test])
  found = means(data)
  assert found['sap'] == pytest.approx(0.9 - 0.5, abs=0.08)
  assert found['sap_svm'] == pytest.approx(0.82 - 0.5, abs=0.08)


def test_probe_of_random_codes_names_the_majority_of_training():
  generator = np.random.default_rng(2)
  chances = np.where(np.arange(NUM_TRAIN + NUM_TEST) < NUM_TRAIN, 0.8, 0.7)
  factors = (generator.random(len(chances)) < chances).astype(int)[:, None]
  data = random_codes((factors[:NUM_TRAIN], factors[NUM_TRAIN:]))
  found = means(data)
  expected = factors[NUM_TRAIN:].mean()
  assert found['majority_accuracy'] == pytest.approx(expected)
  assert found['linear_accuracy'] == pytest.approx(expected, abs=0.01)


def test_errors_of_the_probe_cover_other_test_images():
  generator = np.random.default_rng(0)

  def draw(count):
    factors = (generator.random((count, 2)) < [0.2, 0.5]).astype(int)
    return factors + 0.6 * generator.normal(size=factors.shape), factors

  train = draw(300)
  scores = [labels.score(Data(*train, *draw(400))) for _ in range(20)]
  for name in ('linear_accuracy', 'majority_accuracy'):
    observed = np.std([found[name] for found, _, _ in scores], ddof=1)
    stated = np.mean([errors[name] for _, _, errors in scores])
    assert stated == pytest.approx(observed, rel=0.35)


@pytest.mark.parametrize('constant_part', [0, 1])
def test_factor_of_one_value_is_left_out(constant_part):
  factors = binary_factors(3)
  data = with_codes(lambda f: jitter(f, 0.5), factors)
  factors[constant_part][:, 1] = 1
  found, by_factor, _ = labels.score(data)
  kept = data._replace(
    factors=data.factors[:, [0, 2]], test_factors=data.test_factors[:, [0, 2]]
  )
  expected, _, _ = labels.score(kept)
  for name, values in by_factor.items():
    # The information needs no test images, and so misses nothing in them.
    assert np.isnan(values[1]) == (name != 'mig' or constant_part == 0), name
  del found['mig'], expected['mig']
  assert found == pytest.approx(expected)
