"""The tables of README.md, made of what accelerator.sh left in a folder.

  python benchmarks/accelerator_tables.py FOLDER

Prints Markdown. What a part did not measure is said in its place, with how the
part ended.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import accelerator_checks
from benchmarks import command_buffers
from benchmarks import loop_summary
from benchmarks import profile_step
from benchmarks import results

PARTS = (
  'checks',
  'train_step',
  'end_to_end',
  'command_buffers',
  'population',
  'profile',
)
_OURS = 'this codebase, '


def main() -> None:
  """Prints the tables of a folder."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path, help='of accelerator.sh')
  folder = parser.parse_args().folder
  if not (folder / 'log.txt').exists():
    parser.error(f'{folder} has no log.txt, which accelerator.sh writes')
  print(tables(folder))


def tables(folder: pathlib.Path) -> str:
  """All tables of a folder, in Markdown."""
  outcomes = _outcomes(folder)
  contents = {part: _content(folder / f'{part}.json') for part in PARTS}
  machines = [c['machine'] for c in contents.values() if c and c['machine']]
  sections = [
    results.describe(machines[0]) if machines else 'The machine is not known.',
    results.table(['part', 'how it ended'], list(outcomes.items())),
    f'## What was asked of it\n\n{_goals(contents, outcomes)}',
  ]
  for part, title, table in (
    ('checks', 'What it computes', accelerator_checks.tables),
    ('train_step', 'The training step', _train_step),
    ('end_to_end', 'The whole loop', _loop),
    ('command_buffers', 'Command buffers', command_buffers.table),
    ('population', 'Populations', _population),
    ('profile', 'The kernels of a step', profile_step.tables),
  ):
    text = _made(table, contents[part]) or f'Not measured: {outcomes[part]}.'
    sections.append(f'## {title}\n\n{text}')
  return '\n\n'.join(sections)


def _outcomes(folder: pathlib.Path) -> dict[str, str]:
  """How each part ended, the last time that it was run."""
  log = (folder / 'log.txt').read_text(errors='replace')
  found = re.findall(r'^=== (\w+): (.*)$', log, re.MULTILINE)
  return dict.fromkeys(PARTS, 'not run') | {
    part: outcome for part, outcome in found if part in PARTS
  }


def _content(path: pathlib.Path) -> dict[str, Any] | None:
  return json.loads(path.read_text()) if path.exists() else None


def _made(make: Callable[[Any], Any], content: dict[str, Any] | None) -> Any:
  """What is made of a part's content; None if that lacks what it takes."""
  if content is None:
    return None
  try:
    return make(content)
  except (KeyError, IndexError, ValueError):
    # The part ended before it had measured this.
    return None


def _goals(contents, outcomes) -> str:
  rows = []

  def row(where, what, goal, part, make):
    measured = _made(make, contents[part])
    if measured is None:
      measured = f'not measured: {part} {outcomes[part]}'
    rows.append((where, what, goal, measured))

  row(
    'batch 64',
    'the step, against PyTorch eager float32',
    '5',
    'train_step',
    lambda c: _times_as_fast(c, '64', ['PyTorch, eager'], 'float32'),
  )
  for batch_size in ('64', '1024'):
    for dtype in ('float32', 'bfloat16'):
      row(
        f'batch {batch_size}',
        f'the step, against the best PyTorch in {dtype}',
        '1.5',
        'train_step',
        lambda c, b=batch_size, d=dtype: _times_as_fast(
          c, b, _pytorch(c, b), d
        ),
      )
  row(
    'batch 64',
    '8 values of β at once, in the time of one run',
    '≤ 2.5',
    'population',
    lambda c: f'{_runs(c)[8]["time_relative"]:.2f}',
  )
  row(
    'batch 64, float32',
    '100 epochs of 162,770 images, with validation',
    '150 s',
    'end_to_end',
    lambda c: _hundred_epochs(c['modes']['device']),
  )
  for cache, share in loop_summary.TARGET_SHARES.items():
    row(
      f'`{cache}`',
      'devices wait for the host, share of the loop',
      f'< {share:.0%}',
      'end_to_end',
      lambda c, cache=cache: f'{c["modes"][cache]["wait_share"]:.2%}',
    )
  for batch_size in ('1024', '4096'):
    row(
      f'batch {batch_size}',
      'of the memory-bandwidth bound',
      '50 %',
      'train_step',
      lambda c, b=batch_size: _shares_of_bound(c, b),
    )
  return results.table(['where', 'what', 'at least', 'measured'], rows)


def _contenders(content, batch_size: str) -> dict[str, dict[str, Any]]:
  rows = content['batch_sizes'][batch_size]['contenders']
  return {row['name']: row for row in rows}


def _pytorch(content, batch_size: str) -> list[str]:
  names = _contenders(content, batch_size)
  return [name for name in names if name.startswith('PyTorch')]


def _ratio(row: dict[str, Any], dtype: str) -> float:
  """How many times its images/s this codebase has in a dtype."""
  (ratio,) = [
    ratio
    for name, ratio in row['speedup_of'].items()
    if name.startswith(_OURS + dtype)
  ]
  return ratio


def _times_as_fast(
  content, batch_size: str, names: list[str], dtype: str
) -> str:
  """This codebase against the fastest of those of a dtype."""
  rows = _contenders(content, batch_size)
  return '{:.2f}'.format(
    min(_ratio(rows[n], dtype) for n in names if rows[n]['dtype'] == dtype)
  )


def _shares_of_bound(content, batch_size: str) -> str:
  shares = [
    f'{row["dtype"]} {row["of_bandwidth_bound"]["separate"]:.0%}'
    for name, row in _contenders(content, batch_size).items()
    if name.startswith(_OURS)
  ]
  return ', '.join(shares)


def _hundred_epochs(mode: dict[str, Any]) -> str:
  return f'{100 * mode["seconds_per_epoch_at_celebas_size"]:.0f} s'


def _train_step(content) -> str:
  """A row for each contender, a column for each batch size."""
  batch_sizes = list(content['batch_sizes'])
  cells: dict[str, dict[str, str]] = {}
  for batch_size in batch_sizes:
    for name, row in _contenders(content, batch_size).items():
      speed = results.significant(row['images_per_second'])
      own = f'**{speed}**'
      if not name.startswith(_OURS):
        own = f'{speed} ({_ratio(row, row["dtype"]):.2f})'
      cells.setdefault(name, {})[batch_size] = own
    for name in content['batch_sizes'][batch_size]['failed']:
      cells.setdefault(name, {})[batch_size] = 'failed'
  lines = [
    [name, *(of_name.get(b, '') for b in batch_sizes)]
    for name, of_name in cells.items()
  ]
  bandwidth = content['copy_bytes_per_second'] / 1e9
  header = ['images/s (times as fast)', *(f'batch {b}' for b in batch_sizes)]
  bounds = ', '.join(
    f'batch {b}: {_shares_of_bound(content, b)}' for b in batch_sizes
  )
  return (
    f'{results.table(header, lines)}\n\n'
    'In brackets: how many times as fast this codebase is in the same dtype. '
    f'Memory is copied at {bandwidth:,.0f} GB/s; of the bound by that, '
    f'{bounds}.'
  )


def _loop(content) -> str:
  modes = content['modes']
  return '\n\n'.join(
    [
      loop_summary.heading(next(iter(modes.values()))),
      loop_summary.table(modes),
      loop_summary.waits(modes),
    ]
  )


def _runs(content) -> dict[int, dict[str, Any]]:
  return {row['runs']: row for row in content['rows']}


def _population(content) -> str:
  lines = [
    [
      str(count),
      results.significant(row['milliseconds_per_step']),
      f'{row["time_relative"]:.2f}',
      results.significant(row['images_per_second']),
    ]
    for count, row in _runs(content).items()
  ]
  header = ['runs', 'ms per step', 'time of one run', 'images/s']
  return results.table(header, lines)


if __name__ == '__main__':
  main()
