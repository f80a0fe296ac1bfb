"""The training step as XLA compiles it for a GPU, without any GPU.

  make gpu-compiler    # JAX's plugin for CUDA, 400 MB, once
  python benchmarks/gpu_compile.py --output=gpu_compile.json

The program of configs/celeba.py, as train.py runs it, is compiled for an H200.
Nothing is run: XLA chooses between kernels by rules instead of timing them, but
calls the same functions of cuDNN and fuses the same operations. Each kernel
takes some microseconds, however little it computes, so their number counts. A
convolution with a window larger than the model's own is a gradient for which
cuDNN has no function.
"""

import argparse
import collections
import itertools
import os
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from jax.experimental import topologies

from benchmarks import jax_vae, results, tpu_compile

# The result of `make gpu-compiler`. Within the environment it would have JAX
# look for a GPU at each start.
_PLUGIN = pathlib.Path(__file__).resolve().parents[1] / '.gpu_compiler'

# An H200 as XLA describes it.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


def main() -> None:
  """Compiles, prints a table for each program, and writes JSON."""
  args = _arguments()
  if not has_compiler():
    print(
      "error: JAX's plugin for CUDA is not installed; run make gpu-compiler "
      '(400 MB).',
      file=sys.stderr,
    )
    sys.exit(2)
  prepare()
  content = results.begin(args) | {'rows': []}
  for dtype, batch_size in itertools.product(args.dtypes, args.batch_sizes):
    config = jax_vae.make_config(args.quick)
    config.model.dtype = dtype
    start = time.monotonic()
    compiled = tpu_compile.lower(
      'train', [gpu()], config, batch_size, args.num_images
    ).compile()
    row = {
      'dtype': dtype,
      'batch_size': batch_size,
      'compile_seconds': time.monotonic() - start,
      **describe(compiled),
    }
    content['rows'].append(row)
    results.save(args.output, content)
    print(f'{_table(row)}\n', flush=True)
    if args.hlo:
      file = f'{dtype}_{batch_size}.txt'
      pathlib.Path(args.hlo, file).write_text(compiled.as_text())
  results.write(args.output, content)


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  add = parser.add_argument
  add(
    '--dtypes',
    type=lambda text: text.split(','),
    default=['float32', 'bfloat16'],
    help='separated by commas (float32,bfloat16)',
  )
  add(
    '--batch_sizes',
    type=results.numbers,
    default=[64],
    help='separated by commas (64)',
  )
  add('--num_images', type=int, default=162_770, help='(162770)')
  add('--hlo', help='a folder for the compiled programs')
  return results.parse(parser, dtypes=['float32'], num_images=100)


def has_compiler() -> bool:
  """True after `make gpu-compiler`."""
  return (_PLUGIN / 'jax_plugins').exists()


def prepare() -> None:
  """Readies this process, before JAX has its devices, to compile for a GPU."""
  sys.path.append(str(_PLUGIN))
  os.environ['XLA_FLAGS'] = results.xla_flags('--xla_gpu_autotune_level=0')
  jax.config.update('jax_platforms', 'cpu')


def gpu() -> jax.Device:
  """The device to compile for."""
  return topologies.get_topology_desc(
    platform='cuda', target_config=_H200, topology='1x1x1'
  ).devices[0]


def describe(compiled: jax.stages.Compiled) -> dict[str, object]:
  """The kernels of a step, which is the body of the program's loop.

  Returns:
    `kernels`, the number of each kind; and `convolutions`, lists of cuDNN's
    function (`none` if XLA has a kernel of its own), the result's shape, the
    window's sides, and the model's layer.
  """
  kernels, convolutions = collections.Counter(), []
  blocks = dict(
    (block.split(' ', 1)[0].lstrip('%'), block)
    for block in re.split(r'\n(?=%|ENTRY)', compiled.as_text())
  )
  (body,) = re.findall(r' while\(.*?body=%([\w.-]+)', compiled.as_text())
  for line in blocks[body].splitlines():
    kind = re.search(r' (fusion|custom-call|copy|call|convolution)\(', line)
    if not kind:
      continue
    kernels[kind[1]] += 1
    function = re.search(r'"__cudnn\$conv(\w+)"', line)
    if function or kind[1] == 'convolution':
      window = re.search(r'window={size=(\S+?)[ }]', line)
      name = re.search(r'op_name="([^"]*)"', line)
      convolutions.append(
        [
          function[1] if function else 'none',
          re.search(r'= \(?(\w+\[[\d,]*\])', line)[1],
          [int(side) for side in window[1].split('x')],
          '/'.join(name[1].split('/')[3:-1]),
        ]
      )
  return {'kernels': dict(kernels), 'convolutions': convolutions}


def _table(row) -> str:
  title = (
    f'Batch {row["batch_size"]}, {row["dtype"]}: '
    f'{sum(row["kernels"].values())} kernels a step, of which '
    f'{len(row["convolutions"])} are convolutions'
  )
  lines = [
    [name, function, shape, '×'.join(map(str, window))]
    for function, shape, window, name in row['convolutions']
  ]
  header = ['layer', "cuDNN's function", 'result', 'window']
  return f'{title}\n\n{results.table(header, lines)}'


if __name__ == '__main__':
  main()
