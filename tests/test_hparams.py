"""What a real TensorBoard shows of a sweep, and what is left on disk."""

import contextlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.request

from etils import epath

from sweeps import hparams
from sweeps.results import Result

STATUSES = ('UNKNOWN', 'SUCCESS', 'FAILURE', 'RUNNING')


def make_result(beta, channels=(32, 64), state='complete', **metrics):
  return Result(
    name=f'beta={beta},hidden_channels={channels}',
    values={
      'objective.beta': beta,
      'model.hidden_channels': channels,
      'model.learn_sigma': len(channels) == 1,
    },
    state=state,
    metrics=metrics,
    units={'rate': 'nats', 'distortion': 'nats'},
  )


@contextlib.contextmanager
def tensorboard(logdir, log):
  """Serves a folder; yields where."""
  program = pathlib.Path(sys.executable).with_name('tensorboard')
  flags = ['--host=127.0.0.1', '--port=0', '--reload_interval=1']
  with log.open('w') as file:
    process = subprocess.Popen(
      [program, f'--logdir={logdir}', *flags],
      stdout=file,
      stderr=subprocess.STDOUT,
      env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '2'},
    )
  try:
    address = r'http://127\.0\.0\.1:\d+'
    wait_until(lambda: re.search(address, log.read_text()), log.read_text)
    yield re.search(address, log.read_text())[0]
  finally:
    process.terminate()
    process.wait(60)


def wait_until(ready, seen):
  """Fails with what is seen where it is not ready within a minute."""
  deadline = time.monotonic() + 60
  while not ready():
    assert time.monotonic() < deadline, seen()
    time.sleep(0.1)


def ask(url, route, **request):
  """As the front end asks TensorBoard's HParams plugin."""
  experiment = 'experiment/defaultExperimentId'
  with urllib.request.urlopen(
    urllib.request.Request(
      f'{url}/{experiment}/data/plugin/hparams/{route}',
      json.dumps(request).encode(),
      {'Content-Type': 'application/json'},
    ),
    timeout=60,
  ) as response:
    return json.load(response)


def shown(url):
  """What the HParams view is made of.

  Returns:
    Type and domain of each hyperparameter, by name; name and description of
    each metric; hyperparameters, metrics and statuses of each point, by name.
  """
  experiment = ask(url, 'experiment')
  hyperparameters = experiment.get('hparamInfos', [])
  metrics = experiment.get('metricInfos', [])
  answer = ask(
    url,
    'session_groups',
    allowedStatuses=[f'STATUS_{status}' for status in STATUSES],
    colParams=[
      *(
        {'hparam': h['name'], 'includeInResult': True} for h in hyperparameters
      ),
      *({'metric': m['name'], 'includeInResult': True} for m in metrics),
    ],
    startIndex=0,
    sliceSize=100,
  )
  groups = answer.get('sessionGroups', [])
  points = {
    group['name']: (
      group['hparams'],
      {m['name']['tag']: m['value'] for m in group.get('metricValues', [])},
      [session['status'] for session in group['sessions']],
    )
    for group in groups
  }
  assert len(points) == len(groups)
  return (
    {
      h['name']: (h['type'], h.get('domainInterval') or h['domainDiscrete'])
      for h in hyperparameters
    },
    [(m['name']['tag'], m['description']) for m in metrics],
    points,
  )


def point(beta, channels, status='SUCCESS', **metrics):
  values = {
    'objective.beta': beta,
    'model.hidden_channels': channels,
    'model.learn_sigma': ',' not in channels,
  }
  return values, metrics, [f'STATUS_{status}']


def test_shown_by_tensorboard(tmp_path):
  folder = epath.Path(tmp_path / 'sweep [1]' / 'tensorboard')
  results = [
    make_result(0.5, rate=20.25, distortion=100.5, fid=math.nan),
    make_result(2, (16,), rate=math.inf, distortion=110.5),
    make_result(0, state='failed'),
    make_result(4.0, state='running'),
  ]
  hparams.write(folder, results)
  channels = ('DATA_TYPE_STRING', ['(16)', '(32,64)'])
  learn_sigma = ('DATA_TYPE_BOOL', [False, True])
  expected = (
    {
      'objective.beta': ('DATA_TYPE_FLOAT64', {'minValue': 0, 'maxValue': 4}),
      'model.hidden_channels': channels,
      'model.learn_sigma': learn_sigma,
    },
    [('rate', 'nats'), ('distortion', 'nats')],
    {
      results[0].name: point(0.5, '(32,64)', rate=20.25, distortion=100.5),
      results[1].name: point(2, '(16)', distortion=110.5),
      results[2].name: point(0, '(32,64)', 'FAILURE'),
    },
  )
  with tensorboard(folder, tmp_path / 'log') as url:
    wait_until(lambda: shown(url) == expected, lambda: shown(url))

    # More is known: of a complete point, of one that had failed, of a new one.
    results[1:] = [
      make_result(2, (16,), rate=12.5, distortion=110.75),
      make_result(0, fid=3.5),
      make_result(8.0, rate=4.25),
    ]
    hparams.write(folder, results)
    expected = (
      {
        'objective.beta': ('DATA_TYPE_FLOAT64', {'minValue': 0, 'maxValue': 8}),
        'model.hidden_channels': channels,
        'model.learn_sigma': learn_sigma,
      },
      [('rate', 'nats'), ('distortion', 'nats'), ('fid', '')],
      {
        results[0].name: point(0.5, '(32,64)', rate=20.25, distortion=100.5),
        results[1].name: point(2, '(16)', rate=12.5, distortion=110.75),
        results[2].name: point(0, '(32,64)', fid=3.5),
        results[3].name: point(8, '(32,64)', rate=4.25),
      },
    )
    wait_until(lambda: shown(url) == expected, lambda: shown(url))

    # Not all are finite numbers.
    results = [make_result(beta, (16,)) for beta in (1.5, math.inf, 'auto')]
    hparams.write(folder, results)
    texts = ['1.5', 'auto', 'inf']
    expected = (
      {
        'objective.beta': ('DATA_TYPE_STRING', texts),
        'model.hidden_channels': ('DATA_TYPE_STRING', ['(16)']),
        'model.learn_sigma': ('DATA_TYPE_BOOL', [True]),
      },
      [],
      {
        result.name: point(text, '(16)')
        for result, text in zip(results, ('1.5', 'inf', 'auto'), strict=True)
      },
    )
    wait_until(lambda: shown(url) == expected, lambda: shown(url))


def test_only_what_is_new_is_written(tmp_path):
  folder = epath.Path(tmp_path / 'tensorboard')

  def files():
    return {
      path: path.stat().st_mtime_ns
      for path in (tmp_path / 'tensorboard').rglob('*')
      if path.is_file()
    }

  def runs():
    """Of the points; one more is the sweep's."""
    assert len([p for p in files() if p.parent.name.startswith('sweep-')]) == 1
    return sorted(p.parent.name for p in files() if '=' in p.parent.name)

  results = [make_result(0.5, rate=2.0), make_result(2.0, state='failed')]
  hparams.write(folder, results)
  assert runs() == [results[0].name, f'{results[1].name},failed']
  first = files()
  hparams.write(folder, results)
  assert files() == first

  # Others' files stay.
  (tmp_path / 'tensorboard' / 'events.out.tfevents.1.host').touch()
  (tmp_path / 'tensorboard' / 'beta=3').mkdir()
  (tmp_path / 'tensorboard' / 'beta=3' / 'events.out.tfevents.1.host').touch()
  results[1] = make_result(2.0, rate=1.0)
  hparams.write(folder, results)
  assert runs() == [results[0].name, results[1].name, 'beta=3']
  assert len(files()) == 5
  kept = {path: written for path, written in first.items() if path in files()}
  assert len(kept) == 2
  assert kept.items() <= files().items()

  hparams.write(folder, [])
  assert runs() == ['beta=3']
