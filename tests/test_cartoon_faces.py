"""Cartoon faces show their factors, which are independent."""

import numpy as np
import pytest

from data import cartoon_faces
from data.cartoon_faces import FACTORS


def test_factors_are_uniform_and_independent():
  factors = cartoon_faces.sample_factors('train', 4000)
  for column, values in zip(factors.T, FACTORS.values(), strict=True):
    shares = np.bincount(column, minlength=len(values)) / len(column)
    np.testing.assert_allclose(shares, 1 / len(values), rtol=0.25)
  correlations = np.corrcoef(factors.T) - np.eye(len(FACTORS))
  # Four standard errors.
  assert np.abs(correlations).max() < 4 / 4000**0.5


def test_splits_are_fixed_and_differ():
  train = cartoon_faces.sample_factors('train', 500)
  np.testing.assert_array_equal(
    train[:100], cartoon_faces.sample_factors('train', 100)
  )
  test = cartoon_faces.sample_factors('test', 500)
  shared = set(map(tuple, train)) & set(map(tuple, test))
  assert not shared


@pytest.mark.parametrize('name', list(FACTORS))
def test_every_factor_shows(name):
  """Each value gives another picture, within the part that is cut out."""
  # A face that has hair, so that its colour shows.
  labels = {factor: len(v) // 2 for factor, v in FACTORS.items()}
  pictures = []
  for value in range(len(FACTORS[name])):
    picture = np.asarray(cartoon_faces.render(labels | {name: value}))
    assert picture.shape == (218, 178, 3)
    pictures.append(picture[35:183, 15:163].astype(int))
  for i, a in enumerate(pictures):
    for b in pictures[i + 1 :]:
      # Hundreds of grey levels: more than a pixel's edge.
      assert np.abs(a - b).sum() > 500
