"""The commands of the documentation, run as they stand there, by a shell.

Blocks of a page run from top to bottom, in a folder of their own. A command
`python` there trains on few images, small networks and an epoch, a sweep has
two values of each setting, and a loop over seeds has one. A block that begins
with `# Needs` is left out.
"""

import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import socketserver
import subprocess
import sys
import threading
import urllib.request

import pytest

from tests import preloaded
from tests.conftest import ROOT
from tests.test_docs import BLOCK
from tests.test_folder import write_images

# In an order in which each finds the runs of those before.
PAGES = (
  *('README.md', 'docs/article.md', 'docs/training.md', 'docs/data.md'),
  *('docs/family.md', 'docs/evaluation.md', 'docs/sweeps.md'),
  *('docs/explore.md', 'docs/export.md', 'docs/extending.md'),
  *('docs/published.md', 'docs/cloud.md', 'CONTRIBUTING.md'),
  *('benchmarks/README.md', 'tests/README.md'),
)
SMALL = (
  *('data.source=celeba', 'data.dir=celeba', 'data.decoded_dir=', 'data.name='),
  *('data.train=', 'data.validation=', 'data.test=', 'data.image_size=16'),
  *('train.batch_size=8', 'train.log_every_steps=5', 'eval.every_epochs=1'),
)
SMALL_MODELS = {
  'conv': 'model.hidden_channels=(4,8)',
  'mlp': 'model.hidden_sizes=(8,)',
}
# Each is a program that asks `Python` to do what it stands for.
STAND_IN = f"""#!{sys.executable} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
  connection.connect(os.environ['STAND_IN'])
  message = [sys.argv, os.getcwd(), dict(os.environ)]
  connection.sendall(json.dumps(message).encode() + b'\\n')
  code, text = json.loads(connection.makefile().readline())
print(text, end='')
sys.exit(code)
"""


def smaller(script, flags, folder):
  """The flags of a command, with those that make it short."""
  added = []
  for index, flag in enumerate(flags):
    if flag.startswith('--config='):
      path, *argument = flag.partition('=')[2].split(':')
      path = pathlib.Path(folder, path)
      config = runpy.run_path(path)['get_config'](*argument)
      added = [*SMALL, SMALL_MODELS.get(config.model.name, 'seed=7')]
      if config.model.get('num_classes'):
        added += ['data.label=Smiling', 'model.num_classes=2']
      # Tuples that are given twice are joined.
      given = [name.partition('=')[0] for name in flags]
      added = [f'--config.{setting}' for setting in added]
      added = [a for a in added if a.partition('=')[0] not in given]
      added = [flag, *added]
      flags = [*flags[:index], *flags[index + 1 :]]
      break
  if script == 'sweep.py':
    added += ['--beta=0.5,1', '--latent_dim=3']
    # Two values of each.
    flags = [re.sub(r'^(--\w+=[^,]+,[^,]+),.*', r'\1', flag) for flag in flags]
    flags = [re.sub('num_points=.*', 'num_points=2', flag) for flag in flags]
  if script in ('main.py', 'sweep.py'):
    flags = [*flags, '--config.train.num_epochs=1']
  # Numbers that are there for the result alone.
  flags = [re.sub(r'(samples)=\d{3,}', r'\1=7', flag) for flag in flags]
  return [*added, *flags]


def python(arguments, folder, environment):
  """What a command `python` does here: exit status and output."""
  if arguments[:2] == ['-m', 'venv']:
    programs = pathlib.Path(folder, arguments[2], 'bin')
    programs.mkdir(parents=True)
    (programs / 'activate').touch()
    return 0, ''
  if arguments[0].startswith('benchmarks/'):  # In test_benchmarks.py.
    assert (ROOT / arguments[0]).exists()
    return 0, ''
  if arguments[:2] == ['-m', 'http.server']:
    return serve([*arguments, '0'], folder, environment, r'\((http://\S+)\)')
  if arguments[0] == 'explore.py':
    script, *flags = arguments
    flags = [str(ROOT / script), *flags, '--port=0']
    return serve(flags, folder, environment, r'Open (http://\S+)')
  if arguments[0] == '-c' or 'PYTHONPATH' in environment:
    if arguments[0].endswith('.py'):
      script, *flags = arguments
      arguments = [str(ROOT / script), *smaller(script, flags, folder)]
    done = subprocess.run(
      [sys.executable, *arguments],
      cwd=folder,
      env=environment,
      capture_output=True,
      text=True,
    )
    return done.returncode, done.stdout + done.stderr
  script, *flags = arguments
  ours = {k: v for k, v in environment.items() if k.startswith(('WAN', 'MLF'))}
  code, out, err = preloaded.run(
    *smaller(script, flags, folder), script=script, folder=folder, **ours
  )
  return code, out + err


def serve(command, folder, environment, pattern):
  """Starts a server, opens its page and stops it."""
  with subprocess.Popen(
    [sys.executable, '-u', *command],
    cwd=folder,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    text = ''
    for line in process.stdout:
      text += line
      if address := re.search(pattern, line):
        with urllib.request.urlopen(
          address[1].replace('0.0.0.0', '127.0.0.1')
        ) as page:
          assert b'<html' in page.read()
        process.terminate()
        return 0, text
  return 1, text


def install(arguments, folder, environment):
  """Checks that what a command would install is known."""
  for name in filter(lambda a: not a.startswith('-'), arguments[1:]):
    is_file = arguments[arguments.index(name) - 1] == '-r'
    assert not is_file or (ROOT / name).is_file(), name
  return 0, ''


def nothing(arguments, folder, environment):
  """Of make, whose targets test_docs.py knows."""
  return 0, ''


PROGRAMS = {
  'python': python,
  'pip': install,
  'npm': nothing,
  'make': nothing,
}


class Handler(socketserver.StreamRequestHandler):
  """Answers a stand-in."""

  def handle(self):
    argv, folder, environment = json.loads(self.rfile.readline())
    name = pathlib.Path(argv[0]).name
    try:
      answer = PROGRAMS[name](argv[1:], folder, environment)
    except Exception as error:
      answer = 1, f'{type(error).__name__}: {error}\n'
    self.wfile.write(json.dumps(answer).encode() + b'\n')


@pytest.fixture
def shell(celeba_dir, request, tmp_path, monkeypatch):
  """Runs a block in a folder with the data that the pages speak of."""
  folder, programs = tmp_path / 'work', tmp_path / 'programs'
  folder.mkdir()
  programs.mkdir()
  for path in ROOT.iterdir():
    if not path.name.startswith('.') and path.name != 'logs':
      (folder / path.name).symlink_to(path)
  (folder / 'celeba').symlink_to(celeba_dir)
  names = [f'{kind}/{i}.png' for kind in ('a', 'b') for i in range(20)]
  write_images(folder / 'FOLDER', [*names, 'a/last.png'])
  images = sorted((celeba_dir / 'img_align_celeba').iterdir())
  for name, path in zip(('a.jpg', 'b.jpg'), images, strict=False):
    (folder / name).symlink_to(path)
  runtime = folder / 'node_modules' / 'onnxruntime-web'
  runtime.mkdir(parents=True)
  if shutil.which('npm'):
    (runtime / 'dist').symlink_to(request.getfixturevalue('onnxruntime_web'))
  (folder / 'mine').mkdir()
  for name, code in BLOCK.findall((ROOT / 'docs/extending.md').read_text()):
    (folder / 'mine' / name).write_text(code)
  for name in PROGRAMS:
    (programs / name).write_text(STAND_IN)
    (programs / name).chmod(0o755)
  # To optimise the programs takes longer than to run them.
  level = '--xla_backend_optimization_level=0'
  monkeypatch.setenv('XLA_FLAGS', level)
  address = tmp_path / 'socket'
  environment = {
    'PATH': f'{programs}:{os.environ["PATH"]}',
    'STAND_IN': str(address),
    'JAX_PLATFORMS': 'cpu',
  }

  def run(block):
    return subprocess.run(
      ['bash', '-eu', '-c', block],
      cwd=folder,
      env=os.environ | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  with socketserver.ThreadingUnixStreamServer(str(address), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield run
    server.shutdown()


def blocks_of(page):
  return re.findall(r'```sh\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_commands_run(shell, subtests):
  num_run = 0
  for page in PAGES:
    for block in blocks_of(page):
      if block.startswith('# Needs '):
        continue
      if 'npm' in block and not shutil.which('npm'):
        continue
      with subtests.test(page=page, block=block):
        done = shell(re.sub(r'\bin 0 1 2;', 'in 0;', block))
        assert done.returncode == 0, done.stdout
        num_run += len(block.replace('\\\n', ' ').splitlines())
  assert num_run > 40


def test_commands_of_tables_are_in_a_block():
  """Or they are run nowhere."""

  def words(command):
    return tuple(shlex.split(command, comments=True))

  pages = [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]
  in_blocks = {
    words(line)
    for page in PAGES
    for block in blocks_of(page)
    if not block.startswith('# Needs ')
    for line in block.replace('\\\n', ' ').splitlines()
    if line.lstrip().startswith('python ') and line.count('"') % 2 == 0
  }
  for page in pages:
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for command in re.findall(r'`(python \w+\.py [^`]*)`', text):
      assert words(command) in in_blocks or '--help' in command, command
