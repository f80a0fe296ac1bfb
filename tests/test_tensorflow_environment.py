"""The environment in which TensorFlow is imported, on any processor."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# clu imports TensorFlow.
LIBRARIES = 'tensorflow', 'tensorflow_datasets', 'clu'
NAMES = 'TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS'

# Imports each module in a fork, after JAX, and prints the environment at the
# first import of one of the libraries.
PROBE = f"""
import importlib, json, os, sys
import jax

class Finder:
  def find_spec(self, name, path=None, target=None):
    if name in {LIBRARIES}:
      print(json.dumps([os.environ.get(n) for n in {NAMES}]), flush=True)
      os._exit(0)

sys.meta_path.insert(0, Finder())
for module in sys.argv[1:]:
  if not os.fork():
    importlib.import_module(module)
    os._exit(1)
  assert os.wait()[1] == 0, module
"""


@pytest.mark.parametrize(
  ('given', 'found'),
  [
    ((None, None), ['3', '0']),
    # The user's own choice counts.
    (('2', '1'), ['2', '1']),
  ],
)
def test_tensorflow_is_silent_whichever_module_imports_it(given, found):
  imports = re.compile(rf'^(import|from) ({"|".join(LIBRARIES)})\b', re.M)
  paths = (path.relative_to(ROOT) for path in ROOT.rglob('*.py'))
  modules = [
    '.'.join(path.with_suffix('').parts)
    for path in paths
    if not path.parts[0].startswith(('.', 'tests'))
    and imports.search((ROOT / path).read_text())
  ]
  assert {'input_pipeline', 'runs.metric_writer'} <= set(modules)
  environment = {k: v for k, v in os.environ.items() if k not in NAMES}
  environment |= {n: v for n, v in zip(NAMES, given, strict=True) if v}
  result = subprocess.run(
    [sys.executable, '-c', PROBE, *modules],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  lines = list(map(json.loads, result.stdout.splitlines()))
  assert lines == [found] * len(modules)
