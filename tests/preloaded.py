"""Runs of the scripts without the seconds that libraries take to import.

Each run is a process of its own: a fork of one that has imported the libraries,
and nothing of this project. If the import of libraries matters, tests use
`tests.test_main.start`.
"""

import functools
import gc
import importlib
import json
import multiprocessing
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile

_ROOT = pathlib.Path(__file__).resolve().parent.parent

_LIBRARIES = (
  'clu.metric_writers',
  'flax.linen',
  'matplotlib.pyplot',
  'ml_collections.config_flags',
  'optax',
  'optuna',
  'orbax.checkpoint',
  'pandas',
  'sklearn.ensemble',
  'sklearn.mixture',
  'sqlalchemy',
  'tensorflow_datasets',
)

_TIMEOUT_SECONDS = 600

# Lines that the C++ sides of TensorFlow and JAX log.
_LOGGED = re.compile(
  r'[IWEF]\d{4} |\d{4}-\d\d-\d\d .*: [IWEF] |'
  'WARNING: All log messages before absl::InitializeLog|'
  'To enable the following instructions:'
)


def run(
  *flags: str,
  script: str = 'main.py',
  devices: int = 1,
  folder: str | os.PathLike = _ROOT,
  **variables: str,
) -> tuple[int, str, str]:
  """Exit status, standard output and standard error of a script.

  It runs in a folder, with these environment variables in addition.
  """
  environment = dict(
    os.environ,
    **variables,
    XLA_FLAGS=f'{os.environ["XLA_FLAGS"]} '
    f'--xla_force_host_platform_device_count={devices}',
    JAX_PLATFORMS='cpu',
  )
  # Libraries read these when they are imported.
  early = {k: v for k, v in environment.items() if k.startswith(('JAX', 'TF'))}
  with tempfile.TemporaryDirectory() as aside:
    out, err = pathlib.Path(aside, 'out'), pathlib.Path(aside, 'err')
    request = [[script, *flags], environment, str(folder), str(out), str(err)]
    process = _process(tuple(sorted(early.items())))
    process.stdin.write(json.dumps(request) + '\n')
    process.stdin.flush()
    code = int(process.stdout.readline())
    return code, out.read_text(), program_lines(err.read_text())


def program_lines(err: str) -> str:
  """Standard error without the logs of the libraries' C++ sides."""
  lines = err.splitlines(keepends=True)
  return ''.join(line for line in lines if not _LOGGED.match(line))


@functools.cache
def _process(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen:
  """Forks the runs of this early environment; ends with this process."""
  return subprocess.Popen(
    [sys.executable, __file__],
    cwd=_ROOT,
    env=os.environ | dict(environment),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _serve() -> None:
  """Reads requests from standard input, and prints exit statuses."""
  sys.path[0] = str(_ROOT)
  for library in _LIBRARIES:
    importlib.import_module(library)
  gc.freeze()  # A collection in a fork would copy every page.
  context = multiprocessing.get_context('fork')
  for line in sys.stdin:
    child = context.Process(target=_run, args=json.loads(line))
    child.start()
    child.join(_TIMEOUT_SECONDS)
    child.kill()
    child.join()
    print(child.exitcode, flush=True)


def _run(argv, environment, folder, out, err):
  for stream, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
  os.environ.clear()
  os.environ.update(environment)
  os.chdir(folder)
  sys.argv = argv
  runpy.run_path(argv[0], run_name='__main__')


if __name__ == '__main__':
  _serve()
