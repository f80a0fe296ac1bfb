"""`~` in the paths that users write; HOME is a folder of the test."""

import pathlib

import pytest

from benchmarks import results
from runs import workdirs
from sweeps.study import parse_storage
from tests.preloaded import run
import vae
from vae import paths


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def at_home(trained_run, monkeypatch):
  """A run's path from its home."""
  monkeypatch.setenv('HOME', str(trained_run.parent))
  return f'~/{trained_run.name}'


@pytest.mark.parametrize(
  ('given', 'expanded'),
  [
    ('~', '{home}'),
    ('~/runs/a', '{home}/runs/a'),
    ('runs/~', 'runs/~'),
    ('/runs/~/a', '/runs/~/a'),
    ('gs://bucket/~/a', 'gs://bucket/~/a'),
    ('~no_such_user/a', '~no_such_user/a'),
  ],
)
def test_home_is_put_for_a_leading_tilde(home, given, expanded):
  assert str(paths.expand(given)) == expanded.format(home=home)
  assert str(paths.expand(pathlib.Path('~/a'))) == f'{home}/a'


def test_run_is_loaded_from_home(at_home, trained_run):
  assert vae.load(at_home).step == vae.load(trained_run).step
  assert workdirs.load_config(at_home).model.latent_dim == 2


@pytest.mark.parametrize('storage', ['~/sweep.db', 'sqlite:///~/sweep.db'])
def test_sweeps_are_recorded_at_home(home, storage):
  assert parse_storage(storage).database == str(home / 'sweep.db')


def test_benchmarks_write_home(home):
  results.write('~/results.json', {'a': 1})
  assert (home / 'results.json').is_file()


@pytest.mark.parametrize(
  ('script', 'words', 'said'),
  [
    ('main.py', (), '{run} holds a run of another config'),
    ('sweep.py', ('--beta=1,2',), '{run} holds a run; name another --workdir'),
    (
      'evaluate.py',
      ('--checkpoint=7',),
      '{run}/checkpoints has no checkpoint 7',
    ),
    (
      'evaluate.py',
      ('--output=~/{name}/config.json',),
      '--output={run}/config.json cannot be written',
    ),
    (
      'generate.py',
      ('sample', '--checkpoint=7'),
      '{run}/checkpoints has no checkpoint 7',
    ),
    (
      'evaluate.py',
      ('--metrics=fid', '--inception_weights=~/{name}/gone'),
      '{run}/gone cannot be read',
    ),
  ],
)
def test_scripts_find_what_is_at_home(
  at_home, trained_run, script, words, said
):
  words = (word.format(name=trained_run.name) for word in words)
  code, _, err = run(*words, f'--workdir={at_home}', script=script)
  assert code == 2 and said.format(run=trained_run) in err, err
