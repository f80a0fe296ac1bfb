import json

import pytest

from configs import default
from configs import faces
from sweeps import definition as definitions
from vae.errors import UserError

AXES = {'objective.beta': [0.5, 1.0]}


def define(base, axes=AXES):
  return definitions.define(base, axes, {'split': 'validation'}, {})


def test_older_sweep_had_the_default_of_a_newer_key(monkeypatch):
  older = define(faces.get_config())
  table = default.get_config()
  table.objective.gamma = (1, 2)
  copy = table.copy_and_resolve_references
  monkeypatch.setattr(default, 'get_config', copy)
  newer = faces.get_config()
  definitions.check_same(define(newer), older, 'w')
  newer.objective.gamma = (3, 4)
  with pytest.raises(UserError, match=r'gamma was \[1, 2\] and is now \[3'):
    definitions.check_same(define(newer), older, 'w')


def test_another_sweep_is_refused():
  given = define(faces.get_config())
  definitions.check_same(given, json.loads(json.dumps(given)), 'w')
  other = faces.get_config()
  other.seed = 3
  for found, said in (
    (define(other), 'w holds another sweep: config seed was 3 and is now 1265'),
    (define(faces.get_config(), {'seed': [1]}), 'config'),
    (given | {'search': {'num_points': 3}}, 'search num_points was 3'),
  ):
    with pytest.raises(UserError, match=said):
      definitions.check_same(given, found, 'w')
