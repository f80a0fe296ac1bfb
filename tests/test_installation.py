"""The installation."""

import shutil
import subprocess
import sys

from tests.conftest import ROOT

IMPORT = """
import site, sys
site.addsitedir(sys.argv[1])
import vae
print(vae.__file__, vae.load.__name__)
"""


def output_of(*command, **kwargs):
  return subprocess.run(
    command, check=True, capture_output=True, text=True, **kwargs
  ).stdout


def test_installed_library_is_found_from_another_folder(tmp_path):
  """By `pip install -e .` of a copy, as pip writes beside the project."""
  project = tmp_path / 'project'
  shutil.copytree(ROOT / 'vae', project / 'vae')
  for name in ('pyproject.toml', 'requirements.txt', 'main.py', 'train.py'):
    shutil.copy(ROOT / name, project)
  output_of(
    *(sys.executable, '-m', 'pip', 'install', '--no-deps'),
    *('--no-build-isolation', '--no-index', '--disable-pip-version-check'),
    *(f'--prefix={tmp_path / "installed"}', '-e', str(project)),
  )
  (site,) = (tmp_path / 'installed').rglob('site-packages')
  (tmp_path / 'elsewhere').mkdir()
  found = output_of(
    *(sys.executable, '-c', IMPORT, str(site)), cwd=tmp_path / 'elsewhere'
  )
  assert found == f'{project}/vae/__init__.py load\n'
