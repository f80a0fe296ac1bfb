import os
import subprocess
import sys

import jax
import pytest

from tests.conftest import ROOT
from tests.preloaded import program_lines


def run_script(body, *arguments, cwd=ROOT):
  """Runs a script whose `main` is this, in a process of its own."""
  script = f'import os, signal, time\nfrom runs import command_line\n{body}'
  process = subprocess.run(
    [sys.executable, '-c', script, *arguments],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  return process.returncode, process.stdout, process.stderr


LOST_INTERRUPT = """
# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupted:
  def __del__(self):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

def main():
  Interrupted()
  print('on', flush=True)
  time.sleep(30)

command_line.run(main)
"""


def test_an_interrupt_that_falls_into_a_destructor_counts():
  code, out, err = run_script(LOST_INTERRUPT)
  assert (code, out) == (130, 'on\n')
  assert err == '\ninterrupted.\n'


WITH_COMMANDS = """
command_line.run(lambda command: print('does', command), ('walk', 'run'))
"""


def test_commands_are_checked():
  assert run_script(WITH_COMMANDS, 'walk') == (0, 'does walk\n', '')
  for words, said in (
    ((), 'error: say what to do: one of walk, run (--help lists the flags).\n'),
    (('fly',), "error: 'fly' is none of walk, run.\n"),
    (
      ('run', 'fast'),
      "error: 'fast' is not a flag; flags look like --name=value.\n",
    ),
  ):
    assert run_script(WITH_COMMANDS, *words) == (2, '', said)


PRINT_CACHE = """
import jax

def main():
  print(jax.config.jax_compilation_cache_dir)

command_line.run(main)
"""


def test_compiled_programs_are_kept_by_default(tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  _, out, _ = run_script(PRINT_CACHE)
  assert out.startswith(f'{tmp_path}/.cache/vae/jax/')
  # One's own choice, and a home that cannot be written, are respected.
  monkeypatch.setenv('HOME', '/proc/nowhere')
  assert run_script(PRINT_CACHE)[:2] == (0, 'None\n')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'own'))
  assert run_script(PRINT_CACHE)[1] == f'{tmp_path}/own\n'


PRINT_CONFIG = """
from absl import flags
command_line.define_config('configs/faces.py')

def main():
  path = command_line.config_path()
  model = flags.FLAGS.config.model
  print(path, model.latent_dim, model.sigma)

command_line.run(main)
"""

WITH_ARGUMENT = """
from configs import default
def get_config(argument='5'):
  config = default.get_config()
  config.model.latent_dim = int(argument.removeprefix('dim:'))
  return config
"""


def test_config_takes_an_argument(tmp_path):
  file = tmp_path / 'own.py'
  file.write_text(WITH_ARGUMENT)
  sigma = '--config.model.sigma=2'
  for flags, dim in (
    ((f'--config={file}:17', sigma), 17),
    ((f'--config={file}:dim:17', sigma), 17),
    (('--config', f'{file}:17', sigma), 17),
    ((f'--config={file}', sigma), 5),
  ):
    printed = f'{file} {dim} 2.0\n'
    assert run_script(PRINT_CONFIG, *flags) == (0, printed, '')
  code, _, err = run_script(PRINT_CONFIG, '--config=configs/faces.py:17')
  assert code == 2 and err.count('\n') == 1 and '1 was given' in err


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'own.py').write_text(WITH_ARGUMENT)
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  for flags, printed in (
    (['--config=configs/faces.py'], f'{ROOT}/configs/faces.py 32 0.35\n'),
    ([], f'{ROOT}/configs/faces.py 32 0.35\n'),
    (['--config=~/own.py:3'], f'{tmp_path}/own.py 3 1.0\n'),
    (['--config=../own.py'], '../own.py 5 1.0\n'),
  ):
    found = run_script(PRINT_CONFIG, *flags, cwd=elsewhere)
    assert found == (0, printed, '')
  # One that lies here is meant.
  (elsewhere / 'configs').mkdir()
  (elsewhere / 'configs' / 'faces.py').write_text(WITH_ARGUMENT)
  found = run_script(PRINT_CONFIG, '--config=configs/faces.py', cwd=elsewhere)
  assert found == (0, 'configs/faces.py 5 1.0\n', '')
  code, _, err = run_script(PRINT_CONFIG, '--config=gone.py', cwd=elsewhere)
  assert code == 2 and err.count('\n') == 1
  assert f'in {elsewhere} or {ROOT}' in err and f'{ROOT}/configs has' in err


# No machine has the first, and only those with an accelerator the others.
PLATFORMS = ('typo', 'cuda', 'gpu', 'tpu')


@pytest.mark.parametrize(
  ('script', 'words', 'platforms'),
  [
    ('main.py', (), PLATFORMS),
    ('evaluate.py', (), PLATFORMS[:2]),
    ('generate.py', ('sample',), PLATFORMS[:2]),
    ('sweep.py', ('--beta=1,2',), PLATFORMS[:2]),
  ],
)
def test_platform_that_is_not_there_gets_one_line(
  trained_run, tmp_path, script, words, platforms
):
  uses = script in ('evaluate.py', 'generate.py')
  workdir = trained_run if uses else tmp_path / 'new'
  for platform in platforms:
    if platform != 'typo' and jax.default_backend() != 'cpu':
      continue
    result = subprocess.run(
      [sys.executable, script, *words, f'--workdir={workdir}'],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': platform},
      capture_output=True,
      text=True,
    )
    err = program_lines(result.stderr)
    assert result.returncode == 2 and not result.stdout
    assert err.startswith(f"error: JAX_PLATFORMS is '{platform}'; ")
    assert err.count('\n') == 1
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-'])
def test_mistake_is_one_where_nobody_can_be_told(closed):
  result = subprocess.run(
    f'exec {sys.executable} main.py --process_id=1 {closed}',
    shell=True,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  told = '2>' not in closed
  assert ('--process_id go with' in result.stderr) is told
  assert result.stderr.count('\n') == told and not result.stdout
