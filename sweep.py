r"""Trains a run for each combination of settings, and compares them.

  python sweep.py --config=configs/celeba.py --workdir=logs/beta \
    --beta=0.25,0.5,1,2,4,8 --latent_dim=16,32,64,128

Points that differ in β, latent dimension, learning rate and seed train
together in one program. The same command again goes on where the sweep
stopped; started on several machines, with a --workdir that all of them see and
a --storage for what is done, each takes the points that are open. What is left
in the workdir: report.html, results.csv, tensorboard/ for the HParams view,
and a folder in points/ for each, a run like any other.
"""

import importlib.util
import json
import pathlib

from absl import flags
from etils import epath
import jax
import ml_collections
import numpy as np
import optuna

from evaluation import measure
from runs import command_line
from runs import memory
from runs import processes
from runs import schema
from runs import workdirs
from sweeps import definition as definitions
from sweeps import disk
from sweeps import points
from sweeps import storage as storages
from sweeps import study as studies
from sweeps.points import Range
from vae import checkpoints
from vae import devices
from vae import paths
from vae.errors import UserError

DEFINITION = 'sweep.json'

# Of all that is measured of a point, what a search can be for.
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
  'median': optuna.pruners.MedianPruner,
  'hyperband': optuna.pruners.HyperbandPruner,
}

command_line.define_config('configs/faces_sweep.py')
flags.adopt_module_key_flags(command_line)
_AXES = {
  'objective.beta': flags.DEFINE_string(
    'beta', None, 'Values of config.objective.beta, such as 0.5,1,2.'
  ),
  'model.latent_dim': flags.DEFINE_string(
    'latent_dim', None, 'Values of config.model.latent_dim, such as 16,32.'
  ),
  'seed': flags.DEFINE_string(
    'seed', None, 'Values of config.seed, such as 0,1,2.'
  ),
}
_GRID = flags.DEFINE_multi_string(
  'grid',
  [],
  'Values of any other setting, as config.GROUP.NAME=VALUE,VALUE; may be given '
  'several times.',
)
_STORAGE = flags.DEFINE_string(
  'storage',
  None,
  'Where workers keep the record of the sweep: the URL of a database, such as '
  "postgresql://USER:PASSWORD@HOST/DATABASE, or the path of Optuna's journal "
  'file on a disk that they share. By default a SQLite file in the workdir, '
  'for workers on one machine.',
)
_STUDY = flags.DEFINE_string(
  'study', None, "Name of the sweep in the storage; by default the workdir's."
)
_POPULATION = flags.DEFINE_string(
  'population',
  'auto',
  'How many points train together in one program: auto, off or a number.',
)
_RETRY_FAILED = flags.DEFINE_bool(
  'retry_failed', False, 'Whether points that failed are tried again.'
)
_GRACE_SECONDS = flags.DEFINE_float(
  'grace_seconds',
  120.0,
  'A worker on another machine that gives no sign of life for so long is taken '
  'for dead, and its points for open.',
  lower_bound=0.1,
)
_SPLIT = flags.DEFINE_enum(
  'split',
  'validation',
  ['train', 'validation', 'test'],
  'What points are measured on.',
)
_METRICS = flags.DEFINE_list(
  'metrics',
  [],
  'Also measured of each point, as evaluate.py does: '
  f'{",".join(measure.GROUPS)}.',
)
_IMPORTANCE_SAMPLES = flags.DEFINE_integer(
  'importance_samples', 100, 'K of the bound L_K in --metrics=bounds.', 1
)
_INCEPTION_WEIGHTS = flags.DEFINE_string(
  'inception_weights',
  None,
  'The file inception-2015-12-05.tgz, for --metrics=fid; by default it is '
  'fetched once.',
)
_NUM_POINTS = flags.DEFINE_integer(
  'num_points',
  None,
  'Search instead of trying all: so many points, chosen by --sampler; settings '
  'may then be ranges, LOW:HIGH or LOW:HIGH:log.',
  lower_bound=1,
)
_SAMPLER = flags.DEFINE_enum(
  'sampler', 'tpe', list(_SAMPLERS), 'Chooses the points of a search.'
)
_OBJECTIVES = flags.DEFINE_list(
  'objectives',
  ['rate', 'distortion'],
  f'What a search is for: one or several of {", ".join(OBJECTIVES)}.',
)
_PRUNER = flags.DEFINE_enum(
  'pruner',
  'none',
  ['none', *_PRUNERS],
  'Stops points of a search for one objective that do badly.',
)


def main() -> None:
  """Checks everything, and works until the sweep is done."""
  path = command_line.config_path()
  base = flags.FLAGS.config
  devices.check()
  schema.validate(base)
  axes = _axes(path)
  _check_search(axes)
  population = _population()
  grid = [] if _NUM_POINTS.value else points.grid(axes)
  configs = [points.configure(base, v) for v in grid or _corners(axes)]
  for config in configs:
    _check_devices(config, population)
  workdir = paths.expand(
    command_line.WORKDIR.value or f'logs/{pathlib.Path(path).stem}'
  )
  definition = definitions.define(
    base,
    axes,
    measured={
      'split': _SPLIT.value,
      'metrics': _METRICS.value,
      'importance_samples': _IMPORTANCE_SAMPLES.value,
    },
    search={
      'num_points': _NUM_POINTS.value,
      'objectives': _OBJECTIVES.value,
    },
  )
  _check_workdir(workdir, definition)
  storage = storages.open_storage(_storage(workdir))

  # TensorFlow takes seconds to load; a mistake above is told before.
  from evaluation import fid
  import input_pipeline
  from sweeps import page
  from sweeps import table
  from sweeps import worker as workers

  if not any(key.startswith('data.') for key in axes):
    # What is wrong with the data is told before there is a sweep.
    largest = max(configs, key=lambda config: config.train.batch_size)
    data = workers.Data(input_pipeline.load, largest)
  else:
    data = workers.Data(input_pipeline.load)
  if 'fid' in _METRICS.value:
    fid.load(_INCEPTION_WEIGHTS.value)
  plan = workers.Plan(
    base,
    grid,
    axes if _NUM_POINTS.value else {},
    _NUM_POINTS.value or 0,
    population,
    _SPLIT.value,
    measure.Settings(
      tuple(_METRICS.value),
      _IMPORTANCE_SAMPLES.value,
      base.eval.batch_size,
      inception_weights=_INCEPTION_WEIGHTS.value,
    ),
  )
  pruner = _PRUNERS.get(_PRUNER.value)
  stop = processes.StopSignals()
  study = studies.Study(
    storage,
    _STUDY.value or workdir.name,
    definition,
    {name: OBJECTIVES[name] for name in _OBJECTIVES.value},
    _GRACE_SECONDS.value,
    _SAMPLERS[_SAMPLER.value](),
    pruner and pruner(),
    stop.sleep,
  )
  if study.has_results() and not (workdir / DEFINITION).exists():
    raise UserError(
      f'the study {_STUDY.value or workdir.name} in the storage has another '
      f'workdir than {workdir}; name that one, or another --study.'
    )
  try:
    # It is kept as it is: code that knows fewer keys must find its own.
    if not (workdir / DEFINITION).exists():
      workdirs.write_json(workdir / DEFINITION, definition)
  except OSError as error:
    raise disk.told(
      error, workdir, 'The same command goes on once it can be.'
    ) from error
  with study, stop:
    worker = workers.Worker(
      plan, workdir, study, data, stop, _RETRY_FAILED.value
    )
    results = worker.run()
  failed = [result for result in results if result.state == 'failed']
  for result in failed:
    print(f'failed: {result.name}: {result.error}')
  if failed and grid:
    print('The same command with --retry_failed tries them again.')
  for name in (table.FILENAME, page.PAGE):
    print(f'  {workdir / name}')


def _axes(path: str) -> dict[str, list[object] | Range]:
  """What varies, by config key: from the flags, or else from the config."""
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
  if given:
    return {
      key: points.parse(key, values, flag)
      for key, (flag, values) in given.items()
    }
  axes = _axes_of_config(path)
  if not axes:
    raise UserError(
      'there is nothing to vary; give --beta=0.5,1,2 or --latent_dim=16,32, '
      f'or {path} a function sweep() beside get_config().'
    )
  return axes


def _axes_of_config(path: str) -> dict[str, list[object]]:
  """What the config's function `sweep` returns; empty without one."""
  spec = importlib.util.spec_from_file_location('sweep_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'sweep'):
    return {}
  axes = module.sweep()
  is_fine = isinstance(axes, dict) and all(
    isinstance(key, str) and isinstance(values, (list, tuple)) and values
    for key, values in axes.items()
  )
  if not is_fine:
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


def _check_search(axes: dict[str, list[object] | Range]) -> None:
  """Checks how the flags of a search go together."""
  unknown = [name for name in _OBJECTIVES.value if name not in OBJECTIVES]
  if unknown or not _OBJECTIVES.value:
    raise UserError(
      f'--objectives: there is no {(unknown or ["empty one"])[0]}; there are '
      f'{", ".join(OBJECTIVES)}.'
    )
  groups = [name for name in _METRICS.value if name not in measure.GROUPS]
  if groups:
    raise UserError(
      f'--metrics: there is no {groups[0]}; there are '
      f'{", ".join(measure.GROUPS)}.'
    )
  if _NUM_POINTS.value is None:
    ranges = [
      key for key, choices in axes.items() if isinstance(choices, Range)
    ]
    if ranges:
      raise UserError(
        f'the values of {ranges[0]} are a range, in which --num_points=N '
        'searches; without it name each value.'
      )
    for flag in (_SAMPLER, _OBJECTIVES, _PRUNER):
      if flags.FLAGS[flag.name].present:
        raise UserError(f'--{flag.name} goes with --num_points=N, a search.')
  elif _RETRY_FAILED.value:
    raise UserError('--retry_failed goes with a grid; a search tries others.')
  if _PRUNER.value != 'none':
    if tuple(_OBJECTIVES.value) not in {
      (name,) for name in studies.VALIDATION_METRICS
    }:
      raise UserError(
        f'--pruner={_PRUNER.value} goes with one of the --objectives '
        f'{", ".join(studies.VALIDATION_METRICS)}.'
      )
    if _POPULATION.value not in ('auto', 'off'):
      raise UserError(
        f'--pruner={_PRUNER.value} stops points one by one; give '
        '--population=off.'
      )


def _population() -> int:
  """How many points train together; 0 leaves it to the program."""
  text = _POPULATION.value
  if text == 'off' or _PRUNER.value != 'none':
    return 1
  if text == 'auto':
    return 0
  if not text.isdigit() or int(text) < 1:
    raise UserError(
      f'--population={text}: it must be auto, off or a number of points.'
    )
  return int(text)


def _check_devices(config: ml_collections.ConfigDict, population: int) -> None:
  """Checks that the devices hold a point, be it trained alone."""
  num_devices = jax.device_count()
  if population == 1:
    schema.check_devices(config, num_devices)
  elif config.train.batch_size % num_devices == 0:
    # As where the others are done, or it did not fit with them: then it has
    # all devices.
    memory.check(config, num_devices)
  else:
    # A member of a population has its whole batch on one device.
    memory.check(config, 1)


def _corners(
  axes: dict[str, list[object] | Range],
) -> list[dict[str, object]]:
  """Points of a search such that all values are in some."""
  listed = {
    key: [choices.low, choices.high] if isinstance(choices, Range) else choices
    for key, choices in axes.items()
  }
  points.grid(listed)  # Each value once.
  return [
    {key: values[min(i, len(values) - 1)] for key, values in listed.items()}
    for i in range(max(map(len, listed.values())))
  ]


def _check_workdir(workdir: epath.Path, definition: dict[str, object]) -> None:
  """Checks that the sweep can live, or go on, in a workdir."""
  workdirs.check_writable(workdir, '--workdir')
  if checkpoints.Checkpoints(workdir).all_steps():
    raise UserError(f'{workdir} holds a run; name another --workdir.')
  path = workdir / DEFINITION
  if path.exists():
    try:
      found = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(f'{path} cannot be read: {error}; delete it.') from error
    definitions.check_same(definition, found, str(workdir))


def _storage(workdir: epath.Path) -> str:
  if _STORAGE.value is not None:
    return _STORAGE.value
  if paths.is_remote(workdir):
    raise UserError(
      f'--workdir={workdir} is no local folder, so the record of the sweep '
      'cannot be a file in it; give --storage too.'
    )
  return storages.file_url(workdir.resolve() / 'sweep.db')


if __name__ == '__main__':
  command_line.run(main, on_interrupt='interrupted; the same command goes on.')
