"""Which points a sweep has, and the errors of mistakes."""

import pytest

from configs import default
from configs import faces_sweep
from sweeps import points
from sweeps.points import Range
from vae.errors import UserError


@pytest.mark.parametrize(
  ('key', 'text', 'expected'),
  [
    ('objective.beta', '0.25, 1,4', [0.25, 1.0, 4.0]),
    ('model.latent_dim', '16', [16]),
    ('model.learn_sigma', 'True,false', [True, False]),
    ('model.likelihood', 'gaussian,bernoulli', ['gaussian', 'bernoulli']),
    ('model.hidden_channels', '(32,64),(8,)', [(32, 64), (8,)]),
    ('objective.beta', '0.1:10', Range(0.1, 10.0)),
    ('optimizer.learning_rate', '1e-4:1e-2:log', Range(1e-4, 1e-2, True)),
    ('model.latent_dim', '4:64:log', Range(4, 64, True)),
  ],
)
def test_values_have_the_type_of_their_setting(key, text, expected):
  found = points.parse(key, text, '--flag')
  assert found == expected
  if isinstance(found, list):
    assert [type(v) for v in found] == [type(v) for v in expected]


@pytest.mark.parametrize(
  ('key', 'text', 'said'),
  [
    ('objective.beta', '', '--flag=: an empty value'),
    ('objective.beta', '1,,2', '--flag=1,,2: an empty value'),
    ('objective.beta', '1,two', "'two' is not what"),
    ('model.latent_dim', '1.5', "'1.5' is not what"),
    ('model.learn_sigma', 'maybe', "'maybe' is not what"),
    ('objective.betta', '1', '--flag: there is no such key'),
    ('objective.beta', '3:1', 'LOW must be less'),
    ('objective.beta', '0:1:log', 'above 0 with :log'),
    ('objective.beta', '1:2:linear', 'only :log can follow'),
  ],
)
def test_malformed_values_are_named(key, text, said):
  with pytest.raises(UserError) as error:
    points.parse(key, text, '--flag')
  assert said in str(error.value)


def test_grid_has_every_combination_once():
  grid = points.grid({'objective.beta': [1.0, 2.0], 'seed': [0, 1, 2]})
  assert len(grid) == 6
  assert len({tuple(values.items()) for values in grid}) == 6
  assert len({points.name(values) for values in grid}) == 6


def test_duplicate_value_is_named():
  # 1 and 1.0 are one β.
  axes = {'objective.beta': points.parse('objective.beta', '1,2,1.0', '--beta')}
  with pytest.raises(UserError, match=r'objective.beta has the value 1 twice'):
    points.grid(axes)


def test_names_are_folders():
  values = {'objective.beta': 0.5, 'model.hidden_channels': (8, 16)}
  assert points.name(values) == 'beta=0.5,hidden_channels=(8,16)'
  assert '/' not in points.name({'data.dir': 'gs://a/b'})
  # The last part of a key, unless two share it.
  both = {'train.batch_size': 8, 'eval.batch_size': 16}
  assert points.name(both) == 'train.batch_size=8,eval.batch_size=16'


def test_points_are_validated_as_configs():
  base = default.get_config()
  config = points.configure(base, {'objective.beta': 3.0, 'seed': 5})
  assert (config.objective.beta, config.seed, base.seed) == (3.0, 5, 0)
  with pytest.raises(UserError, match='config.objective.beta is -1'):
    points.configure(base, {'objective.beta': -1.0})
  with pytest.raises(UserError, match='must be a multiple of 32'):
    points.configure(base, {'data.image_size': 24})


def test_shipped_sweep_has_the_seeds_that_a_comparison_needs():
  settings = faces_sweep.sweep()
  assert len(set(settings['seed'])) >= 3
  assert len(settings['objective.beta']) > 1
