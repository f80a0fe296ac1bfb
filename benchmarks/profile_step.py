"""The kernels of a training step, by their time.

  python benchmarks/profile_step.py --output=profile.json

`jax.profiler` traces one compiled dispatch of the network of configs/celeba.py.
The trace is reduced to a table of the kernels and, of the largest batch, kept
beside the JSON as .xplane.pb, for `xprof`. In a trace XLA sends a GPU its
kernels one by one, not as graphs.
"""

import argparse
import collections
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from benchmarks import jax_vae, results

# Operations that enclose others of the same line.
_ENCLOSING = ('while', 'call', 'conditional')

# Larger traces are not kept.
_MAX_BYTES = 16_000_000


def main() -> None:
  """Profiles each batch size; prints tables, and writes JSON."""
  args = _arguments()
  content = results.begin(args) | {'profiles': {}}
  with tempfile.TemporaryDirectory(prefix='profile_step_') as folder:
    for batch_size in sorted(args.batch_sizes):
      path = _trace(args, batch_size, f'{folder}/{batch_size}')
      profile = jax.profiler.ProfileData.from_file(str(path))
      summary = summarize(profile, args.steps, args.rows)
      content['profiles'][batch_size] = summary
      print(_table(batch_size, args.dtype, summary))
    results.write(args.output, content)
    if args.output and path.stat().st_size < _MAX_BYTES:
      shutil.copy(path, pathlib.Path(args.output).with_suffix('.xplane.pb'))


def _arguments() -> argparse.Namespace:
  parser = results.make_parser(__doc__)
  parser.add_argument(
    '--batch_sizes',
    type=results.numbers,
    default=[64, 1024],
    help='separated by commas (64,1024)',
  )
  parser.add_argument(
    '--dtype', default='bfloat16', help='float32, bfloat16 (bfloat16)'
  )
  parser.add_argument('--steps', type=int, default=10, help='in a trace (10)')
  parser.add_argument('--rows', type=int, default=25, help='of a table (25)')
  return results.parse(parser, batch_sizes=[8], steps=2)


def _trace(
  args: argparse.Namespace, batch_size: int, folder: str
) -> pathlib.Path:
  """Traces one dispatch; returns the path of the trace."""
  config = jax_vae.make_config(args.quick)
  config.model.dtype = args.dtype
  config.train.batch_size = batch_size
  contender = jax_vae.training('', config, args.steps)
  for _ in range(2):  # The first compiles.
    contender.run(args.steps)
  with jax.profiler.trace(folder):
    contender.run(args.steps)
  (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
  return path


def summarize(
  profile: jax.profiler.ProfileData, num_steps: int, num_rows: int
) -> dict[str, object]:
  """Sums a trace by the device's kernels.

  Args:
    profile: of training steps alone.
    num_steps: in the trace.
    num_rows: kernels to keep, the longest.

  Returns:
    `milliseconds_per_step`, from the first kernel's start to the last one's
    end; `busy`, the share of it in which a kernel runs; `num_kernels` of a
    step; and `kernels`, each with its HLO operation, milliseconds and calls per
    step, and share of all kernels' time.
  """
  milliseconds, calls = collections.Counter(), collections.Counter()
  intervals = []
  for name, operation, start, duration in _events(profile):
    milliseconds[name, operation] += duration / 1e6 / num_steps
    calls[name, operation] += 1
    intervals.append((start, start + duration))
  if not intervals:
    sys.exit('error: the trace has no kernel of a device.')
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
  """Yields name, HLO operation, start and duration in ns of each kernel."""
  planes = [p for p in profile.planes if p.name.startswith('/device:')]
  planes = planes or [p for p in profile.planes if p.name == '/host:CPU']
  for plane in planes:
    lines = list(plane.lines)
    # A GPU's kernels are on its streams, a TPU's on a line of that name; other
    # lines sum them up.
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


def _table(batch_size: int, dtype: str, summary: dict[str, object]) -> str:
  header = ['kernel', 'operation', 'ms per step', 'calls', 'share']
  lines = [
    [
      # C++ names fill a line each.
      f'`{row["kernel"][:60]}`',
      row['operation'],
      f'{row["milliseconds"]:.4f}',
      f'{row["calls"]:g}',
      f'{row["share"]:.1%}',
    ]
    for row in summary['kernels']
  ]
  return (
    f'Batch {batch_size}, {dtype}: {summary["milliseconds_per_step"]:.3f} ms '
    f'per step; {summary["num_kernels"]:.0f} kernels run for '
    f'{summary["busy"]:.0%} of it.\n\n{results.table(header, lines)}\n'
  )


if __name__ == '__main__':
  main()
