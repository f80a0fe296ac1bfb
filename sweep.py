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

from collections.abc import Callable
import importlib.util
import pathlib

from absl import flags
import jax
import ml_collections
import numpy as np
import optuna

from evaluation import measure
from runs import command_line
from runs import schema
from runs import stop_signals
from runs import workdirs
from sweeps import points
from sweeps import study as studies
from sweeps.points import Axes
from sweeps.points import Range
from vae import checkpoints
from vae import devices
from vae import paths
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
  'none': optuna.pruners.NopPruner,
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
  schema.validate(base)
  devices.check()
  axes = _axes(path, base)
  _check_flags(axes)
  configs = _check_points(base, axes)
  workdir = paths.expand(
    command_line.WORKDIR.value or f'logs/{pathlib.Path(path).stem}'
  )
  workdirs.check_writable(workdir, '--workdir')
  if checkpoints.exist(workdir):
    raise UserError(f'{workdir} holds a run; name another --workdir.')
  if _STORAGE.value is None and paths.is_remote(workdir):
    raise UserError(
      f'--workdir={workdir} is no local folder, so the record of the sweep '
      'cannot be a file in it; give --storage too.'
    )
  storage = _STORAGE.value or str(workdir.resolve() / 'sweep.db')
  url = studies.parse_storage(storage)

  # TensorFlow takes seconds to load; the errors above come before.
  from evaluation import inception_weights
  import input_pipeline
  from sweeps import report
  from sweeps import worker as workers

  load = _load_once(input_pipeline.load)
  if not any(key.startswith('data.') for key in axes):
    # Errors in the data come before there is a sweep.
    load(max(configs, key=lambda config: config.train.batch_size))
  inception = None
  if 'fid' in _METRICS.value:
    inception = inception_weights.load(_INCEPTION_WEIGHTS.value)
  stop = stop_signals.StopSignals()
  study = _open_study(url, workdir, base, axes, stop.sleep)
  # Together with what varied in earlier commands.
  configs = _check_points(base, study.axes)
  settings = measure.Settings(
    tuple(_METRICS.value),
    _IMPORTANCE_SAMPLES.value,
    base.eval.batch_size,
    inception_variables=inception,
  )
  worker = workers.Worker(
    workdir,
    study,
    base,
    max(config.model.get('latent_dim', 0) for config in configs),
    _SPLIT.value,
    settings,
    _PRUNER.value != 'none',
    load,
    stop,
  )
  with study, stop:
    results = worker.run()
  failed = results.frame[results.frame.state == 'failed']
  for point, error in zip(failed.point, failed.error, strict=True):
    print(f'failed: {point}: {error}')
  if len(failed):
    print('The same command with --retry_failed tries them again.')
  for name in (report.TABLE, report.PAGE):
    print(f'  {workdir / name}')


def _load_once(load: Callable) -> Callable:
  """`load` that keeps the data of the last config."""
  kept = {}

  def load_once(config):
    key = str(config.data)
    if key not in kept:
      kept.clear()  # Before more memory is needed.
      kept[key] = load(config)
    return kept[key]

  return load_once


def _axes(path: str, base: ml_collections.ConfigDict) -> Axes:
  """Values of each key that varies, from the flags or else from the config."""
  given = {
    key: (f'--{flag.name}', flag.value)
    for key, flag in _AXES.items()
    if flag.value is not None
  }
  for text in _GRID.value:
    key, equals, values = text.partition('=')
    if not equals or not key.startswith('config.'):
      raise UserError(
        f'--grid={text}: the form is config.GROUP.NAME=VALUE,VALUE,….'
      )
    if key.removeprefix('config.') in given:
      raise UserError(f'--grid={text}: the values of {key} are given twice.')
    given[key.removeprefix('config.')] = f'--grid {key}', values
  axes = {
    key: points.parse(key, values, flag, base)
    for key, (flag, values) in given.items()
  }
  axes = axes or _axes_of_config(path)
  if not axes:
    raise UserError(
      'there is nothing to vary; give --beta=0.5,1,2 or --latent_dim=16,32, '
      f'or {path} a function sweep() beside get_config().'
    )
  return axes


def _axes_of_config(path: str) -> Axes:
  """What the config's function `sweep` returns; empty if there is no such."""
  spec = importlib.util.spec_from_file_location('sweep_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  axes = module.sweep() if hasattr(module, 'sweep') else {}
  if not isinstance(axes, dict) or not all(
    isinstance(key, str) and isinstance(values, (list, tuple)) and values
    for key, values in axes.items()
  ):
    raise UserError(
      f'{path}: sweep() must return a dict of config keys, such as '
      "'objective.beta', each with a list of values."
    )
  return {
    key.removeprefix('config.'): [
      value.item() if isinstance(value, np.generic) else value
      for value in values
    ]
    for key, values in axes.items()
  }


def _check_flags(axes: Axes) -> None:
  """Checks flags that name metrics, and that belong to a search."""
  for flag, known in ((_OBJECTIVES, OBJECTIVES), (_METRICS, measure.GROUPS)):
    for name in flag.value:
      if name not in known:
        raise UserError(
          f'--{flag.name}: there is no {name}; there are {", ".join(known)}.'
        )
  if not _OBJECTIVES.value:
    raise UserError(f'--objectives is empty; give some of {list(OBJECTIVES)}.')
  if _NUM_POINTS.value is None:
    for key, choices in axes.items():
      if isinstance(choices, Range):
        raise UserError(
          f'the values of {key} are a range, in which --num_points=N searches; '
          'without it name each value.'
        )
    for flag in (_SAMPLER, _OBJECTIVES, _PRUNER):
      if flags.FLAGS[flag.name].present:
        raise UserError(f'--{flag.name} goes with --num_points=N, a search.')
  prunable = [[name] for name in studies.VALIDATION_METRICS]
  if _PRUNER.value != 'none' and _OBJECTIVES.value not in prunable:
    raise UserError(
      f'--pruner={_PRUNER.value} goes with one of the --objectives '
      f'{", ".join(studies.VALIDATION_METRICS)}.'
    )


def _check_points(
  base: ml_collections.ConfigDict, axes: Axes
) -> list[ml_collections.ConfigDict]:
  """Configs of a grid's points, or of a search's extremes, that fit."""
  values = points.extremes(axes)
  if _NUM_POINTS.value is None:
    values = points.grid(axes)
  configs = [points.configure(base, v) for v in values]
  num_devices = jax.device_count()
  for config in configs:
    divides = config.train.batch_size % num_devices == 0
    schema.check_devices(config, num_devices if divides else 1)
  return configs


def _open_study(url, workdir, base, axes, sleep) -> studies.Study:
  name = _STUDY.value or workdir.name
  study = studies.Study(
    url,
    name,
    base,
    axes,
    {
      'split': _SPLIT.value,
      'metrics': _METRICS.value,
      'importance_samples': _IMPORTANCE_SAMPLES.value,
    },
    {name: OBJECTIVES[name] for name in _OBJECTIVES.value},
    num_points=_NUM_POINTS.value,
    retry_failed=_RETRY_FAILED.value,
    grace_seconds=_GRACE_SECONDS.value,
    sampler=_SAMPLERS[_SAMPLER.value](),
    pruner=_PRUNERS[_PRUNER.value](),
    sleep=sleep,
  )
  done = study.count(optuna.trial.TrialState.COMPLETE)
  if done and not (workdir / points.FOLDER).exists():
    raise UserError(
      f'the study {name} in the storage has another workdir than {workdir}; '
      'name that one, or another --study.'
    )
  return study


if __name__ == '__main__':
  command_line.run(main, on_interrupt='interrupted; the same command goes on.')
