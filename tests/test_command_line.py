import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run_script(body, *arguments):
  """Runs a script whose `main` is this, in a process of its own."""
  script = f'import os, signal, time\nimport command_line\n{body}'
  process = subprocess.run(
    [sys.executable, '-c', script, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=20,
  )
  return process.returncode, process.stdout, process.stderr


LOST_INTERRUPT = """
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
