"""Every member of configs/family.py, on four virtual devices.

`main` works in a process of its own, and prints what it found as JSON.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback

import numpy as np
import pytest

from configs import family
from evaluation import measure
from runs import progress, schema
from tests import test_devices
from tests.conftest import make_data, ROOT
import train
import vae
from vae import conditioning, models, numerics

# Small sizes, as far as a member's classes have them.
SMALL = {
  'hidden_channels': (4, 4),
  'hidden_sizes': (8,),
  'channels': (4, 8),
  'latent_dim': 3,
  'prior_components': 3,
  'levels': (3, 4),
  'num_codes': 8,
  'code_dim': 2,
  'critic_sizes': (8,),
}
NUM_STEPS = 10
# Their terms are of a whole batch, and the cut of a validation split into
# batches depends on the number of devices.
OF_BATCHES = ('total_correlation', 'dip', 'mmd')


def make_config(member, dtype='float32'):
  """A member that trains in seconds."""
  config = family.get_config(member)
  config.seed = 7
  config.data.image_size = 8
  config.train.batch_size, config.train.num_epochs = 8, 2
  config.train.flip, config.train.log_every_steps = True, 5
  config.train.steps_per_dispatch = 5
  config.optimizer.learning_rate, config.optimizer.average_decay = 0.003, 0.9
  schema.complete(config)
  for group in (config.model, config.objective):
    for name in SMALL.keys() & group.keys():
      group[name] = SMALL[name]
  config.model.dtype = dtype
  return config


def on_devices(member):
  """Losses and statistics on one and on four devices, in float64."""
  with numerics.fixed('float64'):
    config = make_config(member, 'float64')
    config.data.channels = 3  # As `test_devices.PIXELS`.
    # Adam blows up rounding noise in biases that a normalisation cancels.
    config.optimizer.average_decay = 0.0
    return [test_devices.run_topology(config, count) for count in (1, 4)]


def whole_life(member):
  """Trains, stops, continues, loads, samples, reconstructs and measures."""
  config, data = make_config(member), make_data((8, 8, 1))
  schema.validate(config)
  rows = []
  writer = progress.Writer()
  writer.write_scalars = lambda step, scalars: rows.append(scalars)
  with tempfile.TemporaryDirectory() as workdir:
    stops = iter([True])
    state = train.train_and_evaluate(
      config, workdir, data, writer, lambda: next(stops)
    )
    stopped = int(state.step)
    state = train.train_and_evaluate(config, workdir, data, writer)
    trained = vae.load(workdir)
    samples = trained.sample(4)
    first = next(conditioning.batches(config, data.test, np.arange(5), 5))
    reconstructions = trained.reconstruct(
      first.images, seed=1, labels=first.labels
    )
    groups = ['bounds', 'reconstruction']
    if any(not key.startswith('objective') for key in family.MEMBERS[member]):
      groups.append('posterior')  # It knows nothing of objectives.
    settings = measure.Settings(tuple(groups), num_importance_samples=4)
    results = measure.measure(trained, data, 'test', settings)
  numbers = {name: metric.value for name, metric in results.metrics.items()}
  return {
    'steps': [stopped, int(state.step)],
    'loss': [row['train/loss'] for row in rows if 'train/loss' in row],
    'shapes': [samples.shape, reconstructions.shape],
    'range': [float(np.min(samples)), float(np.max(samples))],
    'numbers': numbers,
  }


def main():
  models._FLOW_LAYERS = 2  # Each takes seconds to compile.
  for member in sys.argv[1:]:
    found = {'member': member}
    for part in (on_devices, whole_life):
      try:
        found[part.__name__] = part(member)
      except Exception:
        found['error'] = f'{part.__name__}: {traceback.format_exc()}'
    print(f'FOUND {json.dumps(found)}', flush=True)
  # A proper exit frees hundreds of programs, and can crash over it.
  os._exit(0)


@functools.cache
def results_of(members):
  """Runs `main` for these members, and returns its output by member."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4 '
    '--xla_backend_optimization_level=0',
  }
  command = [sys.executable, '-m', 'tests.test_family', *members]
  output = subprocess.check_output(
    command, cwd=ROOT, env=environment, text=True, timeout=900
  )
  lines = [line for line in output.splitlines() if line.startswith('FOUND ')]
  parsed = [json.loads(line.removeprefix('FOUND ')) for line in lines]
  return {one['member']: one for one in parsed}


def members_with(member):
  """A few members share a process; hundreds of programs would crash it."""
  names = list(family.MEMBERS)
  start = names.index(member) // 4 * 4
  return tuple(names[start : start + 4])


def part_of(nodeid):
  """For conftest.py: the tests of a process go to one worker."""
  if not nodeid.endswith(']') or 'test_family.py' not in nodeid:
    return ''
  return members_with(nodeid.rpartition('[')[2].removesuffix(']'))[0]


@pytest.mark.slow
@pytest.mark.parametrize('member', family.MEMBERS)
def test_member_trains_continues_samples_and_is_measured(member):
  found = results_of(members_with(member))[member]
  assert 'error' not in found, found['error']
  one, four = found['on_devices']
  if family.get_config(member).objective.name in OF_BATCHES:
    del one['val']
  for name in one:
    np.testing.assert_allclose(four[name], one[name], rtol=1e-9, err_msg=name)
  life = found['whole_life']
  assert life['steps'] == [5, NUM_STEPS]
  assert np.all(np.isfinite(life['loss'])) and len(life['loss']) > 1
  assert life['shapes'] == [[4, 8, 8, 1], [5, 8, 8, 1]]
  assert np.all(np.isfinite(life['range']))
  numbers = life['numbers']
  if 'elbo' in numbers:
    assert np.isfinite(numbers['elbo'])
    # K = 4 of other draws on the same images is better, but for chance.
    assert numbers['iw_bound'] > numbers['elbo'] - 1


if __name__ == '__main__':
  main()
