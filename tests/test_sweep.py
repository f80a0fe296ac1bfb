"""`python sweep.py` in processes of its own."""

import csv
import json
import re
import signal
import time

import jax
import numpy as np
import optuna
import pytest

import input_pipeline
from sweeps.storage import open_storage
from tests import postgres
from tests.browser import open_page
from tests.preloaded import run
from tests.test_main import final_state
from tests.test_main import finish
from tests.test_main import metrics
from tests.test_main import metrics_of_a_killed_run
from tests.test_main import start
from tests.test_workdir_lock import try_to_hold
from vae import trained as trained_models
from vae.checkpoints import Checkpoints
from vae.errors import UserError

SMALL = (
  '--config=configs/celeba.py',
  '--config.data.image_size=16',
  '--config.data.decoded_dir=',
  '--config.model.hidden_channels=(4,8)',
  # Tests that have the same compile the same programs.
  '--config.model.latent_dim=3',
  '--config.model.sigma=0.1',
  '--config.train.batch_size=8',
  '--config.train.num_epochs=20',
  '--config.eval.every_epochs=10',
  '--config.train.log_every_steps=5',
)


def rows(workdir):
  with (workdir / 'results.csv').open() as file:
    return list(csv.DictReader(file))


def sweep(*flags, **kwargs):
  return run(*flags, script='sweep.py', **kwargs)


@pytest.fixture(scope='module')
def finished(celeba_dir, tmp_path_factory):
  """A sweep of 3 × 2 points, its flags and what it printed."""
  workdir = tmp_path_factory.mktemp('sweep') / 'faces'
  flags = (
    *SMALL,
    f'--config.data.dir={celeba_dir}',
    '--beta=0.05,1,20',
    '--latent_dim=2,3',
  )
  process = start(*flags, f'--workdir={workdir}', script='sweep.py')
  code, out, err = finish(process)
  assert code == 0, err
  return workdir, flags, out


def test_rate_falls_and_distortion_rises_with_beta(finished):
  workdir, _, _ = finished
  for latent_dim in ('2', '3'):
    of_dim = [
      row for row in rows(workdir) if row['model.latent_dim'] == latent_dim
    ]
    of_dim.sort(key=lambda row: float(row['objective.beta']))
    rates = [float(row['rate']) for row in of_dim]
    distortions = [float(row['distortion']) for row in of_dim]
    assert len(rates) == 3
    assert rates[0] > rates[1] > rates[2]
    assert distortions[0] < distortions[2]
    # Within noise.
    assert distortions[1] > distortions[0] - 10
    assert distortions[1] < distortions[2] + 10


def test_table_has_what_the_points_are(finished):
  """Recomputed from the checkpoints, one by one, without padding."""
  workdir, _, _ = finished
  assert len(rows(workdir)) == 6
  for row in rows(workdir):
    assert row['state'] == 'complete' and not row['error']
    model = trained_models.load(workdir / 'points' / row['point'])
    assert str(model.model.latent_dim) == row['model.latent_dim']
    assert model.config.objective.beta == float(row['objective.beta'])
    dimensions = 16 * 16 * 3
    mse = float(row['optimal_sigma']) ** 2
    rate = float(row['rate'])
    # Rybkin et al. 2021.
    bound = -dimensions / 2 * (1 + np.log(2 * np.pi * mse)) - rate
    assert float(row['elbo_optimal_sigma']) == pytest.approx(bound, rel=1e-5)
    elbo = -rate - float(row['distortion'])
    assert float(row['elbo']) == pytest.approx(elbo, rel=1e-6)
    # As the validation of that checkpoint saw it.
    (best,) = [
      r
      for r in metrics(workdir / 'points' / row['point'])
      if r['step'] == model.step and 'val/kl' in r
    ]
    assert rate == pytest.approx(best['val/kl'], rel=1e-3)
    images = input_pipeline.load(model.config).validation
    images = next(images.batches(np.arange(11), 11))
    squares = [
      np.sum((images / 255 - model.reconstruct(images, seed)) ** 2)
      for seed in range(200)
    ]
    distortion = np.mean(squares) / 11 / (2 * 0.1**2)
    distortion += dimensions / 2 * np.log(2 * np.pi * 0.1**2)
    # A few draws of z of a few images.
    assert float(row['distortion']) == pytest.approx(distortion, abs=15)


def test_optuna_has_the_same_record(finished):
  workdir, _, _ = finished
  study = optuna.load_study(
    study_name='faces', storage=f'sqlite:///{workdir}/sweep.db'
  )
  trials = study.get_trials()
  assert [t.state.name for t in trials] == ['COMPLETE'] * 6
  by_name = {row['point']: row for row in rows(workdir)}
  for trial in trials:
    row = by_name[trial.user_attrs['name']]
    assert trial.values == [float(row['rate']), float(row['distortion'])]


@pytest.mark.parametrize('width', [390, 1280])
def test_page_shows_all_points(finished, width):
  workdir, _, _ = finished
  seen = open_page(workdir / 'report.html', width)
  assert seen['scroll_width'] <= seen['width']
  assert 'All 6 points are complete' in seen['text']
  assert '://' not in (workdir / 'report.html').read_text()
  # Charts, and two strips a point.
  assert len(seen['pictures']) >= 13 and all(seen['pictures'])


def test_point_is_a_run_like_any_other(finished, celeba_dir, tmp_path):
  workdir, _, _ = finished
  point = workdir / 'points' / 'beta=1,latent_dim=3'
  code, out, err = run(
    f'--workdir={point}',
    '--metrics=reconstruction',
    f'--output={tmp_path}',
    script='evaluate.py',
  )
  assert code == 0, err
  flags = (
    *SMALL,
    f'--config.data.dir={celeba_dir}',
    '--config.objective.beta=1',
    '--config.model.latent_dim=3',
    '--config.train.num_epochs=22',
  )
  code, out, err = run(*flags, f'--workdir={point}')
  assert code == 0, err
  assert 'goes on from step 100' in out and 'Trained steps 101 to 110' in out


def test_finished_sweep_runs_nothing(finished):
  workdir, flags, _ = finished
  before = rows(workdir)
  (workdir / 'report.html').unlink()
  code, out, err = sweep(*flags, f'--workdir={workdir}')
  assert code == 0, err
  assert 'Trained' not in out and rows(workdir) == before
  assert (workdir / 'report.html').exists()


def test_one_by_one_is_the_same_sweep(finished, tmp_path):
  """Without a population: each its own program's run, up to rounding."""
  workdir, flags, _ = finished
  flags = (*flags, '--latent_dim=3', '--config.train.num_epochs=1')
  results = []
  for population in ('off', '2'):
    # As a pattern it is another name, and in a URL it ends in a query.
    place = tmp_path / f'[{population}]?'
    code, out, err = sweep(
      *flags, f'--workdir={place}', f'--population={population}'
    )
    assert code == 0, err
    results.append({row['point']: row for row in rows(place)})
    assert ('2 points together' in out) == (population == '2')
  for name, row in results[0].items():
    for metric in ('rate', 'distortion', 'elbo'):
      found = float(results[1][name][metric])
      assert found == pytest.approx(float(row[metric]), rel=0.01)


def test_interrupted_and_terminated_sweep_goes_on(finished, tmp_path):
  undisturbed, flags, _ = finished
  flags = (*flags, f'--workdir={tmp_path}/sweep')
  # Saves at every chance, so that there is time to be interrupted.
  often = '--config.checkpoint.every_minutes=1e-9'
  point = tmp_path / 'sweep' / 'points' / 'beta=0.05,latent_dim=2'
  for number, status, said in (
    (signal.SIGINT, 130, 'interrupted'),
    (signal.SIGUSR1, 0, 'terminated'),
  ):
    told = len(metrics_of_a_killed_run(point))
    process = start(*flags, often, script='sweep.py')
    deadline = time.monotonic() + 200
    while len(metrics_of_a_killed_run(point)) < told + 3:
      assert time.monotonic() < deadline and process.poll() is None
      time.sleep(0.005)
    with pytest.raises(UserError, match=f'in use by process {process.pid}'):
      try_to_hold(point)
    process.send_signal(number)
    # Within seconds; the limit is for a busy machine.
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err.endswith(f'\n{said}; the same command goes on.\n')
    assert 'Traceback' not in err
    # All that was told is saved.
    (step,) = re.findall(r'Stopped at step (\d+), which is saved', out)
    assert Checkpoints(point).latest_step() == int(step) < 100
    assert metrics(point)[-1]['step'] <= int(step)
  code, out, err = sweep(*flags)
  assert code == 0, err
  assert f'goes on from step {step}' in out
  # But for how fast it was, the table of a sweep that nothing disturbed.
  tables = rows(tmp_path / 'sweep'), rows(undisturbed)
  for row in (*tables[0], *tables[1]):
    del row['images_per_second'], row['seconds']
  assert tables[0] == tables[1]


def test_three_workers_of_which_one_is_killed(celeba_dir, tmp_path):
  """On one PostgreSQL study: every point done exactly once, none lost."""
  workdir = tmp_path / 'shared'
  with postgres.server() as server:
    flags = (
      *SMALL,
      f'--config.data.dir={celeba_dir}',
      '--config.checkpoint.every_minutes=1e-9',
      '--beta=0.5,2',
      '--seed=0,1',
      '--population=1',
      f'--workdir={workdir}',
      f'--storage={server.url}',
    )
    workers = [start(*flags, script='sweep.py') for _ in range(3)]
    # The others cannot have done all the points yet.
    victim, point = wait_for_first_point(server.url, workers)
    deadline = time.monotonic() + 200
    while len(metrics(workdir / 'points' / point)) < 4:
      assert time.monotonic() < deadline and victim.poll() is None
      time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    outputs = [w.communicate(timeout=300) for w in workers if w is not victim]
    assert [w.returncode for w in workers if w is not victim] == [0, 0], outputs
    # The dead worker's point was noticed, and taken up where it stood.
    said = ''.join(out for out, _ in outputs)
    assert f'{point}: its worker died' in said
    assert f'{point}: this run goes on from step' in said
    study = optuna.load_study(
      study_name='shared', storage=open_storage(server.url)
    )
    trials = study.get_trials()
  complete = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
  names = [t.user_attrs['name'] for t in complete]
  assert len(names) == len(set(names)) == 4
  assert all('void' in t.user_attrs for t in trials if t not in complete)
  assert 'worker lost' in [t.user_attrs.get('void') for t in trials]
  assert {row['state'] for row in rows(workdir)} == {'complete'}
  # In the bits of a run that nothing disturbed.
  config = json.loads((workdir / 'points' / point / 'config.json').read_text())
  alone = tmp_path / 'alone'
  code, _, err = run(
    *flags[:-5],
    f'--config.objective.beta={config["objective"]["beta"]}',
    f'--config.seed={config["seed"]}',
    f'--workdir={alone}',
  )
  assert code == 0, err
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(workdir / 'points' / point),
    final_state(alone),
  )


def wait_for_first_point(url, workers):
  """The first worker that has a point, and the point's name."""
  by_pid = {worker.pid: worker for worker in workers}
  deadline = time.monotonic() + 200
  while time.monotonic() < deadline:
    assert all(worker.poll() is None for worker in workers)
    time.sleep(0.1)
    try:
      study = optuna.load_study(study_name='shared', storage=url)
    except Exception:  # There is no table yet, or no study.
      continue
    for trial in study.get_trials():
      pid = trial.user_attrs.get('worker', {}).get('pid')
      if pid in by_pid and trial.state == optuna.trial.TrialState.RUNNING:
        return by_pid[pid], trial.user_attrs['name']
  raise AssertionError('no worker has taken a point')


def test_failed_point_is_recorded_and_the_others_go_on(
  finished, celeba_dir, tmp_path
):
  flags = (
    *SMALL,
    f'--config.data.dir={celeba_dir}',
    '--config.train.num_epochs=2',
    '--grid=config.optimizer.learning_rate=0.001,1000',
    f'--workdir={tmp_path}/sweep',
  )
  code, out, err = sweep(*flags)
  assert code == 0, err
  fine, diverged = rows(tmp_path / 'sweep')
  assert fine['state'] == 'complete' and float(fine['rate']) > 0
  assert diverged['state'] == 'failed' and 'diverged' in diverged['error']
  assert 'failed: learning_rate=1000: diverged' in out
  # Not again, unless asked to.
  _, out, _ = sweep(*flags)
  assert 'Trained' not in out and 'failed: learning_rate=1000' in out


def test_search_finds_points(celeba_dir, tmp_path):
  flags = (
    *SMALL,
    f'--config.data.dir={celeba_dir}',
    '--config.train.num_epochs=2',
    '--beta=0.1:10:log',
    '--latent_dim=2:4',
    '--num_points=5',
    '--sampler=random',
    f'--workdir={tmp_path}/search',
  )
  code, _, err = sweep(*flags)
  assert code == 0, err
  found = rows(tmp_path / 'search')
  assert [row['state'] for row in found] == ['complete'] * 5
  assert all(0.1 <= float(row['objective.beta']) <= 10 for row in found)
  assert (tmp_path / 'search' / 'report.html').exists()


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--beta='], '--beta=: an empty value'),
    (['--beta=1,,2'], '--beta=1,,2: an empty value'),
    (['--beta=-1,2'], 'config.objective.beta is -1.0; it must be at least 0'),
    (['--beta=1,1.0'], 'has the value 1 twice'),
    (['--beta=1', '--grid=config.objective.beta=2'], 'are given twice'),
    (['--grid=config.objective.betta=2'], 'there is no such key'),
    (['--grid=objective.beta=2'], 'the form is config.GROUP.NAME'),
    (['--latent_dim=2:4'], '--num_points=N searches'),
    (['--beta=1', '--sampler=random'], '--sampler goes with --num_points'),
    (['--beta=1', '--population=many'], 'auto, off or a number'),
    (['--beta=1', '--metrics=bound'], '--metrics: there is no bound'),
    (['--beta=1', '--num_points=2', '--objectives=x'], 'there is no x'),
    (['--beta=1', '--num_points=2', '--retry_failed'], 'goes with a grid'),
    (['--grid=config.model.hidden_channels=8,16'], 'a tuple, each entry'),
    (['--beta=1', '--storage=postgresql://u:p@127.0.0.1:1/x'], 'be reached'),
    ([], 'there is nothing to vary'),
    (['--latent_dim=2,1000000000'], 'model.latent_dim=1000000000'),
    (['--latent_dim=2:1000000000', '--num_points=2'], 'GB free'),
    (['--beta=1,2', '--config.train.batch_size=1000000000'], 'GB free'),
  ],
)
def test_mistakes_get_one_line(flags, said, tmp_path):
  code, out, err = sweep(*SMALL, *flags, f'--workdir={tmp_path}/w')
  assert code == 2
  assert out == ''
  assert said in err and err.count('\n') == 1 and 'Traceback' not in err


@pytest.mark.parametrize(
  ('axes', 'said'),
  [
    ("{'objective.betta': [1.0]}", 'config.objective.betta: there is no such'),
    ("{'objective.beta': ['1']}", "config.objective.beta is '1'"),
    ("{'model.latent_dim': [8.0]}", 'config.model.latent_dim is 8.0'),
    ("{'objective.beta': 1.0}", 'each with a list of values'),
    ("{'objective.beta': [1.0, 1]}", 'has the value 1 twice'),
  ],
)
def test_mistakes_in_a_config_get_one_line(axes, said, tmp_path):
  config = tmp_path / 'some.py'
  config.write_text(
    'from configs.celeba import get_config\n\n\ndef sweep():\n'
    f'  return {axes}\n'
  )
  code, out, err = sweep(f'--config={config}', f'--workdir={tmp_path}/w')
  assert code == 2 and out == ''
  assert said in err and err.count('\n') == 1 and 'Traceback' not in err


def test_mistake_in_the_data_leaves_no_sweep(celeba_dir, tmp_path):
  flags = (*SMALL, '--beta=1', f'--workdir={tmp_path}/w')
  code, _, err = sweep(*flags, '--config.data.dir=/nowhere')
  assert code == 2 and '/nowhere' in err and err.count('\n') == 1
  flags = (*flags, f'--config.data.dir={celeba_dir}')
  code, _, err = sweep(*flags, '--grid=config.train.batch_size=8,5000')
  assert code == 2 and 'batch_size is 5000' in err
  # The advice can be followed in the same workdir.
  code, _, err = sweep(*flags, '--config.train.num_epochs=1')
  assert code == 0, err


def test_workdir_of_another_sweep_is_refused(finished):
  workdir, flags, _ = finished
  before = rows(workdir)
  code, _, err = sweep(*flags, f'--workdir={workdir}', '--config.seed=3')
  assert code == 2 and 'holds another sweep: config seed was 1265' in err
  code, _, err = sweep(*flags, f'--workdir={workdir}', '--latent_dim=3')
  assert code == 2 and 'model.latent_dim was [2, 3] and is now [3]' in err
  assert rows(workdir) == before


def test_workdir_of_a_run_is_refused(trained_run):
  code, _, err = sweep(*SMALL, '--beta=1,2', f'--workdir={trained_run}')
  assert code == 2 and 'holds a run' in err
