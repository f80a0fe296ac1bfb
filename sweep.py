r"""Trains a run for each combination of settings, and compares them.

  python sweep.py --config=configs/celeba.py --workdir=logs/beta \
    --beta=0.25,0.5,1,2,4,8 --latent_dim=16,32,64,128

A worker trains as many points at a time as it has devices. The same command
goes on where the sweep stopped, and one with more values, seeds, epochs or
metrics extends it. Workers on one machine, or on several that see one --workdir
and one database (--storage), share the points.

The workdir gets report.html, results.csv, and points/ with a folder for each
point, a run like any other.
"""

import runpy

from absl import flags
from etils import epath
import jax
import ml_collections
import optuna
import sqlalchemy

from evaluation import measure
from runs import command_line, processes, schema, workdirs
from sweeps import points, TABLE
from sweeps import study as studies
from sweeps.points import Axes
from vae import devices, paths
from vae.checkpoints import Checkpoints
from vae.errors import UserError

# Metrics that a search can optimise.
_MAXIMIZED = ('elbo', 'elbo_optimal_sigma', 'active_units')
_MINIMIZED = ('rate', 'distortion', 'bits_per_dim_optimal_sigma', 'mse_of_mean')
_OPTIMIZED = ', '.join(_MINIMIZED + _MAXIMIZED)

command_line.define_config('configs/faces_sweep.py')
flags.adopt_module_key_flags(command_line)
_AXES = {
  key: flags.DEFINE_string(
    flag, None, f'Values of config.{key}, such as {example}.'
  )
  for flag, key, example in (
    ('beta', points.BETA, '0.5,1,2'),
    ('latent_dim', points.LATENT_DIM, '16,32'),
    ('seed', points.SEED, '0,1,2'),
  )
}
_GRID = flags.DEFINE_multi_string(
  'grid', [], 'Values of a setting, config.GROUP.NAME=VALUE,VALUE; repeatable.'
)
_STORAGE = flags.DEFINE_string(
  'storage',
  None,
  'Database of the record: postgresql://USER:PASSWORD@HOST/DATABASE, or a path '
  'of an SQLite file, for workers on one machine; by default WORKDIR/sweep.db.',
)
_STUDY = flags.DEFINE_string(
  'study', None, "Name of the sweep in the database; by default the workdir's."
)
_RETRY_FAILED = flags.DEFINE_bool(
  'retry_failed', False, 'Whether points that failed are tried again.'
)
_GRACE_SECONDS = flags.DEFINE_integer(
  'grace_seconds',
  120,
  'Seconds without a heartbeat after which a worker counts as dead.',
  2,
)
_SPLIT = flags.DEFINE_enum(
  'split', 'validation', ['train', 'validation', 'test'], 'Split to measure on.'
)
_METRICS = flags.DEFINE_list(
  'metrics', [], f'Measured besides the summary: {",".join(measure.GROUPS)}.'
)
_IMPORTANCE_SAMPLES = flags.DEFINE_integer(
  'importance_samples', 100, 'K of the bound L_K in --metrics=bounds.', 1
)
_MEASURED = (_SPLIT, _METRICS, _IMPORTANCE_SAMPLES)
_INCEPTION_WEIGHTS = flags.DEFINE_string(
  'inception_weights', None, 'File for --metrics=fid; by default it is fetched.'
)
_NUM_POINTS = flags.DEFINE_integer(
  'num_points', None, 'Points of a search, in ranges LOW:HIGH[:log].', 1
)
_SAMPLER = flags.DEFINE_enum(
  'sampler', 'tpe', ['tpe', 'random'], 'Chooses the points of a search.'
)
_OBJECTIVES = flags.DEFINE_list(
  'objectives', ['rate', 'distortion'], f'A search optimises: {_OPTIMIZED}.'
)
flags.register_validator(
  'objectives',
  lambda names: set(names) <= {*_MINIMIZED, *_MAXIMIZED},
  f'choose from {_OPTIMIZED}',
)


def main() -> None:
  """Checks everything, and works until the sweep is done."""
  path = command_line.config_path()
  base = flags.FLAGS.config
  devices.check()
  schema.validate(base)
  axes = _axes(path, base)
  configs = [points.configure(base, values) for values in points.grid(axes)]
  num_devices = jax.device_count()
  for config in configs:
    divides = config.train.batch_size % num_devices == 0
    schema.check_devices(config, num_devices if divides else 1)
  for name in _METRICS.value:
    measure.find(name)
  workdir, url = _workdir()

  # TensorFlow takes seconds to load; the errors above come before.
  from sweeps import report, worker

  # Errors in the data come before there is a sweep.
  worker.load_data(max(configs, key=lambda config: config.train.batch_size))
  settings = measure.Settings(
    tuple(_METRICS.value),
    _IMPORTANCE_SAMPLES.value,
    base.eval.batch_size,
    inception_weights=_INCEPTION_WEIGHTS.value,
    required=True,
  )
  sampler = optuna.samplers.RandomSampler()
  if _SAMPLER.value == 'tpe':
    sampler = optuna.samplers.TPESampler(multivariate=True, group=True)
  study = studies.Study(
    url,
    _STUDY.value or workdir.name,
    base,
    axes,
    {flag.name: flag.value for flag in _MEASURED},
    {
      name: 'maximize' if name in _MAXIMIZED else 'minimize'
      for name in _OBJECTIVES.value
    },
    num_points=_NUM_POINTS.value,
    retry_failed=_RETRY_FAILED.value,
    grace_seconds=_GRACE_SECONDS.value,
    sampler=sampler,
  )
  with study, processes.StopSignals() as stop:
    results = worker.Worker(workdir, study, _SPLIT.value, settings, stop).run()
  failed = results.frame[results.frame.state == 'failed']
  for point, error in zip(failed.point, failed.error, strict=True):
    print(f'failed: {point}: {error}')
  if len(failed):
    print('The same command with --retry_failed tries them again.')
  for name in (TABLE, report.PAGE):
    print(f'  {workdir / name}')


def _axes(path: str, base: ml_collections.ConfigDict) -> Axes:
  """The axes by config key, from the flags or else from the config."""
  texts = {k: flag.value for k, flag in _AXES.items() if flag.value is not None}
  for text in _GRID.value:
    key, _, values = text.partition('=')
    key = key.removeprefix('config.')
    if key in texts:
      raise UserError(f'config.{key} is given twice; give all values at once.')
    texts[key] = values
  axes = {k: points.parse(k, values, base) for k, values in texts.items()}
  if not axes:
    axes = runpy.run_path(path).get('sweep', dict)()
  kinds = (list, tuple, points.Range)
  if not (isinstance(axes, dict) and axes) or not all(
    isinstance(values, kinds) and values for values in axes.values()
  ):
    raise UserError(
      'there is nothing to vary; give --beta=0.5,1,2 or --latent_dim=16,32, '
      f'or {path} a function sweep() that returns a dict of config keys, such '
      "as 'objective.beta', each with a list of values."
    )
  for key, values in axes.items():
    if isinstance(values, points.Range) and not _NUM_POINTS.value:
      raise UserError(
        f'config.{key} is a range, which goes with --num_points=N, a search.'
      )
  return axes


def _workdir() -> tuple[epath.Path, sqlalchemy.URL]:
  """The workdir, which can be written, and the database."""
  workdir = paths.expand(
    command_line.WORKDIR.value or f'logs/{command_line.config_name()}'
  )
  workdirs.check_writable(workdir, '--workdir')
  if Checkpoints(workdir).all_steps():
    raise UserError(f'{workdir} holds a run; name another --workdir.')
  storage = _STORAGE.value or str(workdir.resolve() / 'sweep.db')
  return workdir, studies.parse_storage(storage)


if __name__ == '__main__':
  command_line.run(main, on_interrupt='interrupted; the same command goes on.')
