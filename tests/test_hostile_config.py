"""Configs of wrong types, extreme sizes, and that are no configs at all."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import default
from runs import schema
from tests import fuzzed_configs
from tests.conftest import ROOT
from tests.fuzzed_configs import MAX_SECONDS
from tests.fuzzed_configs import SECONDS
from tests.fuzzed_configs import VALID
from vae import model as models
from vae import optimizers
from vae import randomness
from vae import training
from vae.errors import UserError

KEYS = sorted(schema.flatten(default.get_config()))


def wrong_with(case, code, out, err):
  """What is wrong with how main.py took a case; nothing where all is well."""
  if 'Traceback' in out + err:
    return 'a traceback'
  if code == 0:
    if case.expected == 'error':
      return 'accepted'
    return None if out.endswith(VALID + '\n') and not err else 'no sign of life'
  if code != 2 or case.expected == 'valid':
    return f'exit status {code}'
  lines = err.splitlines()
  if len(lines) != 1 or not lines[0].startswith('error: '):
    return 'more, or less, than a line of error'
  # A key may be named with its group or, by a library, without.
  names = {key.rpartition('.')[2] for key in case.keys or KEYS}
  if not re.search(r'\b(?:' + '|'.join(names) + r')\b', err):
    # But for the line of the config file that sets the key; and of a config
    # that is wrong as such, the flag or the function.
    others = [r'config\.py, line \d+']
    others += [] if case.keys else ['--config', r'get_config\(\)', r'config\.']
    if not re.search('|'.join(others), err):
      return 'a message without a name'
  return None


def test_every_key_is_set_and_every_message_is_looked_at():
  cases = fuzzed_configs.values(seed=0, count=4 * len(KEYS))
  assert {key for case in cases for key in case.keys} == set(KEYS)
  assert fuzzed_configs.GOOD.keys() <= set(KEYS)
  one = fuzzed_configs.Case('', (), ('train.flip',), 'either')
  assert not wrong_with(one, 2, '', 'error: config.train.flip is 1\n')
  for code, out, err in (
    (0, '', ''),
    (1, '', 'Traceback (most recent call last):\n'),
    (1, '', 'error: config.train.flip is 1\n'),
    (2, '', 'error: config.train.flop is 1\n'),
    (2, '', 'error: config.train.flip is 1\nmore\n'),
    (2, '', ''),
    (-9, '', ''),
  ):
    assert wrong_with(one, code, out, err)


def test_fuzzed_configs_are_refused_in_a_line_or_can_be_traced(celeba_dir):
  cases = fuzzed_configs.values(seed=1, count=4 * len(KEYS))
  counts = {'refused': 0, 'traced': 0}
  for case in [case for case in cases if case.file is not None][:60]:
    namespace = {}
    exec(fuzzed_configs.text(case, str(celeba_dir)), namespace)
    try:
      config = namespace['get_config']()
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
      assert case.expected != 'valid', case
      continue  # ml_collections has refused it already.
    try:
      schema.validate(config)
      schema.check_devices(config, 1)
    except UserError as error:
      assert case.expected != 'valid', (case, error)
      assert str(error).isprintable() and len(str(error)) < 1000
      assert any(f'config.{key}' in str(error) for key in case.keys), error
      counts['refused'] += 1
    else:
      assert case.expected != 'error', case
      assert trace(config)['loss'].shape == ()
      counts['traced'] += 1
  assert min(counts.values()) > 10, counts


def trace(config):
  """The metrics of a step of a config, by shapes alone."""
  model = models.from_config(config)
  optimizer = optimizers.from_config(config, steps_per_epoch=5)
  shape = (config.train.batch_size, *model.image_shape)
  _, metrics = jax.eval_shape(
    lambda state, images: training.train_step(
      model,
      optimizer,
      config.train.flip,
      config.train.on_nonfinite == 'skip',
      state,
      training.settings_from_config(config, model),
      randomness.train_key(config.seed),
      images,
    ),
    training.abstract_state(model, optimizer),
    jax.ShapeDtypeStruct(shape, jnp.uint8),
  )
  return metrics


def test_main_refuses_hostile_configs(celeba_dir, tmp_path):
  """As users have it, in processes that run side by side."""
  programs = (
    ('import sys\nsys.exit(0)\n', (), 'line 2: SystemExit'),
    ('', ('--config.seed=' + '9' * 5000,), 'config.seed'),
    ('', ('--config.model.latent_dim=1000000000',), ' GB free'),
    ('', ('--config=a\nb.py',), r'--config=a\nb.py: there is no such file'),
  )
  processes = []
  for index, (changes, flags, _) in enumerate(programs):
    path = tmp_path / f'{index}.py'
    path.write_text(
      changes
      if changes.startswith('import')
      else fuzzed_configs.BASE.format(data_dir=str(celeba_dir), changes=changes)
    )
    processes.append(
      subprocess.Popen(
        [
          *(sys.executable, 'main.py', f'--config={path}'),
          *(f'--workdir={tmp_path}/w', *flags),
        ],
        cwd=ROOT,
        env=dict(os.environ, JAX_PLATFORMS='cpu'),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  for process, (_, _, said) in zip(processes, programs, strict=True):
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2, err
    assert err.startswith('error: ') and err.count('\n') == 1 and said in err


@pytest.mark.faults
def test_500_hostile_configs(celeba_dir, tmp_path, record_property):
  cases = fuzzed_configs.mistakes()
  cases += fuzzed_configs.values(seed=2, count=500 - len(cases))
  assert len(cases) == 500
  for key in KEYS:
    assert sum(key in case.keys for case in cases) >= 8, key
  texts = [fuzzed_configs.text(case, str(celeba_dir)) for case in cases]
  (tmp_path / 'cases.json').write_text(
    json.dumps(
      [
        {'config': text, 'argv': case.flags}
        for case, text in zip(cases, texts, strict=True)
      ]
    )
  )
  for name in ('home', 'tmp'):
    (tmp_path / name).mkdir()
  environment = dict(
    os.environ,
    PYTHONPATH=str(ROOT),
    JAX_PLATFORMS='cpu',
    HOME=str(tmp_path / 'home'),
    # TensorFlow's own files outlive a process that ends at once.
    TMPDIR=str(tmp_path / 'tmp'),
    TFDS_DATA_DIR=str(tmp_path / 'tfds'),
  )
  subprocess.run(
    [sys.executable, ROOT / 'tests/hostile_config_run.py', tmp_path],
    env=environment,
    check=True,
  )
  results = json.loads((tmp_path / 'results.json').read_text())
  lost = []
  for case, text, result in zip(cases, texts, results, strict=True):
    why = wrong_with(case, result['code'], result['stdout'], result['stderr'])
    if result['cpu_seconds'] > SECONDS or result['seconds'] > MAX_SECONDS:
      why = f'it took {result["cpu_seconds"]} of {result["seconds"]} seconds'
    if result['gigabytes'] > 2:
      why = f'it took {result["gigabytes"]:.1f} GB'
    if why:
      said = result['stdout'] + result['stderr']
      lost.append(f'{why}: {text[-300:]}{case.flags}\n{said[-1000:]}')
  valid = sum(result['code'] == 0 for result in results)
  slowest = max(result['cpu_seconds'] for result in results)
  print(f'{valid} valid, {len(results) - valid} refused, {slowest:.1f}s')
  record_property(
    'faults',
    [
      'fuzzed configs',
      len(cases),
      len(cases) - len(lost),
      f'{len(lost)} configs' if lost else 'nothing',
    ],
  )
  assert not lost, f'{len(lost)} of them:\n' + '\n\n'.join(lost)
  assert valid > 100
