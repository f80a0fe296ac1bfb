"""Compares trained runs on the same images, in one page.

  python compare.py --workdir=logs/celeba,logs/beta4

Each run is measured on every image of the split. The page has their metrics
and, image by image, the differences to the first with standard errors,
reconstructions of the same images, samples of the same z, the curves of their
training, and the settings in which they differ.
"""

import hashlib

from absl import flags
from etils import epath
import numpy as np

from evaluation import comparison, measure
import input_pipeline
from runs import command_line, run_flags, schema, workdirs
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

# Images in a row of pictures.
_IMAGES = 12


def main() -> None:
  """Measures the runs, prints the table, and writes the page."""
  names = (command_line.WORKDIR.value or '').split(',')
  if len(names) < 2:
    raise UserError('name at least two runs with --workdir=FOLDER,FOLDER.')
  devices.check()
  folders = [paths.expand(name) for name in names]
  default = folders[0] / 'comparisons' / _in_name(folders)
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
  print(
    f'\n{_table(runs)}\nThe other columns are differences from {runs[0].name}.'
  )
  comparison.write(output / _PAGE, runs, run_flags.SPLIT.value)
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
    values = comparison.of_images(context.images, context.draws_z)
  first = np.arange(min(_IMAGES, split.num_examples))
  originals = next(conditioning.batches(trained.config, split, first, _IMAGES))
  return comparison.Run(name, folder, trained, values, originals)


def _table(runs: list[comparison.Run]) -> str:
  header = ('', *(run.name for run in runs), '', '')
  rows = [header, *comparison.differences(runs)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(
      f'{cell:>{width}}' for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  )


def _in_name(folders: list[epath.Path]) -> str:
  """A name for each set of runs and settings, so that none replaces others."""
  given = [*map(str, folders), run_flags.CHECKPOINT.value]
  given += [run_flags.SEED.value, run_flags.DATA_DIR.value]
  digest = hashlib.sha256(repr(given).encode()).hexdigest()[:8]
  others = '_'.join(folder.name for folder in folders[1:])
  return f'{run_flags.SPLIT.value}_{others[:60]}_{digest}'


def _restore(folder) -> loading.TrainedVAE:
  config = workdirs.load_config(folder)
  if run_flags.DATA_DIR.value is not None:
    config.data.dir = run_flags.DATA_DIR.value
    schema.validate(config)
  if config.data.cache == 'device':
    config.data.cache = 'host'  # Each image goes to the device once.
  return loading.restore(config, folder, run_flags.CHECKPOINT.value)


def _distinct(names: list[str]) -> list[str]:
  """The last parts of the names, or all of them if these are the same."""
  short = [paths.expand(name).name for name in names]
  return short if len(set(short)) == len(short) else names


if __name__ == '__main__':
  command_line.run(main)
