r"""Trains a run for each combination of settings, and compares them.

  python sweep.py --config=configs/celeba.py --workdir=logs/beta \
    --beta=0.25,0.5,1,2,4,8 --latent_dim=16,32,64,128

A worker trains as many points at a time as it has devices. The same command
goes on where the sweep stopped, and one with more values, seeds, epochs or
metrics extends it. Started several times on one machine, or on several that see
one --workdir and one database (--storage), workers share the points.

The workdir gets report.html, results.csv, tensorboard/ for the HParams view,
and points/ with a folder for each point, a run like any other.
"""

import importlib.util
import pathlib

from absl import flags
from etils import epath
import jax
import ml_collections
import optuna
import sqlalchemy

from evaluation import measure
from runs import command_line, processes, schema, workdirs
from sweeps import points
from sweeps import study as studies
from sweeps.points import Axes
from vae import devices, paths
from vae.checkpoints import Checkpoints
from vae.errors import UserError

# Metrics that a search can optimise.
OBJECTIVES = {
  'rate': 'minimize',
  'distortion': 'minimize',
  'elbo': 'maximize',
  'elbo_optimal_sigma': 'maximize',
  'bits_per_dim_optimal_sigma': 'minimize',
  'mse_of_mean': 'minimize',
  'active_units': 'maximize',
}
_SAMPLERS = {
  'tpe': lambda: optuna.samplers.TPESampler(multivariate=True, group=True),
  'nsga2': optuna.samplers.NSGAIISampler,
  'random': optuna.samplers.RandomSampler,
  'qmc': optuna.samplers.QMCSampler,
}
_PRUNERS = {
  'none': lambda: None,
  'median': optuna.pruners.MedianPruner,
  'hyperband': optuna.pruners.HyperbandPruner,
}

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
  'grid',
  [],
  'Values of any setting, config.GROUP.NAME=VALUE,VALUE; repeatable.',
)
_STORAGE = flags.DEFINE_string(
  'storage',
  None,
  "Database of the sweep's record: postgresql://USER:PASSWORD@HOST/DATABASE, "
  'for workers on several machines, or the path of an SQLite file, for workers '
  'on this one. By default sweep.db in the workdir.',
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
  'Seconds without a heartbeat after which a worker on another machine counts '
  'as dead, and others take its points over.',
  lower_bound=2,
)
_SPLIT = flags.DEFINE_enum(
  'split',
  'validation',
  ['train', 'validation', 'test'],
  'Split that points are measured on.',
)
_METRICS = flags.DEFINE_list(
  'metrics',
  [],
  'Measured of each point besides the summary, as by evaluate.py: '
  f'{",".join(measure.GROUPS)}.',
)
_IMPORTANCE_SAMPLES = flags.DEFINE_integer(
  'importance_samples', 100, 'K of the bound L_K in --metrics=bounds.', 1
)
_MEASURED = (_SPLIT, _METRICS, _IMPORTANCE_SAMPLES)
_INCEPTION_WEIGHTS = flags.DEFINE_string(
  'inception_weights',
  None,
  'File inception-2015-12-05.tgz for --metrics=fid; by default it is fetched.',
)
_NUM_POINTS = flags.DEFINE_integer(
  'num_points',
  None,
  'Searches with this many points instead of a grid; settings may then be '
  'ranges, LOW:HIGH or LOW:HIGH:log.',
  lower_bound=1,
)
_SAMPLER = flags.DEFINE_enum(
  'sampler', 'tpe', list(_SAMPLERS), 'Chooses the points of a search.'
)
_OBJECTIVES = flags.DEFINE_list(
  'objectives',
  ['rate', 'distortion'],
  f'Metrics that a search optimises, of {", ".join(OBJECTIVES)}.',
)
_PRUNER = flags.DEFINE_enum(
  'pruner',
  'none',
  list(_PRUNERS),
  'Stops bad points of a search for a single objective.',
)


def main() -> None:
  """Checks everything, and works until the sweep is done."""
  path = command_line.config_path()
  base = flags.FLAGS.config
  devices.check()
  schema.validate(base)
  axes = _axes(path, base)
  _check_flags(axes)
  configs = _check_points(base, axes)
  workdir, url = _workdir(path)

  # TensorFlow takes seconds to load; the errors above come before.
  from sweeps import report
  from sweeps import worker as workers

  if not any(key.startswith('data.') for key in axes):
    # Errors in the data come before there is a sweep.
    workers.load_data(max(configs, key=lambda c: c.train.batch_size))
  settings = measure.Settings(
    tuple(_METRICS.value),
    _IMPORTANCE_SAMPLES.value,
    base.eval.batch_size,
    inception_weights=_INCEPTION_WEIGHTS.value,
    required=True,
  )
  measured = {flag.name: flag.value for flag in _MEASURED}
  stop = processes.StopSignals()
  study = studies.Study(
    url,
    _STUDY.value or workdir.name,
    base,
    axes,
    measured,
    {name: OBJECTIVES[name] for name in _OBJECTIVES.value},
    num_points=_NUM_POINTS.value,
    retry_failed=_RETRY_FAILED.value,
    grace_seconds=_GRACE_SECONDS.value,
    sampler=_SAMPLERS[_SAMPLER.value](),
    pruner=_PRUNERS[_PRUNER.value](),
    sleep=stop.sleep,
  )
  worker = workers.Worker(workdir, study, base, _SPLIT.value, settings, stop)
  _check_points(base, study.axes)  # With what varied in earlier commands.
  with study, stop:
    results = worker.run()
  failed = results.frame[results.frame.state == 'failed']
  for point, error in zip(failed.point, failed.error, strict=True):
    print(f'failed: {point}: {error}')
  if len(failed):
    print('The same command with --retry_failed tries them again.')
  for name in (report.TABLE, report.PAGE):
    print(f'  {workdir / name}')


def _axes(path: str, base: ml_collections.ConfigDict) -> Axes:
  """The axes by config key, from the flags or else from the config."""
  given = {k: flag.value for k, flag in _AXES.items() if flag.value is not None}
  for text in _GRID.value:
    key, _, values = text.partition('=')
    group, _, key = key.partition('.')
    if group != 'config' or key in given:
      raise UserError(
        f'--grid={text}: the form is config.GROUP.NAME=VALUE,VALUE, and each '
        'setting is given once.'
      )
    given[key] = values
  axes = {k: points.parse(k, values, base) for k, values in given.items()}
  if not axes:
    spec = importlib.util.spec_from_file_location('sweep_config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    axes = points.from_config(getattr(module, 'sweep', dict)(), path)
  if not axes:
    raise UserError(
      'there is nothing to vary; give --beta=0.5,1,2 or --latent_dim=16,32, '
      f'or {path} a function sweep() beside get_config().'
    )
  return axes


def _check_flags(axes: Axes) -> None:
  """Checks flags that name metrics, and that belong to a search."""
  for flag, known in ((_OBJECTIVES, OBJECTIVES), (_METRICS, measure.GROUPS)):
    for name in flag.value:
      if name not in known:
        raise UserError(
          f'--{flag.name}: there is no {name}; there are {", ".join(known)}.'
        )
  if _NUM_POINTS.value is None:
    ranges = [k for k, v in axes.items() if isinstance(v, points.Range)]
    searching = (_SAMPLER, _OBJECTIVES, _PRUNER)
    given = [f'--{f.name}' for f in searching if flags.FLAGS[f.name].present]
    for what in (*ranges, *given):
      raise UserError(
        f'{what}: ranges, --sampler, --objectives and --pruner go with '
        '--num_points=N, a search.'
      )
  if _PRUNER.value != 'none' and (
    len(_OBJECTIVES.value) > 1
    or _OBJECTIVES.value[0] not in points.VALIDATION_METRICS
  ):
    raise UserError(
      f'--pruner={_PRUNER.value} goes with one of the --objectives '
      f'{", ".join(points.VALIDATION_METRICS)}.'
    )


def _check_points(
  base: ml_collections.ConfigDict, axes: Axes
) -> list[ml_collections.ConfigDict]:
  """Configs of a grid's points, or of a search's extremes, that fit."""
  num_devices = jax.device_count()
  choose = points.extremes if _NUM_POINTS.value else points.grid
  configs = [points.configure(base, values) for values in choose(axes)]
  for config in configs:
    divides = config.train.batch_size % num_devices == 0
    schema.check_devices(config, num_devices if divides else 1)
  return configs


def _workdir(path: str) -> tuple[epath.Path, sqlalchemy.URL]:
  """The workdir, which can be written, and the database."""
  workdir = paths.expand(
    command_line.WORKDIR.value or f'logs/{pathlib.Path(path).stem}'
  )
  workdirs.check_writable(workdir, '--workdir')
  if Checkpoints(workdir).all_steps():
    raise UserError(f'{workdir} holds a run; name another --workdir.')
  if _STORAGE.value is None and paths.is_remote(workdir):
    raise UserError(
      f'--workdir={workdir} is no local folder, so the record of the sweep '
      'cannot be a file in it; give --storage too.'
    )
  storage = _STORAGE.value or str(workdir.resolve() / 'sweep.db')
  return workdir, studies.parse_storage(storage)


if __name__ == '__main__':
  command_line.run(main, on_interrupt='interrupted; the same command goes on.')
