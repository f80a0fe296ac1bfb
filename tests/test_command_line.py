import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.preloaded import program_lines, run


def run_script(body, *arguments, cwd=ROOT):
  """Runs a script whose `main` is this, in a process of its own."""
  process = subprocess.run(
    [
      sys.executable,
      '-c',
      f'from runs import command_line\n{body}',
      *arguments,
    ],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  return process.returncode, process.stdout, process.stderr


def test_commands_are_checked():
  for words, reason in (
    ((), 'the command is missing; it must be one of sample, reconstruct'),
    (('fly',), 'the command is fly; it must be one of sample, '),
    (('sample', 'fast'), "'fast' is not a flag, which is --name=value."),
    (('sample',), 'name the run with --workdir=FOLDER'),
  ):
    code, out, err = run(*words, script='generate.py')
    assert (code, out) == (2, '') and reason in err and err.count('\n') == 1


PRINT_CACHE = """
import jax
command_line.run(lambda: print(jax.config.jax_compilation_cache_dir))
"""


def test_compiled_programs_are_kept_by_default(tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  _, out, _ = run_script(PRINT_CACHE)
  assert out.startswith(f'{tmp_path}/.cache/vae/jax/')
  # The user's own choice counts, and a home need not be writable.
  monkeypatch.setenv('HOME', '/proc/nowhere')
  assert run_script(PRINT_CACHE)[:2] == (0, 'None\n')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'own'))
  assert run_script(PRINT_CACHE)[1] == f'{tmp_path}/own\n'


EXHAUST = """
import jax
command_line.run(lambda: jax.jit(lambda: jax.numpy.ones(2**50))())
"""


def test_exhausted_memory_gets_one_line():
  code, _, err = run_script(EXHAUST)
  err = program_lines(err)
  assert code == 2 and err.startswith('error: out of memory (RESOURCE_EXHAUST')
  assert 'Lower the batch size' in err and err.count('\n') == 1


PRINT_CONFIG = """
from absl import flags
command_line.define_config('configs/faces.py')

def main():
  model = flags.FLAGS.config.model
  print(command_line.config_path(), model.latent_dim, model.sigma)

command_line.run(main)
"""

WITH_ARGUMENT = """
from configs import default
def get_config(argument='5'):
  config = default.get_config()
  config.model.latent_dim = int(argument.removeprefix('dim:'))
  return config
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """A folder below the home, which has a config."""
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'own.py').write_text(WITH_ARGUMENT)
  (tmp_path / 'elsewhere').mkdir()
  return tmp_path / 'elsewhere'


def test_configs_are_found_from_any_folder_and_take_an_argument(elsewhere):
  home = elsewhere.parent
  for flags, printed in (
    (['--config=configs/faces.py'], f'{ROOT}/configs/faces.py 32 0.35\n'),
    (['--config.model.sigma=2'], f'{ROOT}/configs/faces.py 32 2.0\n'),
    (['--config=~/own.py:3'], f'{home}/own.py 3 1.0\n'),
    (
      ['--config', f'{home}/own.py:dim:17', '--config.model.sigma=2'],
      f'{home}/own.py 17 2.0\n',
    ),
    (['--config=../own.py'], '../own.py 5 1.0\n'),
  ):
    found = run_script(PRINT_CONFIG, *flags, cwd=elsewhere)
    assert found == (0, printed, '')
  # The current folder comes first.
  (elsewhere / 'configs').mkdir()
  (elsewhere / 'configs' / 'faces.py').write_text(WITH_ARGUMENT)
  found = run_script(PRINT_CONFIG, '--config=configs/faces.py', cwd=elsewhere)
  assert found == (0, 'configs/faces.py 5 1.0\n', '')


def test_config_that_is_not_found_gets_one_line(elsewhere):
  code, _, err = run_script(PRINT_CONFIG, '--config=gone.py', cwd=elsewhere)
  assert code == 2 and err.count('\n') == 1
  assert f'in {elsewhere} or {ROOT}' in err and f'{ROOT}/configs has' in err


def test_model_may_be_chosen_with_its_own_keys(tmp_path):
  (tmp_path / 'bare.py').write_text(
    'import ml_collections\nget_config = ml_collections.ConfigDict\n'
  )
  code, out, err = run_script(
    PRINT_CONFIG,
    f'--config={tmp_path}/bare.py',
    '--config.model.name=mlp',
    '--config.model.hidden_sizes=(7,)',
    '--config.model.latent_dim=3',
  )
  assert (code, out) == (0, f'{tmp_path}/bare.py 3 1.0\n'), err


@pytest.mark.parametrize(
  'words',
  [
    ('main.py',),
    ('evaluate.py',),
    ('generate.py', 'sample'),
    ('sweep.py', '--beta=1,2'),
  ],
)
def test_platform_that_is_not_there_gets_one_line(tmp_path, words):
  result = subprocess.run(
    [sys.executable, *words, f'--workdir={tmp_path}/new'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'typo'},
    capture_output=True,
    text=True,
  )
  err = program_lines(result.stderr)
  assert result.returncode == 2 and not result.stdout
  assert err.startswith("error: JAX_PLATFORMS is 'typo'; ")
  assert err.count('\n') == 1
  assert not (tmp_path / 'new').exists()
