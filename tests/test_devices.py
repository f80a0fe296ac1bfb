"""The number of devices changes nothing but rounding."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT


@pytest.fixture(scope='module')
def found():
  """The numbers of `devices_run.py`, on eight virtual devices."""
  process = subprocess.run(
    [sys.executable, ROOT / 'tests/devices_run.py'],
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(ROOT),
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    },
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


@pytest.mark.parametrize(
  ('case', 'num_steps'), [('float64 elbo', 20), ('float64 free_bits', 10)]
)
def test_number_of_devices_does_not_matter_in_float64(found, case, num_steps):
  one, *others = found[case]
  assert len(one['loss']) == num_steps
  for other in others:
    for name in one:
      np.testing.assert_allclose(other[name], one[name], rtol=1e-9)


def test_number_of_devices_does_not_matter_in_the_first_float32_step(found):
  one, *others = found['float32 elbo']
  for other in others:
    for name in ('loss', 'grad_norm', 'val'):
      np.testing.assert_allclose(other[name], one[name], rtol=1e-5)


@pytest.mark.parametrize('case', ['several seeds', 'one seed'])
def test_members_on_devices_of_their_own_are_runs_on_all_devices(found, case):
  # Members differ from each other, or the rest would prove nothing.
  assert found[case]['spread'] > 0.1
  for name in ('validation', 'losses', 'params'):
    assert found[case][name] < 1e-9, name
  assert found[case]['collectives'] == []
  # Their checkpoints must be of one step.
  assert 'are of different steps: 0, 1, 2' in found[case]['error']
