"""The documentation: its code trains, its links and commands exist."""

import contextlib
import os
import re
import runpy
import sys

import nbclient
import nbformat
import numpy as np
import pytest

from configs import default
from evaluation import measure
import input_pipeline
from runs import schema
from tests.conftest import ROOT, Rows
from tests.preloaded import run
import train
import vae
from vae import models, objectives, registry

PAGES = sorted(
  [
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/*.md'),
    ROOT / 'tests/README.md',
    ROOT / 'benchmarks/README.md',
  ]
)
BLOCK = re.compile(r'```python\n# (\w+\.py)\n(.*?)```', re.DOTALL)


@pytest.fixture(scope='module')
def own_folder(tmp_path_factory):
  """A folder on sys.path with the files of docs/extending.md."""
  folder = tmp_path_factory.mktemp('mine')
  text = (ROOT / 'docs/extending.md').read_text()
  for name, code in BLOCK.findall(text):
    (folder / name).write_text(code)
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


def train_briefly(path, workdir, **settings):
  """Trains a config file for an epoch; returns the data and the rows."""
  config = runpy.run_path(path)['get_config']()
  config.data.decoded_dir = ''
  config.train.num_epochs = 1
  config.data.update(settings.pop('data', {}))
  config.model.update(settings.pop('model', {}))
  config.train.update(settings)
  schema.validate(config)
  data, writer = input_pipeline.load(config), Rows()
  train.train_and_evaluate(config, workdir, data, writer)
  return data, writer.rows


@pytest.fixture
def small(celeba_dir):
  data = dict(source='celeba', dir=str(celeba_dir), image_size=16)
  return dict(data=data, batch_size=8)


@pytest.mark.slow
def test_objective_of_the_docs_is_the_tighter_bound(
  own_folder, small, tmp_path
):
  path, network = own_folder / 'iwae_config.py', dict(hidden_channels=(4, 8))
  _, rows = train_briefly(path, tmp_path, model=network, **small)
  # Jensen's inequality, which holds for the samples themselves.
  assert rows[-1]['val/loss'] < -rows[-1]['val/elbo']


def test_penalty_of_the_docs_is_added_to_the_loss(own_folder, small, tmp_path):
  path, network = own_folder / 'smooth_config.py', dict(hidden_channels=(4, 8))
  _, rows = train_briefly(path, tmp_path, model=network, **small)
  row = {name.removeprefix('val/'): value for name, value in rows[-1].items()}
  expected = row['distortion'] + 2 * row['kl'] + 100 * row['variation']
  np.testing.assert_allclose(row['loss'], expected, rtol=1e-5)
  assert row['variation'] > 0


@pytest.mark.slow
def test_model_of_the_docs_trains_and_is_loaded(own_folder, small, tmp_path):
  train_briefly(own_folder / 'patches_config.py', tmp_path, **small)
  trained = vae.load(tmp_path)
  assert trained.sample(2).shape == (2, 16, 16, 3)
  assert trained.latent_shape == (32,)


@pytest.fixture(scope='module')
def digits_run(own_folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('digits')
  path = own_folder / 'digits_config.py'
  data, _ = train_briefly(path, workdir, batch_size=128)
  return data, vae.load(workdir)


@pytest.mark.slow
def test_data_set_of_the_docs_has_its_images_and_labels(digits_run):
  data, trained = digits_run
  sizes = [getattr(data, s).num_examples for s in data.__dataclass_fields__]
  assert sizes == [1437, 180, 180]
  assert set(data.test.labels().values.ravel()) == set(range(10))
  assert trained.sample(1).shape == (1, 8, 8, 1)


def test_evaluator_of_the_docs_adds_its_metrics(digits_run):
  data, trained = digits_run
  settings = measure.Settings(groups=('sharpness',), batch_size=64)
  results = measure.measure(trained, data, 'test', settings)
  (images,) = data.test.batches(np.arange(180), 180)
  pixels = images[..., 0].astype(float) / 255
  expected = np.mean(abs(pixels[:, :, 1:] - pixels[:, :, :-1]))
  found = results.metrics['edges_of_originals'].value
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert 0 < results.metrics['edges_of_reconstructions'].value < found


def test_ideas_of_the_docs_are_short():
  text = (ROOT / 'docs/extending.md').read_text()
  lines = {
    name: len(list(filter(None, code.splitlines())))
    for name, code in BLOCK.findall(text)
  }
  for idea, config in (
    ('iwae_bound.py', 'iwae_config.py'),
    ('smooth.py', 'smooth_config.py'),
    ('patches.py', 'patches_config.py'),
    ('digits.py', 'digits_config.py'),
  ):
    assert lines[idea] + lines[config] < 40
  assert lines['sharpness.py'] < 40


def run_notebook(name, **environment):
  """What a notebook prints, and the number of its pictures."""
  notebook = nbformat.read(ROOT / 'docs' / name, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': ROOT / 'docs'}}
  )
  client.execute(env=os.environ | environment)
  outputs = [o for c in notebook.cells for o in c.get('outputs', ())]
  # An error raises, and nothing is printed on standard error.
  assert not [o for o in outputs if o.get('name') == 'stderr']
  text = ''.join(o.text for o in outputs if o.output_type == 'stream')
  return text, sum('image/png' in o.get('data', {}) for o in outputs)


def test_notebook_runs_from_top_to_bottom(trained_run):
  text, count = run_notebook('trained_model.ipynb', WORKDIR=str(trained_run))
  assert '(200, 2) (200, 2)' in text and '2 latent dimensions' in text
  assert count == 4


@pytest.mark.slow
@pytest.mark.usefixtures('users_programs')
def test_article_in_code_shows_what_it_says():
  """It asserts closed forms, fewer holes, blur by σ, and the cured collapse."""
  text, count = run_notebook('article_in_code.ipynb')
  assert 'KL(N(1, e⁻¹) ‖ N(0, 1)) = 0.6839 nats' in text
  assert count == 5


def _slugs(page):
  """The anchors of a page's headings, as GitHub makes them."""
  text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
  for heading in re.findall(r'^#+ (.*)', text, re.MULTILINE):
    kept = re.sub(r'[^\w\- ]', '', heading.lower())
    yield kept.replace(' ', '-')


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'https?://', link):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), link
    assert not anchor or anchor in _slugs(target), link


def _commands(page):
  """(script, its flags) of each `python SCRIPT.py …` of a page."""
  text = page.read_text().replace('\\\n', ' ')
  for script, rest in re.findall(r'python ([\w/]+\.py)([^`\n;|)]*)', text):
    yield script, re.findall(r'(?<=\s)--([\w.]+)(?:=(\S*))?', rest)


def _flags(script):
  """The names of a script's flags."""
  if script.startswith('benchmarks/'):
    # They need PyTorch, which the tests do not.
    code = ''.join(p.read_text() for p in ROOT.glob('benchmarks/*.py'))
    defined = r"(?:DEFINE_\w+|add_argument|add)\(\s*'(?:--)?(\w+)'"
    return {*re.findall(defined, code), 'config'}
  _, out, _ = run('--help', script=script)
  return set(re.findall(r'^  --(?:\[no\])?(\w+)', out, re.MULTILINE)) | {'help'}


def _config_keys():
  keys = set(schema.flatten(default.get_config()))
  for group, package in (('model', models), ('objective', objectives)):
    for path in (ROOT / 'vae' / f'{group}s').glob('[a-z]*.py'):
      with contextlib.suppress(vae.errors.UserError):
        found = registry.fields(package.find(path.stem))
        keys |= {f'{group}.{name}' for name in found}
  return keys


def test_commands_name_scripts_and_flags_that_exist():
  flags, keys, num_commands = {}, _config_keys(), 0
  for page in PAGES:
    for script, given in _commands(page):
      num_commands += 1
      assert (ROOT / script).is_file(), script
      if script not in flags:
        flags[script] = _flags(script)
      for name, value in given:
        group, _, key = name.partition('.')
        assert group in flags[script], f'{page.name}: {script} --{name}'
        assert not key or key in keys, f'{page.name}: --{name}'
        if name == 'config' and value.startswith('configs/'):
          path, *argument = value.split(':')
          config = runpy.run_path(ROOT / path)['get_config'](*argument)
          assert config.model.name, value
  assert num_commands > 30


def test_make_targets_exist():
  makefile = (ROOT / 'Makefile').read_text()
  for page in PAGES:
    for target in re.findall(r'(?:^|`)make ([a-z-]+)', page.read_text(), re.M):
      assert re.search(rf'^{target}:', makefile, re.M), f'{page.name}: {target}'


def test_architecture_names_every_module():
  text = (ROOT / 'docs/architecture.md').read_text()
  named = set(re.findall(r'`([\w/]+\.py)`', text))
  packages = (
    *('data', 'evaluation', 'explorer', 'exports', 'runs', 'sweeps', 'vae'),
  )
  modules = [
    *ROOT.glob('*.py'),
    *(path for name in packages for path in ROOT.glob(f'{name}/**/*.py')),
  ]
  found = {str(p.relative_to(ROOT)) for p in modules if p.stem != '__init__'}
  assert named == found
