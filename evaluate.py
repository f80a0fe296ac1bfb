"""Measures a trained model on a split, and writes numbers, figures, a report.

  python evaluate.py --workdir=logs/celeba

Every image of the split counts once, on all devices of this machine. What is
written, by default into WORKDIR/evaluation/SPLIT_STEP (and the settings that
are not the default ones): metrics.json with units, report.html to be opened in
a browser, and its figures as PNG.
"""

import datetime

from absl import flags
import jax
import numpy as np

from evaluation import inception_weights
from evaluation import measure
from evaluation import output
from evaluation.measurements import Measurements
from runs import command_line
from runs import run_flags
from vae import splits
from vae.errors import UserError
from vae.loading import TrainedVAE

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
  groups = tuple(_METRICS.value or measure.GROUPS)
  unknown = [group for group in groups if group not in measure.GROUPS]
  if unknown:
    raise UserError(
      f'--metrics: there is no {unknown[0]}; there are '
      f'{", ".join(measure.GROUPS)}.'
    )
  trained = run_flags.restore()
  _check_parameters(trained)
  folder = run_flags.output('evaluation', _folder_name(trained.step))

  import input_pipeline  # TensorFlow takes seconds; mistakes are told before.

  if trained.config.data.cache == 'device':
    # Which may be another's; and images go to it once.
    trained.config.data.cache = 'host'
  data = input_pipeline.load(trained.config)
  run_flags.check_data(data)
  _check_split(data, groups)
  inception, notes = None, []
  if 'fid' in groups:
    try:
      inception = inception_weights.load(_INCEPTION_WEIGHTS.value)
    except UserError as error:
      # A mistake, not a lack, or all that was asked for.
      if _INCEPTION_WEIGHTS.value or groups == ('fid',):
        raise
      notes.append(f'FID and KID: {error}')

  split = getattr(data, run_flags.SPLIT.value)
  facts = _facts(trained, split)
  results = Measurements(split.num_examples, notes=notes)
  print(
    f'Measuring {run_flags.workdir()}, checkpoint {trained.step:,}, on the '
    f'{split.num_examples:,} {run_flags.SPLIT.value} images.',
    flush=True,
  )
  settings = measure.Settings(
    groups=groups,
    num_importance_samples=_IMPORTANCE_SAMPLES.value,
    batch_size=_BATCH_SIZE.value,
    seed=run_flags.SEED.value,
    inception_variables=inception,
  )
  try:
    measure.measure(trained, data, run_flags.SPLIT.value, settings, results)
  except BaseException:
    if results.metrics:  # Hours of work, perhaps.
      partial = output.write_partial(folder, facts, results)
      print(f'\nWhat was measured until now is in {partial}.', flush=True)
    raise
  originals = next(split.batches(np.arange(min(32, split.num_examples)), 32))
  output.write(folder, facts, results, trained, originals, _validation_path())
  print()
  print(output.as_text(results))
  print(f'  {folder / output.METRICS}')
  print(f'  {folder / output.PAGE}')


def _folder_name(step: int) -> str:
  """Another for other settings, so that none takes the place of another."""
  parts = [run_flags.SPLIT.value, str(step)]
  if _METRICS.value:
    parts += _METRICS.value
  if _IMPORTANCE_SAMPLES.value != _IMPORTANCE_SAMPLES.default:
    parts.append(f'k{_IMPORTANCE_SAMPLES.value}')
  if run_flags.SEED.value:
    parts.append(f'seed{run_flags.SEED.value}')
  if run_flags.DATA_DIR.value is not None:
    parts.append(run_flags.in_name(run_flags.DATA_DIR))
  return '_'.join(parts)


def _check_parameters(trained: TrainedVAE) -> None:
  leaves = jax.tree.leaves(trained.variables)
  if not all(bool(jax.numpy.isfinite(leaf).all()) for leaf in leaves):
    raise UserError(
      f'checkpoint {trained.step} holds parameters that are not finite: the '
      'run has diverged. Choose another --checkpoint.'
    )


def _check_split(data: splits.DataSet, groups: tuple[str, ...]) -> None:
  """Tells what cannot be measured before what takes long."""
  name = run_flags.SPLIT.value
  split = getattr(data, name)
  if split.num_examples < 2:
    raise UserError(
      f'the {name} split has one image; what varies over images needs at '
      'least 2. Choose another --split.'
    )
  if 'labels' not in groups:
    return
  # Read now, as their file may be wrong.
  labels = split.labels(), getattr(data, measure.fitted_split(name)).labels()
  if _METRICS.value and None in labels:
    raise UserError(
      f'--metrics=labels: the {name} split has no labels; leave labels out.'
    )


def _facts(trained: TrainedVAE, split: splits.Split) -> dict[str, object]:
  """What was measured, and on what."""
  return {
    'workdir': str(run_flags.workdir()),
    'checkpoint': run_flags.CHECKPOINT.value,
    'step': trained.step,
    'split': run_flags.SPLIT.value,
    'num_images': split.num_examples,
    'image_shape': list(split.image_shape),
    'seed': run_flags.SEED.value,
    'importance_samples': _IMPORTANCE_SAMPLES.value,
    'beta': trained.config.objective.beta,
    'latent_dim': int(np.prod(trained.latent_shape)),
    'likelihood': trained.config.model.likelihood,
    'jax': jax.__version__,
    'device': jax.devices()[0].device_kind,
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def _validation_path() -> np.ndarray:
  """(rate, distortion) of each of the run's validations, [n, 2]."""
  from runs.metric_writer import read  # With TensorFlow, through clu.

  rows = [row for row in read(run_flags.workdir()) if 'val/kl' in row]
  points = [(row['val/kl'], row['val/distortion']) for row in rows]
  return np.array(points).reshape(-1, 2)


if __name__ == '__main__':
  command_line.run(main)
