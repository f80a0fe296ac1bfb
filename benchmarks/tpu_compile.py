"""What XLA makes of the programs for TPUs, compiled where there is none.

  make libtpu    # the compiler, 700 MB, once
  python benchmarks/tpu_compile.py --output=tpu_compile.json

The programs of configs/celeba.py, as train.py, evaluate.py, generate.py and
sweep.py run them, are compiled for whole slices of TPUs. Nothing is run: the
numbers are XLA's own count of operations, bytes and memory, and its estimate
of cycles.
"""

import argparse
import collections
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from benchmarks import results
from configs import celeba
from evaluation import bounds
from vae import devices
from vae import model as models
from vae import numerics
from vae import optimizers
from vae import population
from vae import randomness
from vae import splits
from vae import trained
from vae import training

PROGRAMS = ('train', 'eval', 'bound', 'sample', 'population')

# What Cloud calls a slice: its chips as libtpu calls them, and how they are
# shared out. A v5e slice of more than 8 chips has 4 on each host, a v4 too; the
# two cores of a v4 or v5p chip are one device.
SLICES = {
  'v5e-1': ('v5e:1x1', {'chips_per_host_bounds': (1, 1, 1)}),
  'v5e-8': ('v5e:2x4', {'chips_per_host_bounds': (2, 4, 1)}),
  'v5e-32': ('v5e:4x8', {}),
  'v4-64': ('v4:2x4x4', {'chip_config_name': 'megacore'}),
  'v5p-64': ('v5p:2x4x4', {'chip_config_name': 'megachip'}),
  'v6e-1': ('v6e:1x1', {'chips_per_host_bounds': (1, 1, 1)}),
}

# Where `make libtpu` puts it: beside the environment, where JAX would take each
# start for one on a TPU.
_LIBRARY = pathlib.Path(__file__).parents[1] / '.libtpu/libtpu/libtpu.so'

# libtpu looks for the TPU that it is on, and for other processes that hold it.
_ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2} | {
  f'{kind}{bits}': bits // 8 for kind in 'suf' for bits in (32, 64)
}
_COLLECTIVES = (
  'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
)


def main() -> None:
  """Compiles, prints a table, and writes JSON."""
  args = _arguments()
  if not has_libtpu():
    print(
      'error: there is no libtpu to compile with; run make libtpu (700 MB), or '
      'set TPU_LIBRARY_PATH.',
      file=sys.stderr,
    )
    sys.exit(2)
  prepare()
  facts = results.machine()
  print(results.describe(facts), flush=True)
  content = {'machine': facts, 'settings': vars(args), 'rows': []}
  for name, program, dtype, batch_size in itertools.product(
    args.slices, args.programs, args.dtypes, args.batch_sizes
  ):
    tpus, start = slice_of(name), time.monotonic()
    facts['libtpu'] = ' '.join(tpus[0].client.platform_version.split())
    compiled = lower(
      program,
      tpus,
      _config(args, dtype),
      batch_size,
      args.num_images,
      args.members,
    ).compile()
    row = {
      'slice': name,
      'device': tpus[0].device_kind,
      'chips': len(tpus),
      'hosts': len({tpu.process_index for tpu in tpus}),
      'program': program,
      'dtype': dtype,
      'batch_size_per_chip': batch_size,
      'compile_seconds': time.monotonic() - start,
      **describe(compiled),
    }
    content['rows'].append(row)
    print(table([row]).splitlines()[-1], flush=True)
    if args.output:  # A program takes minutes, and what there is counts.
      pathlib.Path(args.output).write_text(json.dumps(content, indent=2))
    if args.hlo:
      file = f'{name}_{program}_{dtype}_{batch_size}.txt'
      pathlib.Path(args.hlo, file).write_text(compiled.as_text())
  print()
  print(table(content['rows']))
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--slices',
    default='v5e-1,v5e-8,v5e-32,v4-64',
    help=f'by commas, of {", ".join(SLICES)}',
  )
  parser.add_argument(
    '--programs', default=','.join(PROGRAMS), help='by commas (all)'
  )
  parser.add_argument(
    '--dtypes', default='float32', help='float32, bfloat16 (float32)'
  )
  parser.add_argument(
    '--batch_sizes', default='64', help='images for each chip (64)'
  )
  parser.add_argument(
    '--num_images', type=int, default=162_770, help='on each chip (162770)'
  )
  parser.add_argument(
    '--members', type=int, default=4, help='of a population, on each chip (4)'
  )
  parser.add_argument('--hlo', help='a folder for the compiled programs')
  parser.add_argument('--output', help='a file for the numbers, JSON')
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a tiny network, one program: whether it runs at all',
  )
  args = parser.parse_args()
  if args.quick:
    args.slices, args.programs, args.num_images = 'v5e-1', 'sample', 100
  for name in ('slices', 'programs', 'dtypes', 'batch_sizes'):
    setattr(args, name, getattr(args, name).split(','))
  args.batch_sizes = list(map(int, args.batch_sizes))
  for name, known in (('slices', SLICES), ('programs', PROGRAMS)):
    for unknown in set(getattr(args, name)) - set(known):
      parser.error(f'--{name}: there is no {unknown}; there are {[*known]}')
  return args


def _config(args: argparse.Namespace, dtype: str):
  config = celeba.get_config()
  config.model.dtype = dtype
  if args.quick:
    config.data.image_size = 16
    config.model.hidden_channels = (4, 8)
  return config


def has_libtpu() -> bool:
  """Whether there is a compiler for TPUs."""
  return (
    _LIBRARY.exists()
    or 'TPU_LIBRARY_PATH' in os.environ
    or importlib.util.find_spec('libtpu') is not None
  )


def prepare() -> None:
  """Readies this process, before JAX has its devices, to compile for TPUs."""
  if _LIBRARY.exists():
    os.environ.setdefault('TPU_LIBRARY_PATH', str(_LIBRARY))
  os.environ.update(_ENVIRONMENT)
  jax.config.update('jax_platforms', 'cpu')


def slice_of(name: str) -> list[jax.Device]:
  """The devices of one of `SLICES`, to compile for."""
  topology, options = SLICES[name]
  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology, **options
  ).devices


def lower(
  program: str,
  tpus: Sequence[jax.Device],
  config,
  batch_size: int,
  num_images: int,
  members: int,
) -> jax.stages.Lowered:
  """A program as it would be handed to the compiler on these TPUs.

  Args:
    program: one of `PROGRAMS`. `train`, `eval` and `population` find their
      images on the devices.
    tpus: that share the batches, or the members.
    config: complete and valid.
    batch_size: images for each device; of a population, for each member.
    num_images: in the data set.
    members: of a population, on each device.
  """
  with _as_if_on(tpus):
    arguments = _Arguments(tpus, config, batch_size, num_images)
    if program in ('bound', 'sample'):
      with numerics.precise(config.model.dtype):
        return _lower_measurement(program, arguments)
    with numerics.fixed(config.model.dtype):
      if program == 'population':
        return _lower_population(arguments, members)
      return _lower_training(program, arguments)


@contextlib.contextmanager
def _as_if_on(tpus: Sequence[jax.Device]) -> Iterator[None]:
  """A context in which the library believes that these are its devices."""
  pmap = jax.pmap

  def on_tpus(function, **options):
    return pmap(function, **options | {'devices': tpus})

  with (
    mock.patch.object(jax, 'pmap', on_tpus),
    mock.patch.object(jax, 'default_backend', lambda: 'tpu'),
  ):
    yield


class _Arguments:
  """Shapes of what the programs are given."""

  def __init__(self, tpus, config, batch_size, num_images):
    self.tpus, self.config, self.batch_size = tpus, config, batch_size
    self.model = models.from_config(config)
    self.optimizer = optimizers.from_config(
      config, max(1, num_images // (batch_size * len(tpus)))
    )
    self.state = training.abstract_state(self.model, self.optimizer)
    self.settings = jax.tree.map(
      lambda leaf: _shape(jnp.shape(leaf), jnp.result_type(leaf)),
      training.settings_from_config(config, self.model),
    )
    self.key = jax.eval_shape(lambda: randomness.train_key(0))
    shape = splits.tiled_shape(self.model.image_shape)
    self.stored = _shape((num_images, *shape), 'u1')
    self.integer = _shape((), 'i4')

  def indices(self, *leading: int) -> jax.ShapeDtypeStruct:
    """Of the images of a dispatch's batches."""
    return _shape((*leading, 100, self.batch_size), 'i4')

  def images(self) -> jax.ShapeDtypeStruct:
    """A batch for each device."""
    shape = len(self.tpus), self.batch_size, *self.model.image_shape
    return _shape(shape, 'u1')


def _shape(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


# The library's makers of programs remember these; here each has other devices.


def _lower_training(program: str, a: _Arguments) -> jax.stages.Lowered:
  model = a.model.clone(axis_name=devices.AXIS)
  batches = a.indices(len(a.tpus))
  if program == 'train':
    steps = training.make_train_steps.__wrapped__(
      model, a.optimizer, a.config.train.flip
    )
    return steps.lower(a.state, a.settings, a.key, a.stored, batches, a.integer)
  steps = training.make_eval_steps.__wrapped__(model)
  return steps.lower(
    *(a.state.variables, a.settings, a.key, a.stored, batches),
    *(a.integer, a.integer, a.integer),
  )


def _lower_measurement(program: str, a: _Arguments) -> jax.stages.Lowered:
  if program == 'bound':
    step = bounds.make_bound_step.__wrapped__(a.model)
    sigma = _shape((), training.float_dtype(a.model))
    return step.lower(
      *(a.state.variables, a.key, a.images()),
      *(a.integer, a.integer, sigma),
    )
  on_first = jax.sharding.SingleDeviceSharding(a.tpus[0])
  variables, z = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on_first),
    (
      a.state.variables,
      _shape((a.batch_size, a.model.latent_dim), jnp.float32),
    ),
  )
  return trained._apply.lower(a.model, 'decode', variables, z)


def _lower_population(a: _Arguments, members: int) -> jax.stages.Lowered:
  """Members of one seed, that share their batches."""

  def of_each(tree):
    return jax.tree.map(
      lambda s: _shape((len(a.tpus), members, *s.shape), s.dtype), tree
    )

  steps = population._make_train_steps.__wrapped__(
    a.model, True, len(a.tpus), a.optimizer, a.config.train.flip, False
  )
  settings = a.settings.replace(
    latent_mask=_shape((a.model.latent_dim,), jnp.float32)
  )
  state = of_each(a.state.replace(step=None)).replace(step=a.state.step)
  return steps.lower(
    state, of_each(settings), a.key, a.stored, a.indices(), a.integer
  )


def describe(compiled: jax.stages.Compiled) -> dict[str, object]:
  """What the compiler says of a program, for each device.

  Returns:
    `gigaflop` and `gigabytes` (read and written, the fast memory on the chip
    included), the loop's body counted once; `megacycles`, estimated, of the
    body alone; `arguments`, `temporary` and `aliased` memory, MB;
    `collectives`, the bytes of each; and how many `host_transfers` there are.
  """
  text = compiled.as_text()
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  return {
    'gigaflop': cost['flops'] / 1e9,
    'gigabytes': cost['bytes accessed'] / 1e9,
    'megacycles': _cycles(text) / 1e6,
    'arguments_megabytes': memory.argument_size_in_bytes / 1e6,
    'temporary_megabytes': memory.temp_size_in_bytes / 1e6,
    'aliased_megabytes': memory.alias_size_in_bytes / 1e6,
    'collectives': collective_bytes(text),
    'host_transfers': len(
      re.findall(r' (?:infeed|outfeed|send|recv)\(|callback', text)
    ),
  }


def collective_bytes(text: str) -> dict[str, list[int]]:
  """Bytes of each collective operation of a compiled program, by its name."""
  found = collections.defaultdict(list)
  for shapes, name in re.findall(
    rf'= (\(.*?\)|\S+) ({_COLLECTIVES})(?:-start)?\(', text
  ):
    found[name].append(_bytes_of(shapes))
  return dict(found)


def _bytes_of(shapes: str) -> int:
  """Of arrays as XLA writes their shapes: `(f32[32]{0}, u8[2,3]{1,0})`."""
  return sum(
    _BYTES[dtype] * math.prod(map(int, filter(None, sides.split(','))))
    for dtype, sides in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shapes)
  )


def _cycles(text: str) -> int:
  """Estimated cycles of the longest loop's body, or of all without a loop."""
  estimates = {}
  for block in text.split('\n}\n'):
    name = re.search(r'^(?:ENTRY )?%([\w.-]+) \(', block, re.MULTILINE)
    cycles = re.findall(r'"estimated_cycles":"(\d+)"', block)
    estimates[name and name[1]] = sum(map(int, cycles))
  bodies = re.findall(r' while\(.*?body=%([\w.-]+)', text)
  return max(estimates[name] for name in bodies or estimates)


def table(rows: Sequence[dict[str, object]]) -> str:
  """What `describe` found, in Markdown."""
  lines = []
  for row in rows:
    collectives = [
      f'{len(sizes)} {name} ({sum(sizes) / 1e3:,.0f} kB)'
      for name, sizes in row['collectives'].items()
    ]
    numbers = [
      row[name]
      for name in (
        'gigaflop',
        'gigabytes',
        'megacycles',
        'arguments_megabytes',
        'temporary_megabytes',
        'aliased_megabytes',
      )
    ]
    lines.append(
      [
        f'{row["slice"]}: {row["program"]}, {row["dtype"]}',
        str(row['batch_size_per_chip']),
        *map(results.significant, numbers),
        ', '.join(collectives) or 'none',
      ]
    )
  header = [
    'program',
    'images a chip',
    'GFLOP',
    'GB',
    'Mcycles',
    'arguments, MB',
    'temporary, MB',
    'aliased, MB',
    'collectives',
  ]
  return results.table(header, lines)


if __name__ == '__main__':
  main()
