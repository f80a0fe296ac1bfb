"""End to end, as a user has it: `python main.py` in a process of its own."""

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

import input_pipeline
from runs import workdirs
from tests.conftest import ROOT
from tests.conftest import SPLIT_SIZES
from tests.ports import free_port
from tests.preloaded import program_lines
from tests.preloaded import run
import vae
from vae import checkpoints
from vae import model as models
from vae import randomness

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
# 40 images in batches of 8.
STEPS_PER_EPOCH = SPLIT_SIZES[0] // 8


def start(*flags, script='main.py', devices=1, **environment):
  environment = dict(
    os.environ,
    XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}',
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


def finish(process):
  out, err = process.communicate(timeout=600)
  return process.returncode, out, program_lines(err)


def metrics(workdir):
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def metrics_of_a_killed_run(workdir):
  """As `metrics`, but for a last line that was cut short."""
  path = workdir / 'metrics.jsonl'
  text = path.read_text() if path.exists() else ''
  return [json.loads(line) for line in text.split('\n')[:-1]]


def final_state(workdir):
  """The last checkpoint's arrays, read by Orbax alone."""
  saved = checkpoints.Checkpoints(workdir)
  step = saved.latest_step()
  with ocp.StandardCheckpointer() as orbax:
    return step, orbax.restore(saved.directory / str(step) / 'default')


def check_same(workdir, other):
  """The same bits, the same rows but for the speed, and the same best."""
  states = final_state(workdir), final_state(other)
  jax.tree.map(np.testing.assert_array_equal, *states)
  rows = metrics(workdir), metrics(other)
  for row in (*rows[0], *rows[1]):
    row.pop('images_per_second', None)
  assert rows[0] == rows[1]
  best = [checkpoints.Checkpoints(w).best_step() for w in (workdir, other)]
  assert best[0] == best[1]


@pytest.fixture(scope='module')
def finished(celeba_dir, tmp_path_factory):
  """An undisturbed run, its flags and what it printed."""
  workdir = tmp_path_factory.mktemp('run')
  flags = (*SMALL, f'--config.data.dir={celeba_dir}')
  code, out, err = finish(start(*flags, f'--workdir={workdir}'))
  assert code == 0, err
  return workdir, flags, out


def test_compilation_is_announced_once_before_the_first_steps(finished):
  _, _, out = finished
  assert out.count('Compiling …\n') == 1
  order = ('Training ', 'Compiling …', 'step ')
  assert sorted(order, key=out.index) == list(order)


def test_metrics_are_complete(finished):
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
    names = {f'train/{part}' for part in parts}
    names |= {'step', 'epoch', 'learning_rate', 'images_per_second'}
    names |= {'train/grad_norm'}
    assert row.keys() == names
    assert row['epoch'] == pytest.approx(row['step'] / 5)
    epoch = (row['step'] - 1) // 5
    assert row['learning_rate'] == pytest.approx(0.005 * 0.95**epoch)
  for row in val:
    assert row.keys() == {'step', 'epoch'} | {f'val/{part}' for part in parts}
    # How the parts hang together, in nats per image.
    d, kl = row['val/distortion'], row['val/kl']
    assert row['val/elbo'] == pytest.approx(-(d + kl))
    assert row['val/loss'] == pytest.approx(d + 1.536 * kl)
    constant = 768 / 2 * np.log(2 * np.pi)
    assert d == pytest.approx(768 / 2 * row['val/mse'] + constant)


def test_validation_is_that_of_the_checkpoint(finished):
  """The metrics in the log, recomputed from the files and the checkpoint.

  In one batch and without pmap; z is drawn by each example's own key.
  """
  workdir, _, _ = finished
  config = workdirs.load_config(epath.Path(workdir))
  _, state = final_state(workdir)
  model = models.from_config(config)
  split = input_pipeline.load(config).validation
  images = next(split.batches(np.arange(11), 11)) / np.float32(255)
  variables = {'params': state['params'], 'batch_stats': state['batch_stats']}
  mean, logvar = model.apply(variables, images, method='encode')
  keys = jax.vmap(lambda i: jax.random.fold_in(randomness.eval_key(1265), i))(
    np.arange(11)
  )
  epsilon = [
    jax.random.normal(jax.random.split(key, 3)[2], (1, 3))[0] for key in keys
  ]
  z = mean + np.exp(logvar / 2) * np.stack(epsilon)
  decoded = model.apply(variables, z, method='decode')
  kl = 0.5 * np.sum(mean**2 + np.exp(logvar) - 1 - logvar, axis=-1)
  last = [row for row in metrics(workdir) if 'val/kl' in row][-1]
  assert last['val/kl'] == pytest.approx(float(kl.mean()), rel=1e-4)
  mse = np.mean((np.asarray(decoded) - images) ** 2)
  assert last['val/mse'] == pytest.approx(float(mse), rel=1e-5)


def test_pictures_and_checkpoints_are_there(finished):
  workdir, _, out = finished
  side = 12 * 18 - 2
  for epoch in (1, 2, 3):
    for name in ('samples', 'reconstructions'):
      path = workdir / name / f'epoch_{epoch:04d}.png'
      size = Image.open(path).size
      # 11 validation images make 22 pictures, two rows of 12.
      assert size == ((side, side) if name == 'samples' else (side, 34))
  assert f'{workdir}/samples/epoch_0003.png' in out
  losses = {
    row['step']: row['val/loss']
    for row in metrics(workdir)
    if 'val/loss' in row
  }
  best_two = sorted(losses, key=losses.get)[:2]
  assert checkpoints.Checkpoints(workdir).all_steps() == sorted(
    {*best_two, 10, 15}
  )


def test_finished_run_says_so(finished):
  workdir, flags, _ = finished
  before = metrics(workdir)
  code, out, _ = run(*flags, f'--workdir={workdir}')
  assert code == 0 and 'finished, at step 15' in out
  assert metrics(workdir) == before


def test_killed_run_ends_in_the_same_bits(finished, tmp_path):
  """SIGKILL in the middle of a run, and another start."""
  workdir, flags, _ = finished
  # Which fits as a pattern no name of its own.
  killed = tmp_path / 'lr=[0.1]'
  flags = (*flags, f'--workdir={killed}')
  often = '--config.checkpoint.every_minutes=1e-9'
  process = start(*flags, often)
  deadline = time.monotonic() + 200
  while len(metrics(killed)) < 4 and time.monotonic() < deadline:
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert 0 < checkpoints.Checkpoints(killed).latest_step() < 15, (
    'killed too early or late'
  )
  code, out, err = run(*flags)
  assert code == 0, err
  assert 'goes on from step' in out
  assert final_state(killed)[0] == 15
  check_same(killed, workdir)
  assert vae.load(killed).step == checkpoints.Checkpoints(workdir).best_step()


@pytest.mark.parametrize('cache', ['none', 'device'])
def test_where_images_are_kept_changes_nothing(finished, tmp_path, cache):
  """Nor do the steps of a dispatch."""
  workdir, flags, _ = finished
  code, _, err = run(
    *flags,
    f'--workdir={tmp_path}',
    f'--config.data.cache={cache}',
    '--config.train.steps_per_dispatch=0',
  )
  assert code == 0, err
  check_same(tmp_path, workdir)


def test_contradicting_config_is_refused(finished):
  workdir, flags, _ = finished
  code, _, err = run(*flags, f'--workdir={workdir}', '--config.seed=3')
  assert code == 2
  assert 'config.seed was 1265 and is now 3' in err


def test_two_processes_are_the_run_of_one(finished, tmp_path):
  """Two of two devices each, as Slurm starts them; images on all four."""
  workdir, flags, _ = finished
  processes = [
    start(
      *flags,
      f'--workdir={tmp_path}',
      '--config.checkpoint.every_minutes=1e-9',
      '--config.data.cache=device',
      '--distributed',
      devices=2,
      # The port is made of the job's number.
      SLURM_JOB_ID=str(os.getpid()),
      SLURM_STEP_NODELIST='127.0.0.1',
      SLURM_NTASKS='2',
      SLURM_PROCID=str(process_id),
      SLURM_LOCALID=str(process_id),
    )
    for process_id in range(2)
  ]
  outputs = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  # The first speaks for both.
  assert 'Trained steps 1 to 15' in outputs[0][0]
  assert 'Trained' not in outputs[1][0]
  assert final_state(tmp_path)[0] == 15
  one, two = metrics(workdir), metrics(tmp_path)
  assert [row['step'] for row in two] == [row['step'] for row in one]
  # In float32 runs part after the first steps: see test_training.py.
  assert two[0]['train/loss'] == pytest.approx(one[0]['train/loss'], rel=1e-5)
  assert two[-1]['val/loss'] == pytest.approx(one[-1]['val/loss'], rel=0.02)


def test_processes_of_other_configs_do_not_train_together(finished, tmp_path):
  _, flags, _ = finished
  address = f'127.0.0.1:{free_port()}'
  processes = [
    start(
      *flags,
      f'--workdir={tmp_path}/w',
      '--distributed',
      f'--coordinator_address={address}',
      '--num_processes=2',
      f'--process_id={process_id}',
      f'--config.objective.beta={1 + process_id}',
    )
    for process_id in range(2)
  ]
  for process, said in zip(
    processes, ('have different configs',) * 2, strict=True
  ):
    code, _, err = finish(process)
    assert code == 2, err
    assert err.count('\n') == 1 and said in err
  assert not (tmp_path / 'w').exists()


def test_two_processes_in_float64_are_the_run_of_one(celeba_dir, tmp_path):
  """Where rounding cannot hide an error: 20 steps, and 4 validations."""
  flags = (
    *SMALL,
    f'--config.data.dir={celeba_dir}',
    '--config.model.dtype=float64',
    '--config.train.num_epochs=4',
    '--config.train.log_every_steps=1',
  )
  address = f'127.0.0.1:{free_port()}'
  processes = [
    start(*flags, f'--workdir={tmp_path}/one', JAX_ENABLE_X64='1'),
    *(
      start(
        *flags,
        f'--workdir={tmp_path}/two',
        '--distributed',
        f'--coordinator_address={address}',
        '--num_processes=2',
        f'--process_id={process_id}',
        devices=2,
        JAX_ENABLE_X64='1',
      )
      for process_id in range(2)
    ),
  ]
  for process in processes:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  one, two = metrics(tmp_path / 'one'), metrics(tmp_path / 'two')
  assert [row['step'] for row in two] == [row['step'] for row in one]
  assert sum('train/loss' in row for row in one) == 20
  for ours, theirs in zip(two, one, strict=True):
    for name in ('train/loss', 'val/loss', 'val/mse'):
      if name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-9)


def test_checkpoint_of_eight_devices_goes_on_with_any_number(
  celeba_dir, tmp_path
):
  flags = (*SMALL, f'--config.data.dir={celeba_dir}')
  code, _, err = run(
    *flags,
    f'--workdir={tmp_path}/8',
    '--config.train.num_epochs=1',
    devices=8,
  )
  assert code == 0, err
  _, saved = final_state(tmp_path / '8')
  losses = {}
  for devices in (8, 4, 1):
    workdir = shutil.copytree(tmp_path / '8', tmp_path / f'{devices}_more')
    code, out, err = run(
      *flags,
      f'--workdir={workdir}',
      '--config.train.num_epochs=2',
      '--config.train.steps_per_dispatch=1',
      '--config.train.log_every_steps=1',
      devices=devices,
    )
    assert code == 0 and 'goes on from step 5.' in out, err
    (losses[devices],) = [
      row['train/loss'] for row in metrics(workdir) if row['step'] == 6
    ]
    with ocp.StandardCheckpointer() as orbax:
      again = orbax.restore(workdir / 'checkpoints' / '5' / 'default')
    jax.tree.map(np.testing.assert_array_equal, again, saved)
  assert losses[4] == pytest.approx(losses[8], rel=1e-5)
  assert losses[1] == pytest.approx(losses[8], rel=1e-5)


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--distributed'], '--distributed: '),
    (['--process_id=1'], '--process_id go with --distributed'),
    (['--config.objective.betta=1'], '--config.objective.betta: there is no'),
    (['--config.model.latent_dim=many'], 'latent_dim=many'),
    (['--config.objective.beta=nan'], 'config.objective.beta is nan'),
    (['--config=configs/nowhere.py'], 'configs/nowhere.py: there is no such'),
    (['--confg=configs/faces.py'], "Unknown command line flag 'confg'"),
    (['--config.train.batch_size=20'], 'a multiple of the 8 devices'),
    (['beta=3'], "'beta=3' is not a flag"),
  ],
)
def test_mistakes_get_one_line(flags, said, tmp_path):
  code, out, err = run(*flags, f'--workdir={tmp_path}/w', devices=8)
  assert code == 2
  assert out == ''
  assert said in err and err.count('\n') == 1 and 'Traceback' not in err
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  ('body', 'said'),
  [
    ('  return 1 / 0\n', 'broken.py, line 3: ZeroDivisionError'),
    ('  config.objective.beta = "4"\n  return config\n', 'broken.py, line 3'),
    ('  config.bata = 4\n  return config\n', 'config.bata: there is no such'),
    ('  pass\n', 'the config is None'),
  ],
)
def test_config_that_fails_gets_one_line(tmp_path, body, said):
  config = tmp_path / 'broken.py'
  config.write_text(
    'from configs import default\n'
    'def get_config(config=default.get_config()):\n' + body
  )
  code, _, err = run(f'--config={config}', f'--workdir={tmp_path}/w')
  assert code == 2 and said in err
  # ml_collections has a word of its own to say where nothing was returned.
  assert [line[:6] for line in err.splitlines()][-1] == 'error:'
  assert err.count('error:') == 1 and 'Traceback' not in err


@pytest.mark.parametrize(
  ('number', 'status', 'said'),
  [
    (signal.SIGINT, 130, 'interrupted; the same command goes on.\n'),
    (signal.SIGTERM, 0, 'terminated; the same command goes on.\n'),
    (signal.SIGUSR1, 0, 'terminated; the same command goes on.\n'),
  ],
)
def test_signal_ends_in_order_with_all_that_was_done(
  finished, tmp_path, number, status, said
):
  _, flags, _ = finished
  flags = (*flags, f'--workdir={tmp_path}', '--config.train.num_epochs=10000')
  process = start(*flags)
  while 'step' not in process.stdout.readline():
    assert process.poll() is None
  # No other run comes in between.
  code, _, err = run(*flags)
  assert code == 2 and err.count('\n') == 1
  assert f'{tmp_path} is in use by process {process.pid} on ' in err
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert process.returncode == status
  assert err.endswith(f'\n{said}') and 'Traceback' not in err
  stopped = re.search(r'Stopped at step ([0-9,]+), which is saved', out)
  step = int(stopped.group(1).replace(',', ''))
  assert checkpoints.Checkpoints(tmp_path).latest_step() == step > 0


def test_interrupt_counts_where_nobody_reads_what_is_said(finished, tmp_path):
  """As in `python main.py 2>&1 | tee log`, where Ctrl-C ends tee too."""
  _, flags, _ = finished
  process = start(
    *flags, f'--workdir={tmp_path}', '--config.train.num_epochs=10000'
  )
  while 'step' not in process.stdout.readline():
    assert process.poll() is None
  process.stdout.close()
  process.stderr.close()
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=60) == 130
  rows = [row['step'] for row in metrics(tmp_path)]
  assert checkpoints.Checkpoints(tmp_path).latest_step() >= max(rows) > 0


# Runs a program in a terminal of its own, its standard input.
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_closed_terminal_loses_nothing(finished, tmp_path):
  _, flags, _ = finished
  flags = (
    *flags,
    f'--workdir={tmp_path}',
    '--config.train.num_epochs=10000',
  )
  here, there = os.openpty()
  process = subprocess.Popen(
    [sys.executable, '-c', IN_TERMINAL, 'main.py', *flags],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdin=there,
    stdout=there,
    stderr=there,
    start_new_session=True,
  )
  os.close(there)
  shown = b''
  while b'images/s' not in shown:
    shown += os.read(here, 4096)
  os.close(here)
  assert process.wait(timeout=60) == 0
  rows = [row['step'] for row in metrics(tmp_path)]
  assert checkpoints.Checkpoints(tmp_path).latest_step() >= max(rows) > 0


def test_signal_before_training_ends_at_once(finished, tmp_path):
  _, flags, _ = finished
  process = start(*flags, f'--workdir={tmp_path}/w')
  while not (tmp_path / 'w' / 'lock.json').exists():
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert 'step ' not in out and 'Traceback' not in err
  assert err.endswith('\nterminated; the same command goes on.\n')


def test_disk_that_takes_nothing_for_a_while_loses_nothing(finished, tmp_path):
  """No file of this process may grow beyond 4 kB until it has complained."""
  workdir, flags, _ = finished
  process = start(*flags, f'--workdir={tmp_path}')
  unlimited = resource.RLIM_INFINITY
  limit = resource.RLIMIT_FSIZE
  resource.prlimit(process.pid, limit, (4096, unlimited))
  said = []
  while 'the checkpoint of step' not in (said or [''])[-1]:
    said.append(process.stderr.readline())
    assert process.poll() is None
  resource.prlimit(process.pid, limit, (unlimited, unlimited))
  _, err = process.communicate(timeout=120)
  said = ''.join([*said, err])
  assert process.returncode == 0, said
  # Each thing once, and when it is over.
  assert (
    len(re.findall('the checkpoint of step .* cannot be written', said)) == 1
  )
  assert 'could be written' in said and 'metrics.jsonl' not in said
  assert 'File too large' in said and 'Traceback' not in said
  check_same(tmp_path, workdir)


def test_corrupt_image_gets_one_line(celeba_dir, tmp_path):
  folder = shutil.copytree(celeba_dir, tmp_path / 'celeba')
  image = folder / 'img_align_celeba' / '000003.jpg'
  image.write_bytes(image.read_bytes()[:900])
  flags = (*SMALL, f'--config.data.dir={folder}', f'--workdir={tmp_path}/w')
  code, _, err = finish(start(*flags))
  assert code == 2 and err.startswith('error: ') and err.count('\n') == 1
  assert '000003.jpg cannot be decoded' in err
  # The advice can be followed, without checkpoints in the same workdir.
  code, out, err = finish(start(*flags, '--config.data.skip_corrupt=True'))
  assert code == 0 and 'Trained steps 1 to 12' in out
  assert err.startswith('train: skipped 1 of 40') and err.count('\n') == 1


def test_vae_and_the_loop_need_no_tensorflow():
  program = (
    'import sys, train, vae.figures, vae.checkpoints\n'
    'loaded = {"tensorflow", "tensorflow_datasets", "clu"} & set(sys.modules)\n'
    'sys.exit(str(loaded) if loaded else 0)'
  )
  result = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr


def test_help_names_the_flags():
  _, out, _ = run('--help')
  for word in ('--config:', '--workdir:', 'configs/default.py'):
    assert word in out
