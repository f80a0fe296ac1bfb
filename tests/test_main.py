"""End to end, as a user does it: `python main.py` in a process of its own."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
import pytest
from scipy import stats

import input_pipeline
from tests.conftest import ROOT, SPLIT_SIZES
from tests.ports import free_port
from tests.preloaded import program_lines, run
import vae
from vae import models, numerics
from vae.checkpoints import Checkpoints
from vae.loading import read_config

SMALL = (
  '--config=configs/celeba.py',
  '--config.data.image_size=16',
  '--config.data.decoded_dir=',
  '--config.model.hidden_channels=(4,8)',
  '--config.model.latent_dim=3',
  '--config.train.batch_size=8',
  '--config.train.num_epochs=3',
  '--config.train.steps_per_dispatch=2',
  '--config.train.log_every_steps=2',
)
pytestmark = pytest.mark.usefixtures('users_programs')

# Five steps an epoch.
assert SPLIT_SIZES[0] // 8 == 5


def start(*flags, script='main.py', devices=1, **environment):
  environment = dict(
    os.environ,
    XLA_FLAGS=f'{os.environ["XLA_FLAGS"]} '
    f'--xla_force_host_platform_device_count={devices}',
    JAX_PLATFORMS='cpu',
    **environment,
  )
  return subprocess.Popen(
    [sys.executable, script, *flags],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_two(*flags, devices=1):
  """Both processes of a run."""
  flags = *flags, '--distributed', '--num_processes=2'
  flags = *flags, f'--coordinator_address=127.0.0.1:{free_port()}'
  return [
    start(*flags, f'--process_id={index}', devices=devices)
    for index in range(2)
  ]


def finish(process):
  out, err = process.communicate(timeout=600)
  return process.returncode, out, program_lines(err)


def metrics(workdir):
  """The rows, without a last line that a kill cut short."""
  path = workdir / 'metrics.jsonl'
  text = path.read_text() if path.exists() else ''
  return [json.loads(line) for line in text.split('\n')[:-1]]


def final_state(workdir):
  """The last checkpoint's step, and its arrays, read by Orbax alone."""
  step = Checkpoints(workdir).all_steps()[-1]
  with ocp.StandardCheckpointer() as orbax:
    folder = epath.Path(workdir) / 'checkpoints' / str(step) / 'default'
    return step, orbax.restore(folder)


def check_same(workdir, other):
  """The same bits, the same rows but for the speed, and the same best."""
  states = final_state(workdir), final_state(other)
  jax.tree.map(np.testing.assert_array_equal, *states)
  rows = metrics(workdir), metrics(other)
  for row in (*rows[0], *rows[1]):
    row.pop('images_per_second', None)
  assert rows[0] == rows[1]
  best = [Checkpoints(w).best_step() for w in (workdir, other)]
  assert best[0] == best[1]


@pytest.fixture(scope='module')
def finished(celeba_dir, tmp_path_factory):
  """An undisturbed run, its flags and its output."""
  workdir = tmp_path_factory.mktemp('run')
  flags = (*SMALL, f'--config.data.dir={celeba_dir}')
  code, out, err = finish(start(*flags, f'--workdir={workdir}'))
  assert code == 0, err
  return workdir, flags, out


def test_output_and_pictures_are_complete(finished):
  workdir, _, out = finished
  order = ('Training ', 'Compiling …', 'step ', 'Trained steps 1 to 15')
  assert sorted(order, key=out.index) == list(order)
  assert out.count('Compiling …\n') == 1
  side = 12 * 18 - 2
  for epoch in (1, 2, 3):
    for name in ('samples', 'reconstructions'):
      path = workdir / name / f'epoch_{epoch:04d}.png'
      # 11 validation images make 22 pictures, two rows of 12.
      size = (side, side) if name == 'samples' else (side, 34)
      assert Image.open(path).size == size
  assert f'{workdir}/samples/epoch_0003.png' in out


def test_metrics_and_checkpoints_are_complete(finished):
  workdir, _, _ = finished
  rows = metrics(workdir)
  train = [row for row in rows if 'train/loss' in row]
  val = [row for row in rows if 'val/loss' in row]
  # 5 steps an epoch: at its multiples of 2, and at its end.
  assert [row['step'] for row in train] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
  assert [row['step'] for row in val] == [5, 10, 15]
  assert [row['epoch'] for row in val] == [1, 2, 3]
  parts = {'loss', 'elbo', 'distortion', 'kl', 'mse'}
  for row in train:
    names = {f'train/{part}' for part in (*parts, 'grad_norm')}
    names |= {'step', 'epoch', 'learning_rate', 'images_per_second'}
    assert row.keys() == names
    assert row['epoch'] == pytest.approx(row['step'] / 5)
    epoch = (row['step'] - 1) // 5
    assert row['learning_rate'] == pytest.approx(0.005 * 0.95**epoch)
  for row in val:
    assert row.keys() == {'step', 'epoch'} | {f'val/{part}' for part in parts}
    # The parts add up, in nats per image.
    d, kl = row['val/distortion'], row['val/kl']
    assert row['val/elbo'] == pytest.approx(-(d + kl))
    assert row['val/loss'] == pytest.approx(d + 1.536 * kl)
    constant = 768 / 2 * np.log(2 * np.pi)
    assert d == pytest.approx(768 / 2 * row['val/mse'] + constant)
  losses = {row['step']: row['val/loss'] for row in val}
  best_two = sorted(losses, key=losses.get)[:2]
  assert Checkpoints(workdir).all_steps() == sorted({*best_two, 10, 15})


def test_validation_is_that_of_the_checkpoint(finished):
  """The logged metrics, recomputed from the files and the checkpoint.

  In one batch and without pmap; z is drawn by each example's own key.
  """
  workdir, _, _ = finished
  config = read_config(workdir)
  _, state = final_state(workdir)
  split = input_pipeline.load(config).validation
  images = next(split.batches(np.arange(11), 11)) / np.float32(255)
  model = models.from_config(config).bind(
    {'params': state['params'], **state['collections']}
  )
  posterior = model.encode(images)
  keys = jax.vmap(lambda i: jax.random.fold_in(numerics.eval_key(1265), i))(
    np.arange(11)
  )
  epsilon = [
    jax.random.normal(jax.random.split(key, 3)[2], (3, 1))[:, 0] for key in keys
  ]
  scale = np.exp(posterior.logvar / 2)
  z = posterior.mean + scale * np.stack(epsilon)
  decoded = np.asarray(model.decode(z).mean)
  ratio = scale**2 + posterior.mean**2 - 1 - posterior.logvar
  last = [row for row in metrics(workdir) if 'val/kl' in row][-1]
  kl = float(ratio.sum(axis=-1).mean()) / 2
  assert last['val/kl'] == pytest.approx(kl, rel=1e-4)
  mse = float(np.mean((decoded - images) ** 2))
  assert last['val/mse'] == pytest.approx(mse, rel=1e-5)
  log_prob = stats.norm.logpdf(images, decoded).sum(axis=(1, 2, 3)).mean()
  assert last['val/elbo'] == pytest.approx(float(log_prob) - kl, rel=1e-5)


def test_finished_run_is_left_as_it_is(finished):
  workdir, flags, _ = finished
  before = metrics(workdir)
  code, out, _ = run(*flags, f'--workdir={workdir}')
  assert code == 0 and 'finished, at step 15' in out
  code, _, err = run(*flags, f'--workdir={workdir}', '--config.seed=3')
  assert code == 2 and 'config.seed was 1265 and is now 3' in err
  assert metrics(workdir) == before


@pytest.mark.slow
def test_killed_run_ends_in_the_same_bits(finished, tmp_path):
  """SIGKILL in the middle of a run, and a start with images on the device."""
  workdir, flags, _ = finished
  killed = tmp_path / 'lr=[0.1]'  # As a pattern it does not match itself.
  flags = (*flags, f'--workdir={killed}')
  process = start(*flags, '--config.checkpoint.every_minutes=1e-9')
  saved = Checkpoints(killed)
  while len(metrics(killed)) < 4 or not saved.all_steps():
    assert process.poll() is None
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert saved.all_steps()[-1] < 15, 'killed too late'
  other = ('--config.data.cache=device', '--config.train.steps_per_dispatch=0')
  code, _, err = run(*flags, *other)
  assert code == 0, err
  assert final_state(killed)[0] == 15
  check_same(killed, workdir)
  assert vae.load(killed).step == Checkpoints(workdir).best_step()


@pytest.mark.slow
def test_two_processes_in_float64_are_the_run_of_one(celeba_dir, tmp_path):
  """Two of two devices each, as Slurm starts them: 10 steps, 2 validations."""
  flags = (
    *SMALL,
    f'--config.data.dir={celeba_dir}',
    '--config.train.num_epochs=2',
    '--config.model.dtype=float64',
    '--config.train.log_every_steps=1',
  )
  processes = [
    start(*flags, f'--workdir={tmp_path}/one', JAX_ENABLE_X64='1'),
    *(
      start(
        *flags,
        f'--workdir={tmp_path}/two',
        '--config.checkpoint.every_minutes=1e-9',
        '--config.data.cache=device',
        '--distributed',
        devices=2,
        JAX_ENABLE_X64='1',
        # The port is made of the job's number.
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_STEP_NODELIST='127.0.0.1',
        SLURM_NTASKS='2',
        SLURM_PROCID=str(process_id),
        SLURM_LOCALID=str(process_id),
      )
      for process_id in range(2)
    ),
  ]
  outputs = [p.communicate(timeout=600) for p in processes]
  assert [p.returncode for p in processes] == [0, 0, 0], outputs
  # The first reports for both.
  assert 'Trained steps 1 to 10' in outputs[1][0]
  assert 'Trained' not in outputs[2][0]
  one, two = metrics(tmp_path / 'one'), metrics(tmp_path / 'two')
  assert [row['step'] for row in two] == [row['step'] for row in one]
  assert sum('train/loss' in row for row in one) == 10
  for ours, theirs in zip(two, one, strict=True):
    for name in ('train/loss', 'val/loss', 'val/mse'):
      if name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-9)


@pytest.mark.slow
def test_processes_of_other_configs_do_not_train_together(finished, tmp_path):
  _, flags, _ = finished
  flags = (*flags, f'--workdir={tmp_path}/w', '--num_processes=2')
  address = f'--coordinator_address=127.0.0.1:{free_port()}'
  processes = [
    start(
      *(*flags, '--distributed', address, f'--process_id={i}'),
      f'--config.objective.beta={1 + i}',
    )
    for i in range(2)
  ]
  for process in processes:
    code, _, err = finish(process)
    assert code == 2 and err.count('\n') == 1 and 'different configs' in err
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_checkpoint_of_one_device_continues_on_eight(finished, tmp_path):
  workdir, flags, _ = finished
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints' / '15')
  code, out, err = run(*flags, f'--workdir={tmp_path}', devices=8)
  assert code == 0 and 'from step 10.' in out, err
  ours, theirs = (
    {row['step']: row.get('train/loss') for row in metrics(folder)}
    for folder in (tmp_path, workdir)
  )
  assert ours[12] == pytest.approx(theirs[12], rel=1e-5)


def test_mistakes_get_one_line(tmp_path):
  for flag, message in (
    ('--process_id=1', 'go with --distributed'),
    ('--config.model.name=convv', 'conv, fsq, mlp, residual'),
    ('--config.train.batch_size=20', 'a multiple of the 8 devices'),
  ):
    code, out, err = run(flag, f'--workdir={tmp_path}/w', devices=8)
    assert (code, out) == (2, '') and message in err
    assert err.count('\n') == 1 and 'Traceback' not in err
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  ('number', 'status', 'message'),
  [
    (signal.SIGINT, 130, 'interrupted; the same command'),
    pytest.param(
      *(signal.SIGTERM, 0, 'terminated; the same command'),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_signal_ends_in_order_and_saves_everything(
  finished, tmp_path, number, status, message
):
  _, flags, _ = finished
  flags = (*flags, f'--workdir={tmp_path}', '--config.train.num_epochs=10000')
  process = start(*flags)
  while 'step' not in process.stdout.readline():
    assert process.poll() is None
  if number == signal.SIGTERM:  # No other run gets into the workdir.
    code, _, err = run(*flags)
    assert code == 2 and err.count('\n') == 1
    assert f'{tmp_path} is in use by process {process.pid} on ' in err
  process.send_signal(number)
  out, err = process.communicate(timeout=120)
  assert process.returncode == status
  assert message in err.splitlines()[-1] and 'Traceback' not in err
  stopped = re.search(r'Stopped at step ([0-9,]+), which is saved', out)
  step = int(stopped.group(1).replace(',', ''))
  assert Checkpoints(tmp_path).all_steps()[-1] == step > 0


@pytest.mark.slow
def test_disk_that_takes_nothing_for_a_while_loses_nothing(finished, tmp_path):
  """No file of this process may grow beyond 4 kB until it has complained."""
  workdir, flags, _ = finished
  process = start(*flags, f'--workdir={tmp_path}')
  unlimited, limit = resource.RLIM_INFINITY, resource.RLIMIT_FSIZE
  resource.prlimit(process.pid, limit, (4096, unlimited))
  errors = ['']
  while 'the checkpoint of step' not in errors[-1]:
    errors.append(process.stderr.readline())
    assert process.poll() is None
  resource.prlimit(process.pid, limit, (unlimited, unlimited))
  _, err = process.communicate(timeout=300)
  err = ''.join([*errors, err])
  assert process.returncode == 0, err
  # Each thing once, and when it is over.
  complaints = re.findall('the checkpoint of step .* cannot be written', err)
  assert len(complaints) == 1
  assert 'could be written' in err and 'metrics.jsonl' not in err
  assert 'File too large' in err and 'Traceback' not in err
  check_same(tmp_path, workdir)
