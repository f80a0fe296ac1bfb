"""`explore.py`: where images lie, and the server as a process of its own."""

import contextlib
import io
import re
import shutil
import urllib.error
import urllib.request

import numpy as np
from PIL import Image
import pytest
from sklearn.decomposition import PCA

from explorer import atlas, latents, server
from runs import schema
from tests.conftest import everything, make_data, make_small_config
from tests.exploring import ask, serving, wait_for_atlas, wait_until
from tests.preloaded import run
from vae import figures, loading, steps


@pytest.fixture(scope='module')
def address(trained_run):
  with serving(f'--workdir={trained_run}') as (address, _):
    wait_for_atlas(address)
    yield address


@pytest.fixture(scope='module')
def model(trained_run):
  return loading.load(trained_run)


def pixels(body):
  return np.asarray(Image.open(io.BytesIO(body)))


# Where the images lie.


def survey(objective=None, **model):
  """A run's atlas, before training, and the means and variances of q(z|x)."""
  config = make_small_config('')
  config.model = {'name': 'mlp', 'hidden_sizes': (8,), 'latent_dim': 3, **model}
  config.objective = objective or {}
  schema.validate(config)
  program = steps.program_from_config(config, 40)
  variables = steps.create_state(program, 0).variables
  trained = loading.TrainedVAE(config, program.model, variables, 0)
  split = make_data().train
  encoded = trained.encode(everything(split))
  return atlas.survey(trained, split), encoded


def test_an_autoencoder_without_sampling_has_no_variance():
  found, encoded = survey({'sample_posterior': False, 'beta': 0.0})
  expected = np.quantile(encoded.mean, [0.025, 0.975], axis=0).T
  np.testing.assert_allclose(found.bands[:, 1:], expected, atol=1e-5)
  assert not {'logvar', 'kl'} & found.codes.keys()


@pytest.mark.parametrize('posterior', ['diagonal', 'full'])
def test_bands_are_of_draws_from_the_posterior(posterior):
  found, encoded = survey(posterior=posterior)
  # Before training σ is about 1, and the means are much closer.
  spread = np.asarray(encoded.mean).std(axis=0)
  width = (found.bands[:, 2] - found.bands[:, 1]) / (2 * 1.96)
  assert np.all(spread < 0.5) and np.all(abs(width - 1) < 0.4)
  assert found.holes.share < 0.3


def test_plane_is_that_of_pca():
  means = np.random.default_rng(0).normal(size=(200, 5)) * [5, 3, 1, 1, 0.5]
  plane, expected = latents.Plane.of(means), PCA(2).fit(means)
  found = plane.project(means)
  signs = np.sign(np.sum(found * expected.transform(means), axis=0))
  np.testing.assert_allclose(
    found * signs, expected.transform(means), atol=1e-9
  )
  assert plane.variance == pytest.approx(
    expected.explained_variance_ratio_.sum()
  )
  np.testing.assert_allclose(plane.project(plane.lift(found)), found, atol=1e-9)


def test_two_dimensions_are_the_plane_themselves():
  means = np.random.default_rng(0).normal(size=(20, 2)) + 3
  np.testing.assert_array_equal(latents.Plane.of(means).project(means), means)


def test_bands_hold_95_percent_of_a_gaussian():
  draws = np.random.default_rng(0).normal(2.0, 3.0, (400_000, 1))
  np.testing.assert_allclose(
    latents.bands(draws)[0], [2, 2 - 1.96 * 3, 2 + 1.96 * 3], atol=0.03
  )


def test_hole_is_where_the_posterior_is_missing():
  generator = np.random.default_rng(0)
  prior, posterior = generator.normal(size=(2, 50_000, 2))
  same = latents.HoleMap.of(prior, posterior)
  assert same.share < 0.01
  # A disk around (1, 0), and the mass of N(0, I) in it.
  far = np.linalg.norm(posterior - [1, 0], axis=1) > 0.7
  inside = np.linalg.norm(prior - [1, 0], axis=1) < 0.7
  found = latents.HoleMap.of(prior, posterior[far])
  assert 0.5 * inside.mean() < found.share < inside.mean()
  rows, columns = np.nonzero(found.holes)
  step = (found.high - found.low) / len(found.holes)
  centers = found.low + (np.stack([columns, rows], axis=1) + 0.5) * step
  assert np.linalg.norm(centers.mean(axis=0) - [1, 0]) < 0.1
  assert np.linalg.norm(centers - [1, 0], axis=1).max() < 0.7


def test_direction_is_the_way_between_two_classes():
  generator = np.random.default_rng(0)
  values = generator.integers(0, 2, 2000)
  means = generator.normal(size=(2000, 4)) * 0.1
  means[:, 2] += 1.5 * values
  found = latents.direction(means, values)
  np.testing.assert_allclose(found, [0, 0, 1.5, 0], atol=0.1)
  assert latents.direction(means, np.zeros(2000)) is None
  assert latents.direction(means, np.arange(2000) % 3) is None


# The server.


def test_images_are_those_of_the_library(address, model):
  z = np.random.default_rng(0).normal(size=(5, 2)).round(3)
  status, body = ask(address, 'api/run/0/decode', {'z': z.tolist()})
  expected = figures.to_uint8(model.decode(z))
  assert status == 200
  strip = pixels(body).reshape(16, 5, 16, 3).swapaxes(0, 1)
  np.testing.assert_array_equal(strip, expected)


def test_an_image_is_encoded_and_lies_beside_itself(address, model):
  _, body = ask(address, 'api/run/0/image', {'indices': [3]})
  _, found = ask(address, 'api/run/0/encode', body)
  np.testing.assert_array_equal(found['image'], pixels(body))
  expected = model.encode(pixels(body)[None])
  np.testing.assert_allclose(found['mean'], expected.mean[0], atol=1e-5)
  np.testing.assert_allclose(found['logvar'], expected.logvar[0], atol=1e-5)
  _, near = ask(address, 'api/run/0/near', {'z': [found['mean']], 'count': 2})
  assert near['indices'][0] == 3 and near['distances'][0] < 1e-3
  _, code = ask(address, 'api/run/0/code', {'indices': [3]})
  np.testing.assert_allclose(code['z'], found['mean'], atol=1e-5)


def test_draws_are_the_priors(address, model):
  _, found = ask(address, 'api/run/0/sample', {'seed': 7, 'temperature': 0.5})
  np.testing.assert_allclose(
    found['z'], 0.5 * model.sample_latents(1, 7)[0], rtol=1e-6
  )


def test_animation_goes_there_and_back(address):
  z = [[i / 4, 0.0] for i in range(5)]
  status, body = ask(address, 'api/run/0/animate', {'z': z})
  assert status == 200 and Image.open(io.BytesIO(body)).n_frames == 8


@pytest.mark.parametrize(
  ('path', 'content'),
  [
    ('decode', {}),
    ('decode', {'z': []}),
    ('decode', {'z': [[1]]}),
    ('decode', {'z': [[1, 2, 3]]}),
    ('decode', {'z': [[1, None]]}),
    ('decode', {'z': [[1, '2']]}),
    ('decode', {'z': [[True, 2]]}),
    ('decode', {'z': [[1e300, 2]]}),
    ('decode', {'z': [[0, 0]] * 257}),
    ('decode', b'{"z": [[NaN, 0]]}'),
    ('decode', b'{"z": [[Infinity, 0]]}'),
    ('decode', b'{"z": ' + b'[' * 100_000),
    ('decode', b'\xff\xfe'),
    ('decode', b'[]'),
    ('decode', {'z': [[0, 0]], 'label': 1}),
    ('sample', {'seed': -1}),
    ('sample', {'seed': 0.5}),
    ('sample', {'seed': 1, 'temperature': 1e9}),
    ('near', {'z': [[0, 0], [0, 0]]}),
    ('near', {'z': [[0, 0]], 'count': 1000}),
    ('image', {'indices': [40]}),
    ('image', {'indices': [-1]}),
    ('image', {'indices': ['../../etc/passwd']}),
    ('image', {'indices': [0] * 65}),
    ('code', {'indices': {}}),
    ('lift', {'xy': [[0]]}),
    ('encode', b''),
    ('encode', b'no image'),
    ('encode?label=-1', b'no image'),
    ('encode', b'\x89PNG\r\n\x1a\n' + bytes(100)),
  ],
)
def test_nonsense_gets_a_line(address, path, content):
  status, found = ask(address, f'api/run/0/{path}', content)
  assert status == 400 and '\n' not in found['error']
  assert ask(address, 'api/run/0')[0] == 200


def test_what_is_too_large_or_not_there_is_refused(address):
  assert ask(address, 'api/run/1')[0] == 404
  assert ask(address, f'api/run/{"9" * 5000}')[0] == 404
  label = f'api/run/0/encode?label={"9" * 5000}'
  assert ask(address, label, _png())[0] == 400
  assert ask(address, 'api/run/0/decode/..')[0] == 404
  assert ask(address, 'page/../server.py')[0] == 404
  assert ask(address, 'page/%2e%2e/server.py')[0] == 404
  large = b'{"z": "' + b'0' * 10_000_000 + b'"}'
  # The connection may be closed before all is sent.
  with contextlib.suppress(urllib.error.URLError):
    assert ask(address, 'api/run/0/decode', large)[0] == 413
  for side in (8_000, 20_000):
    bomb = io.BytesIO()
    Image.new('1', (side, side)).save(bomb, 'PNG')
    status, found = ask(address, 'api/run/0/encode', bomb.getvalue())
    assert status == 413 and '50,000,000 pixels' in found['error']
  assert ask(address, 'api/run/0')[0] == 200


def _png():
  content = io.BytesIO()
  Image.new('RGB', (16, 16)).save(content, 'PNG')
  return content.getvalue()


def test_pages_of_other_sites_are_refused(address):
  for site, status in (('cross-site', 403), ('same-origin', 200)):
    assert ask(address, 'api/runs', **{'Sec-Fetch-Site': site})[0] == status


def test_runs_that_were_not_asked_for_longest_are_dropped(monkeypatch):
  monkeypatch.setattr(server, '_MAX_RUNS', 2)
  closed, restored = [], []

  class Session:
    def __init__(self, index):
      restored.append(index)
      self.close = lambda: closed.append(index)

  sessions = server.Sessions('abc', Session)
  for index in (0, 1, 0, 2, 0, 1):
    _ = sessions[index]
  assert restored == [0, 1, 2, 1] and closed == [1, 2]


def test_other_names_of_this_machine_are_refused(address):
  assert ask(address, 'api/runs', Host='evil.example')[0] == 400
  request = urllib.request.urlopen(address)
  assert "default-src 'self'" in request.headers['Content-Security-Policy']


def test_another_address_needs_the_token(trained_run):
  flags = f'--workdir={trained_run}', '--host=0.0.0.0'
  with serving(*flags) as (address, token):
    local = re.sub('//.*:', '//127.0.0.1:', address)
    assert len(token) > 20
    assert ask(local, 'api/runs')[0] == 403
    assert ask(local, 'api/runs', **{'X-Token': 'x' * len(token)})[0] == 403
    assert ask(local, 'api/runs', **{'X-Token': token})[0] == 200


@pytest.mark.slow
def test_a_run_is_followed_until_it_disappears(trained_run, tmp_path):
  workdir = tmp_path / 'followed'
  shutil.copytree(trained_run, workdir)
  *_, last = sorted(
    (workdir / 'checkpoints').iterdir(), key=lambda p: int(p.name)
  )
  later = last.rename(tmp_path / last.name)
  with serving(f'--workdir={workdir}', '--checkpoint=last') as (address, _):
    wait_for_atlas(address)
    assert ask(address, 'api/run/0')[1]['step'] < int(later.name)
    shutil.copytree(later, workdir / 'checkpoints' / later.name)
    wait_until(lambda: ask(address, 'api/run/0')[1]['step'] == int(later.name))
    wait_for_atlas(address)
    shutil.rmtree(workdir)
    found = wait_until(lambda: ask(address, 'api/run/0')[1]['problem'])
    assert 'from memory' in found
    assert ask(address, 'api/run/0/decode', {'z': [[0, 0]]})[0] == 200


def test_mistakes_are_one_line(trained_run, address, tmp_path):
  port = re.search(r':(\d+)/', address)[1]
  for flags, message in (
    ([], 'name the runs'),
    ([f'--workdir={tmp_path}'], str(tmp_path)),
    ([f'--workdir={trained_run}', f'--port={port}'], 'name another --port'),
  ):
    code, _, err = run(*flags, script='explore.py')
    assert code == 2 and err.count('\n') == 1 and message in err
