"""Measures a trained model on a split, and writes numbers, figures, a report.

  python evaluate.py --workdir=logs/celeba

Every image of the split counts once, on all devices of this machine. The
results, by default in WORKDIR/evaluation/SPLIT_STEP (and the settings that are
not the default ones), are metrics.json with units, report.html for a browser,
and its figures as PNG.
"""

import datetime

from absl import flags
import jax
import numpy as np

from evaluation import measure, output
import input_pipeline
from runs import command_line, run_flags
from vae import conditioning

flags.adopt_module_key_flags(run_flags)
flags.adopt_module_key_flags(command_line)
_METRICS = flags.DEFINE_list(
  'metrics',
  None,
  f'Some of {",".join(measure.GROUPS)}, or evaluators of your own: modules on '
  'PYTHONPATH with evaluate(context, results). By default all that can be had.',
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
  'downloaded once and kept in ~/.cache/vae.',
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 256, 'Global, over all devices.', lower_bound=1
)


def main() -> None:
  """Measures a run's checkpoint and writes the results."""
  settings = measure.Settings(
    groups=tuple(_METRICS.value or measure.GROUPS),
    num_importance_samples=_IMPORTANCE_SAMPLES.value,
    batch_size=_BATCH_SIZE.value,
    seed=run_flags.SEED.value,
    inception_weights=_INCEPTION_WEIGHTS.value,
    required=_METRICS.value is not None,
  )
  for name in settings.groups:
    measure.find(name)
  trained = run_flags.restore()
  folder = run_flags.output('evaluation', _folder_name(trained.step))

  if trained.config.data.cache == 'device':
    # The device may be another's, and each image goes to it once.
    trained.config.data.cache = 'host'
  split_name = run_flags.SPLIT.value
  data = input_pipeline.load(trained.config, (split_name,))
  run_flags.check_data(trained.config, data)
  split = getattr(data, split_name)
  print(
    f'Measuring {run_flags.workdir()}, checkpoint {trained.step:,}, on the '
    f'{split.num_examples:,} {split_name} images.',
    flush=True,
  )
  facts = {
    'workdir': str(run_flags.workdir()),
    'checkpoint': run_flags.CHECKPOINT.value,
    'step': trained.step,
    'split': split_name,
    'num_images': split.num_examples,
    'image_shape': list(split.image_shape),
    'seed': settings.seed,
    'importance_samples': settings.num_importance_samples,
    'beta': trained.config.objective.get('beta'),
    'latent_dim': int(np.prod(trained.latent_shape)),
    'likelihood': trained.config.model.get('likelihood'),
    'jax': jax.__version__,
    'device': jax.devices()[0].device_kind,
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  first = np.arange(min(32, split.num_examples))
  originals = next(conditioning.batches(trained.config, split, first, 32))
  results = measure.Measurements()
  try:
    measure.measure(trained, data, split_name, settings, results)
    output.write(folder, facts, results, trained, originals)
  except BaseException:
    if results.metrics:  # Hours of work, perhaps.
      partial = folder / output.PARTIAL
      partial.write_text(output.as_json(facts, results))
      print(f'\nThe metrics measured so far are in {partial}.', flush=True)
    raise
  print(f'\n{output.as_text(results)}')
  print(f'  {folder / output.METRICS}')
  print(f'  {folder / output.PAGE}')


def _folder_name(step: int) -> str:
  """A name for each set of settings, so that no results replace others."""
  parts = [run_flags.SPLIT.value, str(step), *(_METRICS.value or ())]
  if _IMPORTANCE_SAMPLES.value != _IMPORTANCE_SAMPLES.default:
    parts.append(f'k{_IMPORTANCE_SAMPLES.value}')
  if run_flags.SEED.value:
    parts.append(f'seed{run_flags.SEED.value}')
  if run_flags.DATA_DIR.value is not None:
    parts.append(run_flags.in_name(run_flags.DATA_DIR))
  return '_'.join(parts)


if __name__ == '__main__':
  command_line.run(main)
