"""Measures a trained model on a split, and writes numbers, figures, a report.

  python evaluate.py --workdir=logs/celeba

Every image of the split counts once, on all devices of this machine. What is
written, by default into WORKDIR/evaluation/SPLIT_STEP: metrics.json with
units, report.html to be opened in a browser, and its figures as PNG.
"""

import datetime

from absl import flags
from etils import epath
import jax
import numpy as np

import command_line
from evaluation import inception_weights
from evaluation import measure
from evaluation import output
import run_flags
from vae.errors import UserError

flags.adopt_module_key_flags(run_flags)
flags.adopt_module_key_flags(command_line)
_METRICS = flags.DEFINE_list(
  'metrics',
  None,
  f'Some of {",".join(measure.GROUPS)}. By default all that can be had.',
)
_IMPORTANCE_SAMPLES = flags.DEFINE_integer(
  'importance_samples',
  100,
  'K of the importance-weighted bound L_K; the tighter the larger, and as much '
  'slower.',
  lower_bound=1,
)
_INCEPTION_WEIGHTS = flags.DEFINE_string(
  'inception_weights',
  None,
  'The file inception-2015-12-05.tgz, for FID and KID. By default it is '
  'fetched once and kept in ~/.cache/vae.',
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 256, 'Global, over all devices.', lower_bound=1
)


def main() -> None:
  """Checks the flags, measures, writes."""
  asked_for = _METRICS.value is not None
  groups = tuple(_METRICS.value or measure.GROUPS)
  unknown = [group for group in groups if group not in measure.GROUPS]
  if unknown:
    raise UserError(
      f'--metrics: there is no {unknown[0]}; there are '
      f'{", ".join(measure.GROUPS)}.'
    )
  trained = run_flags.restore()
  config, split_name = trained.config, run_flags.SPLIT.value
  workdir = run_flags.workdir()
  folder = run_flags.output('evaluation', f'{split_name}_{trained.step}')

  notes, inception = [], None
  if 'fid' in groups:
    try:
      inception = inception_weights.load(_INCEPTION_WEIGHTS.value)
    except UserError as error:
      if _INCEPTION_WEIGHTS.value:  # A mistake, not a lack.
        raise
      notes.append(f'FID and KID: {error}')

  import input_pipeline  # TensorFlow takes seconds; mistakes are told before.

  data = input_pipeline.load(config)
  split = getattr(data, split_name)
  if asked_for and 'labels' in groups and split.labels() is None:
    raise UserError(
      f'--metrics=labels: the {split_name} split of '
      f'{config.data.dir or config.data.source} has no labels; leave labels '
      'out.'
    )
  if split.num_examples < 2:
    raise UserError(
      f'the {split_name} split has one image; what varies over images needs at '
      'least 2. Choose another --split.'
    )
  print(
    f'Measuring {workdir}, checkpoint {trained.step:,}, on the '
    f'{split.num_examples:,} {split_name} images.',
    flush=True,
  )
  results = measure.measure(
    trained,
    data,
    split_name,
    measure.Settings(
      groups=groups,
      num_importance_samples=_IMPORTANCE_SAMPLES.value,
      batch_size=_BATCH_SIZE.value,
      seed=run_flags.SEED.value,
      inception_variables=inception,
    ),
  )
  results.notes.extend(notes)
  facts = {
    'workdir': str(workdir),
    'checkpoint': run_flags.CHECKPOINT.value,
    'step': trained.step,
    'split': split_name,
    'num_images': split.num_examples,
    'image_shape': list(split.image_shape),
    'seed': run_flags.SEED.value,
    'beta': config.objective.beta,
    'latent_dim': config.model.latent_dim,
    'likelihood': config.model.likelihood,
    'jax': jax.__version__,
    'device': jax.devices()[0].device_kind,
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  pairs = np.arange(min(32, split.num_examples))
  originals = next(split.batches(pairs, len(pairs)))
  output.write(
    folder, facts, results, trained, originals, _validation_path(workdir)
  )
  print()
  print(output.as_text(results))
  print(f'  {folder / output.METRICS}')
  print(f'  {folder / output.PAGE}')


def _validation_path(workdir: epath.Path) -> np.ndarray:
  """(rate, distortion) of each of the run's validations, [n, 2]."""
  from metric_writer import read  # With TensorFlow, through clu.

  rows = [row for row in read(workdir) if 'val/kl' in row]
  points = [(row['val/kl'], row['val/distortion']) for row in rows]
  return np.array(points).reshape(-1, 2)


if __name__ == '__main__':
  command_line.run(main)
