"""The frame of a benchmark: its flags, the machine, tables and JSON."""

import argparse
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

from vae import devices, paths
from vae.errors import UserError

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch')

# Variables that change how fast a step is.
_VARIABLES = (
  'CUDA_VISIBLE_DEVICES',
  'GLIBC_TUNABLES',
  'JAX_PLATFORMS',
  'OMP_NUM_THREADS',
  'XLA_FLAGS',
)


def make_parser(description: str) -> argparse.ArgumentParser:
  """A parser with the flags that all benchmarks have."""
  parser = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--output', help='JSON file for all measurements')
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a try: a tiny network, one short round, no optimisation by XLA',
  )
  return parser


def parse(parser: argparse.ArgumentParser, **quick) -> argparse.Namespace:
  """Parses the command line; with `--quick` flags have the values of `quick`.

  Call it before JAX has its devices.
  """
  args = parser.parse_args()
  if args.quick:
    print('A try: these numbers mean nothing.')
    os.environ['XLA_FLAGS'] = xla_flags('--xla_backend_optimization_level=0')
    vars(args).update(quick)
  return args


def xla_flags(*flags: str) -> str:
  """XLA_FLAGS of this process and others; XLA aborts if it is only blanks."""
  return ' '.join([os.environ.get('XLA_FLAGS', ''), *flags]).strip()


def numbers(text: str) -> list[int]:
  """The value of a flag: whole numbers, separated by commas."""
  return [int(number) for number in text.split(',')]


def check_devices() -> None:
  """Exits with 2 if JAX lacks the platform that JAX_PLATFORMS names."""
  try:
    devices.check()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def begin(args: argparse.Namespace) -> dict[str, object]:
  """Prints the machine, with a warning if other work runs on it.

  Returns:
    The first items of the JSON: `machine` and `settings`.
  """
  facts = machine()
  load = facts['load_average']
  if load and load > 0.5:
    print(
      f'warning: the load average is {load:.1f}; speeds beside other work are '
      'not comparable, and those of PyTorch suffer most.',
      file=sys.stderr,
    )
  print(describe(facts), end='\n\n', flush=True)
  return {'machine': facts, 'settings': vars(args)}


def machine() -> dict[str, object]:
  """Date, commit, versions, devices and processor."""
  check_devices()
  return {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': _commit(),
    'python': platform.python_version(),
    **{package: _version(package) for package in _PACKAGES},
    'devices': [device.device_kind for device in jax.devices()],
    'cpu': _cpu(),
    'cores': os.cpu_count(),
    'load_average': os.getloadavg()[0],
    'environment': {
      name: os.environ[name] for name in _VARIABLES if name in os.environ
    },
  }


def describe(facts: dict[str, object]) -> str:
  """`machine` in a line."""
  return ', '.join(
    [
      f'{len(facts["devices"])} × {facts["devices"][0]}',
      f'{facts["cpu"]} ({facts["cores"]} cores)',
      f'python {facts["python"]}',
      *(f'{name} {facts[name]}' for name in _PACKAGES if facts[name]),
      *(f'{name}={value}' for name, value in facts['environment'].items()),
      f'commit {facts["commit"]}',
      str(facts['date']),
    ]
  )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Rows of cells in Markdown, the first column to the left."""
  lines = [header, ('---', *['---:'] * (len(header) - 1)), *rows]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def significant(number: float) -> str:
  """A number with three digits, or all digits before the point."""
  if abs(number) >= 100:
    return f'{number:,.0f}'
  return f'{number:.1f}' if abs(number) >= 10 else f'{number:.2f}'


def save(path: str | None, content: dict[str, object]) -> None:
  """Writes JSON if a path is given; atomic, so it can be called repeatedly."""
  if path:
    text = json.dumps(content, indent=2) + '\n'
    paths.replace(paths.expand(path), text.encode())


def write(path: str | None, content: dict[str, object]) -> None:
  """Writes JSON if a path is given, and prints the path."""
  save(path, content)
  if path:
    print(f'\nAll measurements: {path}')


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """The commit, with a + if files differ from it; None outside Git."""
  git = ('git', '-C', str(pathlib.Path(__file__).parents[1]))
  commands = (
    (*git, 'rev-parse', '--short=12', 'HEAD'),
    (*git, 'status', '--porcelain'),
  )
  try:
    commit, changes = (
      subprocess.check_output(c, stderr=subprocess.DEVNULL, text=True).strip()
      for c in commands
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return commit + '+' * bool(changes)


def _cpu() -> str:
  try:
    with open('/proc/cpuinfo') as lines:
      for line in lines:
        if line.startswith('model name'):
          return line.split(':', 1)[1].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()
