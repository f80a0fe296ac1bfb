import json
import re

import numpy as np
import pytest

from evaluation import output
from evaluation.measure import Measurements, Metric, Null


@pytest.mark.parametrize(
  ('value', 'error', 'shown'),
  [
    (1196.93, 7.14, '1,196.9 ± 7.1'),
    (0.0069913, 0.00014, '0.00699 ± 0.00014'),
    (-11364.4, 153.2, '-11,364 ± 153'),
    # No more digits than float32 has.
    (6.2146073, 4.2e-7, '6.21461'),
    (0.04276, None, '0.04276'),
    (float('nan'), None, '–'),
    (5.0, float('nan'), '5'),
  ],
)
def test_numbers_are_shown_to_their_significant_digits(value, error, shown):
  results = Measurements()
  results.metrics['x'] = Metric(value, 'nats', 'a number', error)
  assert output.as_text(results).split() == ['x', *shown.split(), 'nats']


def test_bounds_are_an_interval_and_nulls_beside_the_value():
  results = Measurements()
  bounds = (0.0, 0.0), (39.44, 0.05)
  results.interval('total_correlation', *bounds, 'of z')
  results.number('mig', 0.047, 'at most 1', 'gap', null=Null.of([0.001, 0.003]))
  text = output.as_text(results)
  assert re.search(r'total_correlation +0 to 39.440 ± 0.050 +nats', text)
  assert re.search(r'mig +0.047 .*null: 0.0020 ± 0.0014', text)
  found = json.loads(output.as_json({}, results))['metrics']
  assert found['total_correlation_lower_bound']['value'] == 0
  assert found['total_correlation_upper_bound']['standard_error'] == 0.05
  assert found['mig']['null'] == pytest.approx(
    {'value': 0.002, 'deviation': np.sqrt(2) / 1000}
  )


def test_json_has_no_nan():
  results = Measurements(labels={'Hat': {'mig': np.nan}})
  results.metrics['sap'] = Metric(float('nan'), 'at most 1', 'a score')
  results.metrics['psnr'] = Metric(float('inf'), 'dB', 'of equal images')

  def refuse(constant):
    raise AssertionError(constant)

  text = output.as_json({'step': 3}, results)
  found = json.loads(text, parse_constant=refuse)
  assert found['step'] == 3 and found['labels'] == {'Hat': {'mig': None}}
  assert found['metrics']['sap'] == {
    'value': None,
    'unit': 'at most 1',
    'about': 'a score',
  }
