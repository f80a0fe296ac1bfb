"""The kernels of a training step, by the time that they take.

  python benchmarks/profile_step.py --output=profile.json

One dispatch of the network of configs/celeba.py is traced by `jax.profiler`,
compiled before. The trace is reduced to a table of the kernels and, of the
largest batch, kept beside the JSON as .xplane.pb, which `xprof` shows. While a
trace is taken XLA sends a GPU its kernels one by one, not as graphs.
"""

import argparse
import collections
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from benchmarks import jax_vae
from benchmarks import results
from configs import celeba
from vae import splits

# What encloses other operations of the same line.
_ENCLOSING = ('while', 'call', 'conditional')
# A larger trace is not kept.
_MAX_BYTES = 16_000_000


def main() -> None:
  """Profiles each batch size; prints tables, and writes JSON."""
  args = _arguments()
  results.check_devices()
  profiles = {}
  with tempfile.TemporaryDirectory(prefix='profile_step_') as folder:
    for batch_size in args.batch_sizes:
      path = _trace(args, batch_size, f'{folder}/{batch_size}')
      profile = jax.profiler.ProfileData.from_file(str(path))
      profiles[batch_size] = summarize(profile, args.steps, args.rows)
    facts = results.machine()
    content = {'machine': facts, 'settings': vars(args), 'profiles': profiles}
    print(results.describe(facts), tables(content), sep='\n\n')
    results.write(args.output, content)
    if args.output and path.stat().st_size < _MAX_BYTES:
      shutil.copy(path, pathlib.Path(args.output).with_suffix('.xplane.pb'))


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--batch_sizes',
    type=lambda text: sorted(int(number) for number in text.split(',')),
    default=[64, 1024],
    help='separated by commas (64,1024)',
  )
  parser.add_argument(
    '--dtype', default='bfloat16', help='float32, bfloat16 (bfloat16)'
  )
  parser.add_argument('--steps', type=int, default=10, help='to trace (10)')
  parser.add_argument('--rows', type=int, default=25, help='of a table (25)')
  parser.add_argument('--output', help='JSON file for the tables')
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a tiny network, batch 8, two steps: whether it runs at all',
  )
  args = parser.parse_args()
  if args.quick:
    results.compile_quickly()
    args.batch_sizes, args.steps = [8], 2
  return args


def _trace(
  args: argparse.Namespace, batch_size: int, folder: str
) -> pathlib.Path:
  """Traces one dispatch; returns the trace's file."""
  config = celeba.get_config()
  config.model.dtype = args.dtype
  if args.quick:
    config.data.image_size = 16
    config.model.hidden_channels = (4, 8)
  pixels = jax_vae.random_images(config, batch_size, args.steps)
  split = splits.DeviceSplit(splits.ArraySplit(pixels))
  contender = jax_vae.training_steps('', config, split, batch_size, args.steps)
  # The first compiles; a second shows that no more is compiled.
  for _ in range(2):
    contender.run(args.steps)
  with jax.profiler.trace(folder):
    contender.run(args.steps)
  (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
  return path


def summarize(
  profile: jax.profiler.ProfileData, num_steps: int, num_rows: int
) -> dict[str, object]:
  """What a trace says of the device's kernels.

  Args:
    profile: of training steps alone.
    num_steps: how many.
    num_rows: kernels to keep.

  Returns:
    `milliseconds_per_step`, from the first kernel's start to the last one's
    end; `busy`, the share of it in which a kernel runs; `num_kernels` of a
    step; and `kernels`, those that take longest, with the HLO operation that
    each is of, milliseconds and calls per step, and share of all kernels' time.
  """
  milliseconds, calls = collections.Counter(), collections.Counter()
  intervals = []
  for name, operation, start, duration in _events(profile):
    milliseconds[name, operation] += duration / 1e6 / num_steps
    calls[name, operation] += 1
    intervals.append((start, start + duration))
  if not intervals:
    raise SystemExit('profile_step: the trace has no kernel of a device.')
  total = sum(milliseconds.values())
  start = min(start for start, _ in intervals)
  end = max(end for _, end in intervals)
  return {
    'milliseconds_per_step': (end - start) / 1e6 / num_steps,
    'busy': _covered(intervals) / (end - start),
    'num_kernels': len(intervals) / num_steps,
    'kernels': [
      {
        'kernel': name,
        'operation': operation,
        'milliseconds': value,
        'calls': calls[name, operation] / num_steps,
        'share': value / total,
      }
      for (name, operation), value in milliseconds.most_common(num_rows)
    ],
  }


def _events(profile: jax.profiler.ProfileData):
  """Name, HLO operation, start and duration in ns of each kernel."""
  planes = [p for p in profile.planes if p.name.startswith('/device:')]
  planes = planes or [p for p in profile.planes if p.name == '/host:CPU']
  for plane in planes:
    lines = list(plane.lines)
    # A GPU's kernels are on its streams, a TPU's operations on a line of that
    # name; the other lines sum these up.
    own = [li for li in lines if li.name.startswith(('Stream', 'XLA Ops'))]
    for line in own or lines:
      for event in line.events:
        operation = str(dict(event.stats).get('hlo_op', ''))
        is_kernel = line.name.startswith('Stream') or (
          operation and not operation.startswith(_ENCLOSING)
        )
        if is_kernel:
          yield event.name, operation, event.start_ns, event.duration_ns


def _covered(intervals: list[tuple[float, float]]) -> float:
  """Length of the union of (start, end)."""
  covered, reached = 0.0, -float('inf')
  for start, end in sorted(intervals):
    covered += max(0.0, end - max(start, reached))
    reached = max(reached, end)
  return covered


def tables(content: dict[str, object]) -> str:
  """Markdown of what was written as JSON, a table for each batch size."""
  dtype, parts = content['settings']['dtype'], []
  for batch_size, profile in content['profiles'].items():
    header = ['kernel', 'of', 'ms per step', 'calls', 'share']
    lines = [
      [
        # C++ names fill a line each.
        f'`{row["kernel"][:60]}`',
        row['operation'],
        f'{row["milliseconds"]:.4f}',
        f'{row["calls"]:g}',
        f'{row["share"]:.1%}',
      ]
      for row in profile['kernels']
    ]
    parts.append(
      f'Batch {batch_size}, {dtype}: {profile["milliseconds_per_step"]:.3f} ms '
      f'a step, of which kernels run for {profile["busy"]:.0%}, '
      f'{profile["num_kernels"]:.0f} of them.\n\n{results.table(header, lines)}'
    )
  return '\n\n'.join(parts)


if __name__ == '__main__':
  main()
