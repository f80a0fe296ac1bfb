"""A member of a population is the run that it would be by itself."""

import json
import os
import subprocess
import sys

from etils import epath
import jax
import numpy as np
import pytest

from runs import progress
from tests.conftest import make_small_config
from tests.conftest import ROOT
import train
from vae import checkpoints
from vae import population
from vae import splits
from vae import trained
from vae.errors import UserError

# Virtual devices; and what `population_run.py` is told: dtype, steps, members,
# where the images are, and how a device computes its members.
CASES = {
  # Five members of several seeds on three of four devices.
  'spread': (4, 'float64', 50, 'all', 'device', 'as CPUs'),
  # Three members on two devices, their images and noise shared.
  'at once': (2, 'float64', 50, 'one seed', 'host', 'as accelerators'),
  'one each': (8, 'float32', 1, 'eight', 'host', 'as CPUs'),
}


@pytest.fixture(scope='module')
def compared():
  """What the runs of each case came to, together and one by one."""
  processes = {}
  for name, (count, dtype, *rest) in CASES.items():
    environment = dict(
      os.environ,
      XLA_FLAGS=f'--xla_force_host_platform_device_count={count}',
      JAX_ENABLE_X64=str(int(dtype == 'float64')),
      PYTHONPATH=str(ROOT),
    )
    command = [sys.executable, ROOT / 'tests/population_run.py', dtype]
    processes[name] = subprocess.Popen(
      [*command, *map(str, rest)], stdout=subprocess.PIPE, env=environment
    )
  return {
    name: json.loads(process.communicate(timeout=300)[0])
    for name, process in processes.items()
  }


@pytest.mark.parametrize('case', CASES)
def test_members_are_the_runs_that_they_stand_for(compared, case):
  found = compared[case]
  count, dtype, *_ = CASES[case]
  assert found['devices'] == count
  # Members differ from each other, or the rest would say nothing.
  assert found['spread'] > 0.1
  if dtype == 'float64':
    for what in ('validation', 'losses', 'params'):
      assert found[what] < 1e-9, what
  else:
    assert found['first'] < 1e-5 and found['validation'] < 1e-5


@pytest.mark.parametrize('case', CASES)
def test_devices_communicate_nothing(compared, case):
  assert compared[case]['collectives'] == []


@pytest.mark.parametrize(
  ('members', 'devices', 'expected'),
  [
    (8, 8, (8, 1)),
    (3, 8, (3, 1)),
    (10, 8, (5, 2)),
    (11, 8, (6, 2)),
    (24, 1, (1, 24)),
  ],
)
def test_members_go_to_devices_first(members, devices, expected):
  assert population.layout(members, devices) == expected


class Rows(progress.NullWriter):
  def __init__(self):
    self.rows = []

  def write_scalars(self, step, scalars):
    scalars.pop('images_per_second', None)
    self.rows.append({'step': step, **scalars})


@pytest.fixture(scope='module')
def trained_together(tmp_path_factory):
  """Two members of three epochs, and the data that they were trained on."""
  pixels = np.random.default_rng(0).integers(0, 256, (51, 16, 16, 3), np.uint8)
  split = splits.ArraySplit(pixels[:40])
  rest = splits.ArraySplit(pixels[40:])
  data = splits.DataSet(split, rest, rest)
  runs = []
  for beta, latent_dim in ((0.5, 3), (4.0, 2)):
    config = make_small_config('')
    config.objective.beta = beta
    config.model.latent_dim = latent_dim
    workdir = epath.Path(tmp_path_factory.mktemp('member'))
    runs.append(train.Run(config, workdir, Rows()))
  train.train_population(runs, data, 3)
  return runs, data


@pytest.mark.parametrize('index', [0, 1])
def test_member_goes_on_as_a_single_run(trained_together, tmp_path, index):
  runs, data = trained_together
  config, workdir, writer = (
    getattr(runs[index], name) for name in ('config', 'workdir', 'writer')
  )
  # The same rows as by itself, up to rounding that Adam blows up.
  alone = Rows()
  state = train.train_and_evaluate(config, tmp_path, data, alone)
  for mine, other in zip(writer.rows, alone.rows, strict=True):
    assert mine == pytest.approx(other, rel=0.02)
  assert writer.rows[0] == pytest.approx(alone.rows[0], rel=1e-4)
  model = trained.load(workdir)
  assert model.model.latent_dim == config.model.latent_dim
  assert model.sample(3).shape == (3, 16, 16, 3)
  saved = checkpoints.Checkpoints(workdir)
  assert saved.latest_step() == 15
  mine = saved.restore(state, 15)
  for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(state), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
  longer = config.copy_and_resolve_references()
  longer.train.num_epochs = 4
  more = train.train_and_evaluate(longer, workdir, data, Rows())
  assert more.step == 20


def test_population_of_runs_at_different_steps_is_refused(
  trained_together, tmp_path
):
  runs, data = trained_together
  fresh = train.Run(runs[0].config, epath.Path(tmp_path), Rows())
  with pytest.raises(UserError, match='of different steps'):
    train.train_population([runs[1], fresh], data, 3)
