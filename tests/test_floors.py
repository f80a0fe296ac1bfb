"""Imports only go down, from floor to floor; TensorFlow stays at the top.

And the library can be imported from any folder.
"""

import ast
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# From the ground up; those of one floor do not import each other, so that there
# are no circles.
FLOORS = (
  ('configs', 'vae'),
  ('runs',),
  ('data',),
  ('evaluation', 'input_pipeline'),
  ('train',),
  ('sweeps', 'explorer', 'exports'),
  ('main', 'evaluate', 'generate', 'sweep', 'explore', 'export', 'compare'),
)
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}

LIBRARIES_OF_VAE = set(
  'jax flax optax orbax numpy etils ml_collections PIL matplotlib'.split()
)
# The clients of gs:// paths, loaded when there is one.
LIBRARIES_OF_BUCKETS = set('aiohttp fsspec gcsfs google requests'.split())


def product_files():
  command = ['git', 'ls-files', '*.py']
  listed = subprocess.check_output(command, cwd=ROOT, text=True).split()
  files = [pathlib.PurePath(name) for name in listed if (ROOT / name).exists()]
  return [f for f in files if f.parts[0] not in ('tests', 'benchmarks', 'docs')]


def package(path):
  return path.parts[0].removesuffix('.py')


def imports(path):
  """The first names of all modules that a file imports, and their lines."""
  found = []
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      found += [(alias.name, node.lineno) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno} is a relative import'
      found.append((node.module, node.lineno))
  return [(name.split('.')[0], line) for name, line in found]


def violations(is_wrong):
  return [
    f'{path}:{line} imports {name}'
    for path in product_files()
    for name, line in imports(path)
    if is_wrong(path, name)
  ]


def test_imports_only_go_down():
  def goes_up(path, name):
    own = package(path)
    return name in FLOOR and name != own and FLOOR[name] >= FLOOR[own]

  assert violations(goes_up) == []


def test_library_imports_what_a_notebook_has():
  allowed = LIBRARIES_OF_VAE | sys.stdlib_module_names | {'vae'}

  def is_foreign(path, name):
    if path.as_posix() in ('vae/buckets.py', 'vae/paths.py'):
      return name not in allowed | LIBRARIES_OF_BUCKETS
    return package(path) == 'vae' and name not in allowed

  assert violations(is_foreign) == []


def test_tensorflow_is_imported_by_data_and_metrics_alone():
  def is_wrong(path, name):
    if name == 'tensorflow_datasets':
      return package(path) != 'data'
    return name == 'tensorflow' and path.as_posix() != 'runs/tf.py'

  assert violations(is_wrong) == []


def test_a_start_imports_no_tensorflow():
  """It takes seconds; decoded images on disk are read without it."""
  code = 'import main, evaluate, generate, data.tfds, data.celeba, sys; '
  code += "print('tensorflow' in sys.modules)"
  command = [sys.executable, '-c', code]
  assert subprocess.check_output(command, cwd=ROOT) == b'False\n'


def test_runs_is_imported_before_tensorflow():
  """It sets TensorFlow's environment; `data` imports it first."""
  for path in product_files():
    names = [name for name, _ in sorted(imports(path), key=lambda i: i[1])]
    later = {'tensorflow', 'tensorflow_datasets', 'clu'} & set(names)
    if later and package(path) not in ('runs', 'data'):
      assert {'runs', 'data'} & set(names[: min(map(names.index, later))]), path


@pytest.mark.parametrize('given', [('', '0'), ('2', '1')])
def test_tensorflow_is_silent_unless_the_user_chose(given):
  names = 'TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS'
  chosen = dict(zip(names, given, strict=True)) if given[0] else {}
  environment = {k: v for k, v in os.environ.items() if k not in names}
  code = f'import jax, os, runs; print(*[os.environ[n] for n in {names}])'
  found = subprocess.check_output(
    [sys.executable, '-c', code], cwd=ROOT, env=environment | chosen, text=True
  )
  assert found.split() == [given[0] or '3', given[1]]


def test_installed_library_is_found_from_another_folder(tmp_path):
  """By `pip install -e .` of a copy, as pip writes beside the project."""
  project = tmp_path / 'project'
  shutil.copytree(ROOT / 'vae', project / 'vae')
  for name in ('pyproject.toml', 'requirements.txt'):
    shutil.copy(ROOT / name, project)
  options = '--no-deps --no-build-isolation --no-index'.split()
  install = [sys.executable, '-m', 'pip', 'install', *options]
  install += [f'--prefix={tmp_path / "installed"}', '-e', str(project)]
  subprocess.run(install, check=True, capture_output=True)
  (site,) = (tmp_path / 'installed').rglob('site-packages')
  code = f'import site; site.addsitedir({str(site)!r}); import vae; '
  code += 'print(vae.__file__, vae.load.__name__)'
  found = subprocess.check_output(
    [sys.executable, '-c', code], cwd=tmp_path, text=True
  )
  assert found == f'{project}/vae/__init__.py load\n'
