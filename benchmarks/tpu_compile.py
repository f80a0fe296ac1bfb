"""The programs as XLA compiles them for TPUs, without any TPU.

  make libtpu    # the compiler, 700 MB, once
  python benchmarks/tpu_compile.py --output=tpu_compile.json

The programs of configs/celeba.py, as train.py, evaluate.py, generate.py and
sweep.py run them, are compiled for whole slices of TPUs. Nothing is run: the
numbers are XLA's count of operations, bytes and memory, and its estimate of
cycles.
"""

import argparse
import collections
from collections.abc import Iterator, Sequence
import contextlib
import importlib.util
import itertools
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

from benchmarks import jax_vae, results
from evaluation import bounds
from vae import loading, numerics, padding, population, splits, steps

PROGRAMS = ('train', 'eval', 'bound', 'sample', 'population')

# Cloud's name of a slice: libtpu's name of its chips, and their division. A v5e
# slice of more than 8 chips has 4 on each host, a v4 too; the two cores of a v4
# or v5p chip are one device.
SLICES = {
  'v5e-1': ('v5e:1x1', {'chips_per_host_bounds': (1, 1, 1)}),
  'v5e-8': ('v5e:2x4', {'chips_per_host_bounds': (2, 4, 1)}),
  'v5e-32': ('v5e:4x8', {}),
  'v4-64': ('v4:2x4x4', {'chip_config_name': 'megacore'}),
  'v5p-64': ('v5p:2x4x4', {'chip_config_name': 'megachip'}),
  'v6e-1': ('v6e:1x1', {'chips_per_host_bounds': (1, 1, 1)}),
}

# The result of `make libtpu`. Within the environment it would have JAX look for
# a TPU at each start.
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
      'error: libtpu, which compiles for TPUs, is not installed; run make '
      'libtpu (700 MB), or set TPU_LIBRARY_PATH.',
      file=sys.stderr,
    )
    sys.exit(2)
  prepare()
  content = results.begin(args) | {'rows': []}
  for name, program, dtype, batch_size in itertools.product(
    args.slices, args.programs, args.dtypes, args.batch_sizes
  ):
    config = jax_vae.make_config(args.quick)
    config.model.dtype = dtype
    tpus, start = slice_of(name), time.monotonic()
    compiled = lower(program, tpus, config, batch_size, args.num_images)
    compiled = compiled.compile()
    row = {
      'slice': name,
      'libtpu': ' '.join(tpus[0].client.platform_version.split()),
      'chips': len(tpus),
      'hosts': len({tpu.process_index for tpu in tpus}),
      'program': program,
      'dtype': dtype,
      'batch_size_per_chip': batch_size,
      'compile_seconds': time.monotonic() - start,
      **describe(compiled),
    }
    content['rows'].append(row)
    # A program takes minutes; an interruption keeps the others.
    results.save(args.output, content)
    print(_table([row]).splitlines()[-1], flush=True)
    if args.hlo:
      file = f'{name}_{program}_{dtype}_{batch_size}.txt'
      pathlib.Path(args.hlo, file).write_text(compiled.as_text())
  print()
  print(_table(content['rows']))
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  for flag, default, description in (
    ('--slices', 'v5e-1,v5e-8,v5e-32,v4-64', ', '.join(SLICES)),
    ('--programs', ','.join(PROGRAMS), ', '.join(PROGRAMS)),
    ('--dtypes', 'float32', 'float32, bfloat16'),
  ):
    parser.add_argument(
      flag,
      type=lambda text: text.split(','),
      default=default.split(','),
      help=f'separated by commas, of {description} ({default})',
    )
  parser.add_argument(
    '--batch_sizes',
    type=results.numbers,
    default=[64],
    help='images for each chip, separated by commas (64)',
  )
  parser.add_argument(
    '--num_images', type=int, default=162_770, help='on each chip (162770)'
  )
  parser.add_argument('--hlo', help='a folder for the compiled programs')
  args = results.parse(
    parser, slices=['v5e-1'], programs=['sample'], num_images=100
  )
  for name, known in (('slices', SLICES), ('programs', PROGRAMS)):
    for unknown in set(getattr(args, name)) - set(known):
      parser.error(f'--{name} has {unknown}; it takes {", ".join(known)}.')
  return args


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
) -> jax.stages.Lowered:
  """A program as the compiler gets it on these TPUs, or on a GPU.

  Args:
    program: one of `PROGRAMS`. `train`, `eval` and `population` find their
      images on the devices.
    tpus: that share the batches; `population` has a member on each.
    config: complete and valid.
    batch_size: images for each device.
    num_images: in the data set.
  """
  is_measurement = program in ('bound', 'sample')
  switches = numerics.precise if is_measurement else numerics.fixed
  config = config.copy_and_resolve_references()
  is_shared = program != 'population'
  config.train.batch_size = batch_size * (len(tpus) if is_shared else 1)
  with _as_if_on(tpus), switches(config.model.dtype):
    return _LOWER[program](tpus, config, batch_size, num_images)


@contextlib.contextmanager
def _as_if_on(tpus: Sequence[jax.Device]) -> Iterator[None]:
  """A context in which these are the devices of the library."""
  pmap, platform = jax.pmap, tpus[0].platform

  def on_tpus(function, **options):
    return pmap(function, **options | {'devices': tpus})

  # JAX has one name for CUDA's and ROCm's devices.
  backend = 'tpu' if platform == 'tpu' else 'gpu'
  with (
    mock.patch.object(jax, 'pmap', on_tpus),
    mock.patch.object(jax, 'default_backend', lambda: backend),
  ):
    yield


# The library caches its compiled steps; `__wrapped__` makes new ones, for the
# devices at hand.


def _lower_train(tpus, config, batch_size, num_images):
  program = steps.program_from_config(config, num_images)
  return steps.make_train_steps.__wrapped__(program).lower(
    *(steps.abstract_state(program), _settings(config), _key()),
    *(_stored(program, num_images), _indices(len(tpus), batch_size)),
    _shape((), 'i4'),
  )


def _lower_eval(tpus, config, batch_size, num_images):
  program = steps.program_from_config(config, num_images)
  return steps.make_eval_steps.__wrapped__(program).lower(
    *(steps.abstract_state(program).variables, _settings(config), _key()),
    *(_stored(program, num_images), _indices(len(tpus), batch_size)),
    *[_shape((), 'i4')] * 3,
  )


def _lower_population(tpus, config, batch_size, num_images):
  """Members of one seed, which share their batches."""
  program = steps.program_from_config(config, num_images, axis_name=None)
  state = steps.abstract_state(program)
  others = padding.collection(program.model, program.model, state.params)
  state = state.replace(collections=state.collections | others)
  state, settings = jax.tree.map(
    lambda s: _shape((len(tpus), *s.shape), s.dtype),
    (state, _settings(config)),
  )
  train_steps, _ = population._over_members.__wrapped__(
    program, True, len(tpus)
  )
  return train_steps.lower(
    *(state, settings, _key(), _stored(program, num_images)),
    *(_indices(batch_size), _shape((), 'i4')),
  )


def _lower_bound(tpus, config, batch_size, num_images):
  program = steps.program_from_config(config, num_images, axis_name=None)
  model = program.model
  images = _shape((len(tpus), batch_size, *model.image_shape), 'u1')
  return bounds.make_bound_step.__wrapped__(model, num_samples=100).lower(
    *(steps.abstract_state(program).variables, _key(), images),
    *(_shape((), 'i4'), _shape((), steps.float_dtype(model))),
  )


def _lower_sample(tpus, config, batch_size, num_images):
  program = steps.program_from_config(config, num_images, axis_name=None)
  on_first = jax.sharding.SingleDeviceSharding(tpus[0])
  variables, z = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on_first),
    (
      steps.abstract_state(program).variables,
      _shape((batch_size, config.model.latent_dim), jnp.float32),
    ),
  )
  return loading._decode.lower(program.model, variables, z)


_LOWER = {
  'train': _lower_train,
  'eval': _lower_eval,
  'bound': _lower_bound,
  'sample': _lower_sample,
  'population': _lower_population,
}


def _shape(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _settings(config):
  return jax.tree.map(
    lambda leaf: _shape(jnp.shape(leaf), jnp.result_type(leaf)),
    steps.settings_from_config(config),
  )


def _key() -> jax.ShapeDtypeStruct:
  return jax.eval_shape(lambda: numerics.train_key(0))


def _stored(program: steps.Program, num_images: int) -> jax.ShapeDtypeStruct:
  shape = splits.tiled_shape(program.model.image_shape)
  return _shape((num_images, *shape), 'u1')


def _indices(*batches: int) -> splits.Examples:
  """The images of a dispatch of 100 batches, [..., 100, batch_size]."""
  *leading, batch_size = batches
  return splits.Examples(_shape((*leading, 100, batch_size), 'i4'))


def describe(compiled: jax.stages.Compiled) -> dict[str, object]:
  """The compiler's numbers of a program, for each device.

  Returns:
    `gigaflop` and `gigabytes` (read and written, the fast memory on the chip
    included), the loop's body counted once; `megacycles`, estimated, of the
    body alone; `arguments`, `temporary` and `aliased` memory, MB;
    `collectives`, the bytes of each; and the number of `host_transfers`.
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
  """Bytes of each collective operation of a compiled program, by name."""
  found = collections.defaultdict(list)
  for shapes, name in re.findall(
    rf'= (\(.*?\)|\S+) ({_COLLECTIVES})(?:-start)?\(', text
  ):
    found[name].append(_bytes_of(shapes))
  return dict(found)


def _bytes_of(shapes: str) -> int:
  """Bytes of arrays in XLA's notation, `(f32[32]{0}, u8[2,3]{1,0})`."""
  return sum(
    _BYTES[dtype] * math.prod(map(int, filter(None, sides.split(','))))
    for dtype, sides in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shapes)
  )


def _cycles(text: str) -> int:
  """Estimated cycles of the longest loop's body, or of the whole program."""
  estimates = {}
  for block in text.split('\n}\n'):
    name = re.search(r'^(?:ENTRY )?%([\w.-]+) \(', block, re.MULTILINE)
    cycles = re.findall(r'"estimated_cycles":"(\d+)"', block)
    estimates[name and name[1]] = sum(map(int, cycles))
  bodies = re.findall(r' while\(.*?body=%([\w.-]+)', text)
  return max(estimates[name] for name in bodies or estimates)


def _table(rows: Sequence[dict[str, object]]) -> str:
  columns = {
    'GFLOP': 'gigaflop',
    'GB': 'gigabytes',
    'Mcycles': 'megacycles',
    'arguments, MB': 'arguments_megabytes',
    'temporary, MB': 'temporary_megabytes',
    'aliased, MB': 'aliased_megabytes',
  }
  lines = []
  for row in rows:
    collectives = [
      f'{len(sizes)} {name} ({sum(sizes) / 1e3:,.0f} kB)'
      for name, sizes in row['collectives'].items()
    ]
    lines.append(
      [
        f'{row["slice"]}: {row["program"]}, {row["dtype"]}',
        str(row['batch_size_per_chip']),
        *(results.significant(row[name]) for name in columns.values()),
        ', '.join(collectives) or 'none',
      ]
    )
  header = ['program', 'images a chip', *columns, 'collectives']
  return results.table(header, lines)


if __name__ == '__main__':
  main()
