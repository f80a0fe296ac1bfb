"""Properties of the training step as compiled for a GPU; nothing is run."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu_compile
from tests.conftest import ROOT

no_compiler = pytest.mark.skipif(
  not gpu_compile.has_compiler(), reason='no compiler (make gpu-compiler)'
)


@pytest.mark.slow
@no_compiler
def test_convolutions_have_small_windows(tmp_path):
  # One as large as the image is the gradient of a kernel that cuDNN has no
  # function for.
  output = tmp_path / 'results.json'
  subprocess.run(
    [
      *(sys.executable, 'benchmarks/gpu_compile.py'),
      *('--quick', f'--output={output}'),
    ],
    cwd=ROOT,
    check=True,
    capture_output=True,
    timeout=600,
  )
  (row,) = json.loads(output.read_text())['rows']
  # Two encoder layers and two of the decoder, and its last.
  assert len(row['convolutions']) >= 3 * 5 - 1
  for convolution in row['convolutions']:
    assert max(convolution[2]) <= 3, convolution
    assert convolution[0] != 'none', convolution
