"""What TensorBoard's own server shows of runs and sweeps."""

import json
from urllib import request

from etils import epath
import pytest
from tensorboard import program

from runs import metric_writer
from sweeps import report
from tests.test_sweep_report import grid, make

BETAS = 0.5, 2.0


@pytest.fixture(scope='module')
def ask(tmp_path_factory):
  """Asks the server of a folder with a run, and a sweep of two points."""
  logs = epath.Path(tmp_path_factory.mktemp('logs'))
  names = {
    logs / 'faces': 1.0,
    logs / 'beta/points/beta=0.5': BETAS[0],
    logs / 'beta/points/beta=2': BETAS[1],
  }
  for workdir, beta in names.items():
    workdir.mkdir(parents=True)
    writer = metric_writer.MetricWriter(workdir)
    writer.write_hparams({'objective.beta': beta, 'seed': 0, 'channels': (1,)})
    writer.write_scalars(5, {'train/loss': 10 * beta})
    writer.close()
  for workdir, beta in list(names.items())[1:]:
    for rate in (99.0, beta / 4):  # The second in the place of the first.
      report.write_measurement(workdir, {'rate': rate})
  report.write_columns(logs / 'beta', make(grid(BETAS, dims=[8])))
  server = program.TensorBoard()
  server.configure(argv=[None, '--logdir', str(logs), '--port', '0'])
  url = server.launch()

  def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {'Content-Type': 'application/json'}
    question = request.Request(f'{url}data/{path}', data, headers)
    with request.urlopen(question) as answer:
      return json.load(answer)

  return ask


def test_runs_are_named_as_their_workdirs(ask):
  expected = ['faces', 'beta/points/beta=0.5', 'beta/points/beta=2']
  assert {*expected, 'beta'} == set(ask('runs'))
  tags = ask('plugin/scalars/tags')
  assert set(tags['faces']) == {'train/loss'}
  assert [set(tags[name]) for name in expected[1:]] == [
    {'train/loss', 'rate'}
  ] * 2


def test_hparams_view_has_each_point_once(ask):
  shown = ask('plugin/hparams/experiment', {'experimentName': ''})
  assert [h['name'] for h in shown['hparamInfos']] == ['objective.beta']
  body = {
    'startIndex': 0,
    'sliceSize': 100,
    'allowedStatuses': ['STATUS_UNKNOWN'],
    'colParams': [{'hparam': 'objective.beta'}, {'metric': {'tag': 'rate'}}],
  }
  groups = ask('plugin/hparams/session_groups', body)['sessionGroups']
  found = {
    g['name']: (
      g['hparams']['objective.beta'],
      [
        m['value']
        for m in g.get('metricValues', ())
        if m['name']['tag'] == 'rate'
      ],
    )
    for g in groups
  }
  assert found == {
    'faces': (1.0, []),
    'beta/beta=0.5': (0.5, [0.125]),
    'beta/beta=2': (2.0, [0.5]),
  }
