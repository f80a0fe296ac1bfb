import numpy as np
import pytest

from evaluation import posterior
from evaluation.measure import Measurements


def test_a_dimension_is_active_if_its_mean_moves():
  generator = np.random.default_rng(0)
  mean = generator.normal(size=(20_000, 4)) * np.sqrt([0, 0.005, 0.02, 1])
  # A constant mean is not zero, and still carries nothing of the image.
  mean[:, 0] = 3
  results = Measurements(len(mean))
  posterior.add_dimensions(results, {'mean': mean}, draws_z=False)
  assert results.metrics['active_units'].value == 2
  np.testing.assert_allclose(
    results.dimensions['mean_variance'],
    [0, 0.005, 0.02, 1],
    rtol=0.05,
    atol=1e-12,
  )


def test_most_informative_dimensions_come_first():
  kl = np.array([0.1, 3.0, 0.0, 2.0])
  assert posterior.most_informative(kl).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
  ('kl', 'share', 'expected'),
  [
    # 126 dimensions of a nat in all beside two that carry nine.
    ([1 / 126] * 126 + [5, 4], 0.9, 2),
    ([1.0, 0.1, 2.0], 0.9, 2),
    ([1.0] * 10, 0.9, 9),
    ([1.0] * 10, 1.0, 10),
    ([0.0, 0.0], 0.9, 0),
  ],
)
def test_dimensions_that_carry_a_share_of_the_rate(kl, share, expected):
  assert posterior.dimensions_that_carry(np.array(kl), share) == expected


@pytest.mark.parametrize(
  ('kl', 'active', 'words'),
  [
    (
      [1.0, 0.1, 2.0],
      [1, 1, 1],
      'Not collapsed: all 3 dimensions are active, 3.10 nats; 2 of them carry '
      '90 %.',
    ),
    ([0.001, 0.0], [0, 0], 'Collapsed: none of the 2 dimensions'),
    (
      [2.0, 0.01, 0.02, 0.0, 1.0, 0.0],
      [1, 0, 0, 0, 1, 0],
      'Partly collapsed: 2 of 6 dimensions are active and carry 3.00 of 3.03 '
      'nats, 2 of them carry 90 %; not active: 1–3, 5 (0.03 nats together).',
    ),
  ],
)
def test_verdict_names_what_collapsed(kl, active, words):
  text = posterior.verdict(np.array(kl), np.array(active, bool))
  assert text.startswith(words)
