"""What a benchmark leaves: Markdown tables, and JSON that says where it ran."""

from collections.abc import Sequence
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax

from vae import devices
from vae import paths
from vae.errors import UserError

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch')
# They change how fast a step is.
_VARIABLES = (
  'CUDA_VISIBLE_DEVICES',
  'GLIBC_TUNABLES',
  'JAX_PLATFORMS',
  'OMP_NUM_THREADS',
  'XLA_FLAGS',
)


def compile_quickly() -> None:
  """Has XLA not optimise: for a try, before JAX has its devices."""
  print('A try: these numbers mean nothing.')
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_backend_optimization_level=0'


def check_devices() -> None:
  """Ends the program if JAX lacks the platform that JAX_PLATFORMS names."""
  try:
    devices.check()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def machine() -> dict[str, object]:
  """Where and when, and with which versions."""
  check_devices()
  return {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': _commit(),
    'python': platform.python_version(),
    **{package: _version(package) for package in _PACKAGES},
    'devices': [device.device_kind for device in jax.devices()],
    'cpu': _cpu(),
    'cores': len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count(),
    # Of other work, if the benchmark has only begun.
    'load_average': os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
    'environment': {
      name: os.environ[name] for name in _VARIABLES if name in os.environ
    },
  }


def describe(facts: dict[str, object]) -> str:
  """`machine` in a line."""
  packages = (f'{name} {facts[name]}' for name in _PACKAGES if facts[name])
  variables = facts['environment'].items()
  return ', '.join(
    [
      f'{len(facts["devices"])} × {facts["devices"][0]}',
      f'{facts["cpu"]} ({facts["cores"]} cores)',
      f'python {facts["python"]}',
      *packages,
      *(f'{name}={value}' for name, value in variables),
      f'commit {facts["commit"]}',
      str(facts['date']),
    ]
  )


def warn_of_other_work(facts: dict[str, object]) -> None:
  """Tells if the machine had other work when the benchmark began."""
  load = facts['load_average']
  if load and load > 0.5:
    print(
      f'The load average is {load:.1f}: with other work beside it nothing here '
      'is comparable, and PyTorch, whose threads wait for each other, slows '
      'down the most.',
      file=sys.stderr,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Rows of cells in Markdown; the first column to the left."""
  lines = [header, ('---', *['---:'] * (len(header) - 1)), *rows]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def significant(number: float) -> str:
  """Three digits or all before the point, thousands separated."""
  if abs(number) >= 100:
    return f'{number:,.0f}'
  return f'{number:.1f}' if abs(number) >= 10 else f'{number:.2f}'


def save(path: str | None, content: dict[str, object]) -> None:
  """Writes JSON if a path is given; again whenever there is more."""
  if path:
    text = json.dumps(content, indent=2) + '\n'
    # Whoever is ended while it writes leaves what there was.
    paths.replace(paths.expand(path), text.encode())


def write(path: str | None, content: dict[str, object]) -> None:
  """Writes JSON if a path is given, and prints that."""
  save(path, content)
  if path:
    print(f'\n{path}: all rounds.')


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """The code's, with a + if it was changed since; None outside Git."""
  git = ('git', '-C', str(pathlib.Path(__file__).parents[1]))
  try:
    commit = subprocess.check_output(
      (*git, 'rev-parse', '--short=12', 'HEAD'),
      stderr=subprocess.DEVNULL,
      text=True,
    ).strip()
    changes = subprocess.check_output(
      (*git, 'status', '--porcelain'), stderr=subprocess.DEVNULL, text=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return commit + '+' * bool(changes.strip())


def _cpu() -> str:
  try:
    with open('/proc/cpuinfo') as lines:
      for line in lines:
        if line.startswith('model name'):
          return line.split(':', 1)[1].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()
