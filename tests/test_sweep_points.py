"""Which points a sweep has, and their table."""

import math

import numpy as np
import pytest

from configs import default
from sweeps import points
from sweeps.points import Range
from vae.errors import UserError


@pytest.mark.parametrize(
  ('key', 'text', 'expected'),
  [
    ('objective.beta', '0.25, 1e-3', [0.25, 0.001]),
    ('model.latent_dim', '16', [16]),
    ('model.learn_sigma', 'True,False', [True, False]),
    ('model.likelihood', 'gaussian,bernoulli', ['gaussian', 'bernoulli']),
    ('model.hidden_channels', '(32,64),(8,)', [(32, 64), (8,)]),
    ('objective.beta', '0.1:10', Range(0.1, 10.0)),
    ('optimizer.learning_rate', '1e-4:1e-2:log', Range(1e-4, 1e-2, True)),
    ('model.latent_dim', '4:64:log', Range(4, 64, True)),
  ],
)
def test_values_have_the_type_of_their_setting(key, text, expected):
  found = points.parse(key, text, default.get_config())
  assert found == expected
  if isinstance(found, list):
    assert [type(v) for v in found] == [type(v) for v in expected]


@pytest.mark.parametrize(
  ('key', 'text', 'message'),
  [
    ('objective.beta', '1,,2', "config.objective.beta is ''"),
    ('objective.beta', '1,two', "config.objective.beta is 'two'"),
    ('model.latent_dim', '1.5', 'config.model.latent_dim is 1.5'),
    ('model.hidden_channels', '8', 'it must be a tuple'),
    ('objective.betta', '1', 'config.objective.betta: there is no such key'),
    ('objective.beta', '3:1', 'LOW less than HIGH'),
    ('objective.beta', '0:1:log', 'above 0 with :log'),
    ('objective.beta', '1:2:linear', 'LOW:HIGH:log'),
  ],
)
def test_mistakes_in_values_are_named(key, text, message):
  base = default.get_config()
  with pytest.raises(UserError) as error:
    for values in points.grid({key: points.parse(key, text, base)}):
      points.configure(base, values)
  assert message in str(error.value)


def test_points_have_configs_and_names():
  axes = {'objective.beta': [0.5, 1.0], 'seed': [0, 1, 2]}
  grid = points.grid(axes)
  assert len({points.name(values) for values in grid}) == len(grid) == 6
  base = default.get_config()
  config = points.configure(base, grid[-1])
  assert (config.objective.beta, config.seed) == (1.0, 2)
  assert (base.objective.beta, base.seed) == (1.0, 0)
  values = {'objective.beta': 0.5, 'model.hidden_channels': (8, 16)}
  assert points.name(values) == 'beta=0.5,hidden_channels=(8,16)'
  assert '/' not in points.name({'data.dir': 'gs://a/b'})
  # The last part of a key, unless two share it.
  both = {'train.batch_size': 8, 'eval.batch_size': 16}
  assert points.name(both) == 'train.batch_size=8,eval.batch_size=16'


def test_table_is_in_the_order_of_numbers_and_then_of_texts():
  values = ['b', 10, None, 9, 2.5, (8, 16)]
  rows = [{'point': str(v), 'state': 'waiting', 'x': v} for v in values]
  results = points.Results.of(rows, ['x'], {})
  assert results.frame['x'].tolist() == [2.5, 9, 10, (8, 16), 'b', None]
  assert results.varied == ['x'] and type(results.frame['x'][1]) is int


def test_means_and_deviations_are_over_the_seeds():
  rows = [
    {'point': '', 'objective.beta': beta, 'seed': seed, 'rate': rate}
    for beta, seed, rate in [
      *((1.0, 0, 3.0), (1.0, 1, 5.0), (1.0, 2, math.nan)),
      *((2.0, 0, 7.0), (2.0, 1, math.inf), (4.0, 0, math.nan)),
    ]
  ]
  rows.reverse()
  results = points.Results.of(rows, ['objective.beta', 'seed'], {'rate': ''})
  table = results.over_seeds('rate')
  assert table['objective.beta'].tolist() == [1.0, 2.0]
  assert table.rate.tolist() == [4.0, 7.0]
  np.testing.assert_allclose(table.rate_std, [math.sqrt(2), math.nan])
  assert table.seeds.tolist() == [2, 1]
