"""`~` in the paths that users write; HOME is a folder of the test."""

import pathlib

import pytest

from tests.preloaded import run
from vae import paths


@pytest.mark.parametrize(
  ('given', 'expanded'),
  [
    ('~', '{home}'),
    ('~/runs/a', '{home}/runs/a'),
    ('runs/~', 'runs/~'),
    ('gs://bucket/~/a', 'gs://bucket/~/a'),
    ('~no_such_user/a', '~no_such_user/a'),
  ],
)
def test_leading_tilde_is_the_home(tmp_path, monkeypatch, given, expanded):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert str(paths.expand(given)) == expanded.format(home=tmp_path)
  assert str(paths.expand(pathlib.Path('~/a'))) == f'{tmp_path}/a'


@pytest.mark.parametrize(
  ('script', 'words', 'message'),
  [
    ('main.py', (), '{run} holds a run of another config'),
    ('sweep.py', ('--beta=1,2',), '{run} holds a run; name another --workdir'),
    (
      'evaluate.py',
      ('--output=~/{name}/config.json',),
      '--output={run}/config.json cannot be written',
    ),
  ],
)
def test_scripts_find_a_run_at_home(
  trained_run, monkeypatch, script, words, message
):
  monkeypatch.setenv('HOME', str(trained_run.parent))
  words = (word.format(name=trained_run.name) for word in words)
  workdir = f'--workdir=~/{trained_run.name}'
  code, _, err = run(*words, workdir, script=script)
  assert code == 2 and message.format(run=trained_run) in err, err
