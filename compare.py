"""Compares trained runs on the same images, or sweeps, in one page.

  python compare.py --workdir=logs/celeba,logs/beta4

Each run is measured on every image of the split. The page has their metrics
and, image by image, the differences to the first with standard errors,
reconstructions of the same images, samples of the same z, the curves of their
training, and the settings in which they differ.

For sweeps, which have measured their points, the page has the curves of all and
the differences of the points with the same settings.
"""

import hashlib
import math

from absl import flags
from etils import epath
import numpy as np

from evaluation import comparison, measure
import input_pipeline
from runs import command_line, run_flags, workdirs
from sweeps import TABLE
from vae import (
  conditioning,
  devices,
  loading,
  numerics,
  paths,
  splits,
  steps,
)
from vae.errors import UserError

for _flag in ('workdir', 'checkpoint', 'split', 'data_dir', 'output', 'seed'):
  flags.declare_key_flag(_flag)

_PAGE = 'comparison.html'


def main() -> None:
  """Measures the runs, prints the table, and writes the page."""
  names = run_flags.split_names(command_line.WORKDIR.value or '')
  if len(names) < 2:
    raise UserError(
      'name at least two runs, or two sweeps, with --workdir=FOLDER,FOLDER.'
    )
  folders = [paths.expand(name) for name in names]
  if any((folder / TABLE).exists() for folder in folders):
    _compare_sweeps(names, folders)
    return
  devices.check()
  default = folders[0] / 'comparisons'
  default /= _in_name(folders, run_flags.SPLIT.value)
  output = paths.expand(run_flags.OUTPUT.value or default)
  workdirs.check_writable(output, '--output')
  trained = [_restore(folder) for folder in folders]
  # All mistakes before the first measurement.
  data = [_load(f, model) for f, model in zip(folders, trained, strict=True)]
  _check_same(folders, trained, data)
  runs = [
    _measure(*run)
    for run in zip(_distinct(names), folders, trained, data, strict=True)
  ]
  print(f'\n{_table([run.name for run in runs], comparison.differences(runs))}')
  comparison.write(output / _PAGE, runs, run_flags.SPLIT.value)
  print(f'  {output / _PAGE}')


def _compare_sweeps(names: list[str], folders: list[epath.Path]) -> None:
  for folder in folders:
    if not (folder / TABLE).exists():
      raise UserError(
        f'{folder} is not a sweep with a {TABLE}; runs are compared with runs, '
        'and sweeps with sweeps.'
      )
  for name in ('split', 'checkpoint', 'data_dir', 'seed'):
    if flags.FLAGS[name].present:
      raise UserError(
        f'--{name} applies to runs only; sweeps are compared as they were '
        'measured.'
      )
  default = folders[0] / 'comparisons' / _in_name(folders, 'sweeps')
  output = paths.expand(run_flags.OUTPUT.value or default)
  workdirs.check_writable(output, '--output')
  # It imports pandas and Optuna, which comparisons of runs do not need.
  from sweeps import side_by_side

  read = zip(_distinct(names), folders, strict=True)
  sweeps = [side_by_side.Sweep.read(name, folder) for name, folder in read]
  side_by_side.check(sweeps)
  count, rows = side_by_side.differences(sweeps)
  print(f'{count} points have the same varied settings in all sweeps.')
  if rows:
    print(_table([sweep.name for sweep in sweeps], rows))
  side_by_side.write(output / _PAGE, sweeps)
  print(f'  {output / _PAGE}')


def _load(folder: epath.Path, trained: loading.TrainedVAE) -> splits.DataSet:
  config = trained.config
  data = input_pipeline.load(config, (run_flags.SPLIT.value,))
  if run_flags.DATA_DIR.value is None:
    identity = data.identity() | conditioning.identity(config, data)
    workdirs.check_data(folder, identity)
  return data


def _check_same(folders, trained, data) -> None:
  """Raises UserError unless the split has the same images for all runs."""
  first = None
  for folder, model, loaded in zip(folders, trained, data, strict=True):
    split, settings = getattr(loaded, run_flags.SPLIT.value), model.config.data
    seen = {
      'images': split.num_examples,
      'shape': split.image_shape,
      'names': split.names_digest(),
      'crop_size': settings.crop_size,
      'binarize': settings.get('binarize', 'none'),
    }
    first = first or seen
    changed = [
      f'{name} {seen[name]} instead of {first[name]}'
      for name in seen
      if seen[name] != first[name]
    ]
    if changed:
      raise UserError(
        f'{folder} has other {run_flags.SPLIT.value} images than {folders[0]}: '
        f'{", ".join(changed)}.'
      )


def _measure(
  name: str,
  folder: epath.Path,
  trained: loading.TrainedVAE,
  data: splits.DataSet,
) -> comparison.Run:
  print(f'{name}, step {trained.step:,}', flush=True)
  split = getattr(data, run_flags.SPLIT.value)
  settings = measure.Settings(seed=run_flags.SEED.value)
  context = measure.Context(trained, data, run_flags.SPLIT.value, settings)
  with numerics.precise(steps.float_dtype(trained.model)):
    dimensions = math.prod(split.image_shape)
    values = comparison.of_images(context.images, context.draws_z, dimensions)
  count = comparison.NUM_IMAGES
  first = np.arange(min(count, split.num_examples))
  originals = next(conditioning.batches(trained.config, split, first, count))
  return comparison.Run(name, folder, trained, values, originals)


def _table(names: list[str], differences: list[tuple[str, ...]]) -> str:
  rows = [('', *names, '', ''), *differences]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      f'{cell:>{width}}' for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]
  lines.append(f'Each further column is the difference from {names[0]}.')
  return '\n'.join(lines)


def _in_name(folders: list[epath.Path], kind: str) -> str:
  """A name for each set of runs and settings, so that none replaces others."""
  given = [*map(str, folders), run_flags.CHECKPOINT.value]
  given += [run_flags.SEED.value, run_flags.DATA_DIR.value]
  digest = hashlib.sha256(repr(given).encode()).hexdigest()[:8]
  others = '_'.join(folder.name for folder in folders[1:])
  return f'{kind}_{others[:60]}_{digest}'


def _restore(folder) -> loading.TrainedVAE:
  config = workdirs.load_config(folder, run_flags.DATA_DIR.value)
  if config.data.cache == 'device':
    config.data.cache = 'host'  # Each image goes to the device once.
  return loading.restore(config, folder, run_flags.CHECKPOINT.value)


def _distinct(names: list[str]) -> list[str]:
  """The last parts of the names, or all of them if these are the same."""
  short = [paths.expand(name).name for name in names]
  return short if len(set(short)) == len(short) else names


if __name__ == '__main__':
  command_line.run(main)
