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
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    # Half of the time to compile goes into the optimisation of LLVM.
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8 '
    '--xla_backend_optimization_level=0',
  }
  command = [sys.executable, ROOT / 'tests/devices_run.py']
  return json.loads(subprocess.check_output(command, env=environment))


def test_number_of_devices_does_not_matter_in_float64(found):
  one, *others = found['counts']
  assert len(one['loss']) == 10 and len(others) == 2
  for other in others:
    for name in one:
      np.testing.assert_allclose(other[name], one[name], rtol=1e-9)


@pytest.mark.parametrize('case', ['several seeds', 'one seed'])
def test_members_on_devices_of_their_own_are_runs_on_all_devices(found, case):
  assert found[case]['difference'] < 1e-9
  # Members differ from each other, or that would prove nothing.
  assert found[case]['spread'] > 0.1
  assert found[case]['collectives'] == []
  assert 'are of different steps: 0, 1.' in found[case]['error']
