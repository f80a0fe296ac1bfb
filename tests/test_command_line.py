import os
import subprocess
import sys

import pytest

from tests import preloaded
from tests.conftest import ROOT
from tests.preloaded import program_lines

PRINT_CONFIG = """
from absl import flags
from runs import command_line
command_line.define_config('configs/faces.py')

def main():
  model = flags.FLAGS.config.model
  print(command_line.config_path(), model.latent_dim, model.sigma)

command_line.run(main)
"""

COMPILE = """
import jax
from runs import command_line
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)

def main():
  print(jax.jit(lambda: jax.numpy.ones(3).sum())())
  print(jax.config.jax_compilation_cache_dir)

command_line.run(main)
"""

EXHAUST = """
import jax
from runs import command_line
command_line.run(lambda: jax.jit(lambda: jax.numpy.ones(2**50))())
"""


@pytest.fixture
def run(tmp_path):
  """Runs a script of this content, from a folder."""

  def run_script(body, *flags, cwd=ROOT):
    path = tmp_path / 'script.py'
    path.write_text(f'import os\nos.chdir({str(cwd)!r})\n{body}')
    return preloaded.run(*flags, script=str(path))

  return run_script


def test_commands_are_checked():
  for words, reason in (
    ((), 'the command is missing; it must be one of sample, reconstruct'),
    (('sample', 'fast'), "'fast' is not a flag, which is --name=value."),
    (('sample',), 'name the run with --workdir=FOLDER'),
  ):
    code, out, err = preloaded.run(*words, script='generate.py')
    assert (code, out) == (2, '') and reason in err and err.count('\n') == 1


def test_compiled_programs_are_kept_by_default_if_they_can_be(monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setenv('HOME', '/proc/nowhere')
  found = subprocess.run(
    [sys.executable, '-c', COMPILE], cwd=ROOT, capture_output=True, text=True
  )
  assert found.stdout == '3.0\n/proc/nowhere/.cache/vae/jax\n', found.stderr
  assert program_lines(found.stderr) == ''


def test_exhausted_memory_gets_one_line(run):
  code, _, err = run(EXHAUST)
  assert code == 2 and err.startswith('error: out of memory (RESOURCE_EXHAUST')
  assert 'Lower the batch size' in err and err.count('\n') == 1


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


def test_configs_are_found_from_any_folder_and_take_an_argument(run, elsewhere):
  home = elsewhere.parent
  for flags, printed in (
    (['--config.model.sigma=2'], f'{ROOT}/configs/faces.py 32 2.0\n'),
    (['--config=~/own.py:3'], f'{home}/own.py 3 1.0\n'),
    (
      ['--config', f'{home}/own.py:dim:17', '--config.model.sigma=2'],
      f'{home}/own.py 17 2.0\n',
    ),
    (['--config=../own.py'], '../own.py 5 1.0\n'),
  ):
    found = run(PRINT_CONFIG, *flags, cwd=elsewhere)
    assert found == (0, printed, '')
  # The current folder comes first.
  (elsewhere / 'configs').mkdir()
  (elsewhere / 'configs' / 'faces.py').write_text(WITH_ARGUMENT)
  found = run(PRINT_CONFIG, '--config=configs/faces.py', cwd=elsewhere)
  assert found == (0, 'configs/faces.py 5 1.0\n', '')


def test_model_may_be_chosen_with_its_own_keys(run, tmp_path):
  (tmp_path / 'bare.py').write_text(
    'import ml_collections\nget_config = ml_collections.ConfigDict\n'
  )
  code, out, err = run(
    PRINT_CONFIG,
    f'--config={tmp_path}/bare.py',
    '--config.model.name=mlp',
    '--config.model.hidden_sizes=(7,)',
    '--config.model.latent_dim=3',
  )
  assert (code, out) == (0, f'{tmp_path}/bare.py 3 1.0\n'), err


@pytest.mark.parametrize(
  'words', [('main.py',), ('evaluate.py',), ('sweep.py', '--beta=1,2')]
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
  assert err.startswith('error: JAX finds no device for JAX_PLATFORMS=typo ')
  assert err.count('\n') == 1
  assert not (tmp_path / 'new').exists()


def check_refused(tmp_path, reason, *flags):
  code, out, err = preloaded.run(*flags, f'--workdir={tmp_path}/w')
  assert (code, out) == (2, ''), err
  assert err.startswith('error: ') and err.count('\n') == 1 and reason in err
  assert len(err) < 2100 and not (tmp_path / 'w').exists()


CONFIG = 'from configs import default\ndef get_config():\n  config = default.'
CONFIG += 'get_config()\n'


@pytest.mark.parametrize(
  ('program', 'reason'),
  [
    ('', "KeyError: 'get_config'"),
    ('x = = 1\n', 'config.py, line 1: SyntaxError'),
    ('import sys\nsys.exit(0)\n', 'line 2: SystemExit: 0'),
    ('def get_config():\n  return {"seed": 3}\n', "the config is {'seed': 3}"),
    (CONFIG + '  raise OSError("a\\nb")\n', 'line 4: OSError: a b'),
    (CONFIG + '  config.bata = 4\n  return config\n', 'config.bata: there is'),
  ],
)
def test_file_that_is_no_config_gets_one_line(tmp_path, program, reason):
  path = tmp_path / 'config.py'
  path.write_text(program)
  check_refused(tmp_path, reason, f'--config={path}')


@pytest.mark.parametrize(
  ('flags', 'reason'),
  [
    (['--config.model={}'], '--config.model: there is no such key'),
    (['--config.model.__class__=1'], 'there is no such key'),
    (['--config.model.hidden_channels[0]=1'], 'did you mean model.hidden_ch'),
    (['--config.seed=' + '9' * 5000], 'config.seed'),
    (['--config.model.latent_dim=1000000000'], ' GB free'),
    (
      ['--config=a\nb.py'],
      f'a b.py: there is no such file here or in {ROOT}',
    ),
    (['--config.seed=3', '--config=configs/faces.py'], 'before a value for'),
  ],
)
def test_flags_that_are_no_settings_get_one_line(tmp_path, flags, reason):
  check_refused(tmp_path, reason, *flags)


def test_scripts_find_a_run_at_home(trained_run, monkeypatch):
  monkeypatch.setenv('HOME', str(trained_run.parent))
  run = f'~/{trained_run.name}'
  for script, words, message in (
    ('main.py', (), ' holds another run: '),
    ('sweep.py', ('--beta=1,2',), ' holds a run; name another --workdir'),
    ('evaluate.py', (f'--output={run}/config.json',), '/config.json cannot be'),
  ):
    code, _, err = preloaded.run(*words, f'--workdir={run}', script=script)
    assert code == 2 and f'{trained_run}{message}' in err, err
