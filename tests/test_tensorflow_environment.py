"""The environment that TensorFlow is imported in, on any processor."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# clu imports TensorFlow.
LIBRARIES = 'tensorflow', 'tensorflow_datasets', 'clu'

# Prints the environment at the first import of one of the libraries; for each
# module in a fork, which has JAX's part of the environment.
PROBE = f"""
import importlib, json, os, sys
import jax

class Finder:
  def find_spec(self, name, path=None, target=None):
    if name in {LIBRARIES}:
      print(json.dumps(dict(os.environ)), flush=True)
      os._exit(0)

sys.meta_path.insert(0, Finder())
for module in sys.argv[1:]:
  if not os.fork():
    importlib.import_module(module)
    os._exit(1)
  assert os.wait()[1] == 0, module
"""


def importers():
  """The project's modules that import one of the libraries."""
  imports = re.compile(rf'^(import|from) ({"|".join(LIBRARIES)})\b', re.M)
  paths = (path.relative_to(ROOT) for path in ROOT.rglob('*.py'))
  return [
    '.'.join(path.with_suffix('').parts)
    for path in paths
    if not path.parts[0].startswith(('.', 'tests'))
    and imports.search((ROOT / path).read_text())
  ]


def environments(**given):
  names = ('TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS')
  bare = {k: v for k, v in os.environ.items() if k not in names}
  modules = importers()
  result = subprocess.run(
    [sys.executable, '-c', PROBE, *modules],
    cwd=ROOT,
    env=bare | given,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  found = map(json.loads, result.stdout.splitlines())
  found = [tuple(e.get(name) for name in names) for e in found]
  return dict(zip(modules, found, strict=True))


def test_tensorflow_is_silent_wherever_it_is_first_imported():
  found = environments()
  assert {
    'input_pipeline',
    'runs.metric_writer',
    'data.tfds',
  } <= found.keys()
  assert set(found.values()) == {('3', '0')}, found


@pytest.mark.parametrize('level', ['0', '2'])
def test_the_users_own_environment_stays(level):
  found = environments(TF_CPP_MIN_LOG_LEVEL=level, TF_ENABLE_ONEDNN_OPTS='1')
  assert set(found.values()) == {(level, '1')}, found
