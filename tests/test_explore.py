"""`explore.py`: the server as a process of its own, the page in Chromium."""

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
from PIL import Image
import pytest
from sklearn.decomposition import PCA

from explorer import latents
from tests.browser import find_browser
from tests.conftest import ROOT
from tests.preloaded import run
from vae import figures, loading


@contextlib.contextmanager
def serving(*flags):
  """Starts `explore.py` on any port; yields its address, a base and a query."""
  command = [sys.executable, ROOT / 'explore.py', '--port=0', *flags]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    try:
      for line in process.stdout:
        if found := re.match(r'Open (http://\S+?/)(\?token=(\S+))?\s', line):
          break
      else:
        raise AssertionError(process.stderr.read())
      yield found[1], found[3] or ''
    finally:
      process.send_signal(signal.SIGINT)
      process.communicate(timeout=30)


def ask(address, path, content=None, **headers):
  """Status, and the answer's JSON or bytes."""
  data = content
  if content is not None and not isinstance(content, bytes):
    data = json.dumps(content).encode()
  request = urllib.request.Request(address + path, data, headers)
  try:
    with urllib.request.urlopen(request, timeout=60) as answer:
      body, status = answer.read(), answer.status
  except urllib.error.HTTPError as error:
    body, status = error.read(), error.code
  with contextlib.suppress(ValueError):
    return status, json.loads(body)
  return status, body


def wait_until(condition, seconds=60):
  end = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < end
    time.sleep(0.2)
  return found


def wait_for_atlas(address, run=0):
  wait_until(lambda: ask(address, f'api/run/{run}')[1].get('is_surveyed'))


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
    ([f'--workdir={trained_run}', f'--port={port}'], 'cannot be listened at'),
  ):
    code, _, err = run(*flags, script='explore.py')
    assert code == 2 and err.count('\n') == 1 and message in err


# The page.


@pytest.fixture(scope='module')
def chromium():
  api = pytest.importorskip('playwright.sync_api')
  with api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=find_browser(), args=['--no-sandbox']
    )
    yield browser
    browser.close()


class Page:
  """A page that must neither fail nor ask another address."""

  def __init__(self, chromium, address, **options):
    self.page = chromium.new_page(accept_downloads=True, **options)
    self.wrong, self.requests = [], []
    self.page.on('pageerror', lambda error: self.wrong.append(str(error)))
    self.page.on(
      'console',
      lambda m: self.wrong.append(m.text) if m.type == 'error' else None,
    )
    self.page.on(
      'response',
      lambda r: self.wrong.append(r.text()) if r.status >= 400 else None,
    )
    self.page.on('request', lambda request: self.requests.append(request.url))
    self.page.goto(address)
    self.page.wait_for_selector('#map:not([hidden])')
    self.page.wait_for_selector('#near button')

  def image(self, selector='#image'):
    """The pixels of a canvas, as a data URL."""
    script = 'canvas => canvas.toDataURL()'
    return self.page.eval_on_selector(selector, script)

  def changes(self, action, selector='#image'):
    """Waits until an action has changed a canvas."""
    before = self.image(selector)
    action()
    wait_until(lambda: self.image(selector) != before, seconds=10)

  def set(self, selector, value):
    """Moves a slider."""
    script = """(input, value) => {
      input.value = value;
      input.dispatchEvent(new Event('input', {bubbles: true}));
    }"""
    self.page.eval_on_selector(selector, script, value)

  def check(self, address):
    assert self.wrong == []
    own = (address, 'blob:', 'data:')
    assert all(url.startswith(own) for url in self.requests)


@pytest.fixture
def page(chromium, address):
  page = Page(chromium, address)
  yield page
  page.check(address)
  page.page.close()


@pytest.mark.slow
def test_every_control_changes_what_it_should(page, tmp_path, model):
  tab = page.page
  page.changes(lambda: page.set('#dimensions input >> nth=0', '2'))
  page.changes(lambda: tab.click('#random'))
  page.changes(lambda: tab.click('#mean'))
  page.changes(lambda: tab.keyboard.press('r'))
  page.changes(lambda: page.set('#directions input >> nth=0', '2'))
  page.changes(lambda: tab.click('#map', position={'x': 40, 'y': 60}))
  page.changes(lambda: tab.keyboard.press('ArrowRight'))
  page.changes(lambda: tab.click('#near button >> nth=5'))
  page.changes(lambda: tab.check('#holes'), '#map')
  page.changes(lambda: tab.select_option('#color', ''), '#map')

  # Interpolation.
  tab.click('#from')
  page.changes(lambda: tab.click('#random'))
  tab.click('#to')
  tab.wait_for_selector('#walk:not([hidden])')
  page.changes(lambda: tab.select_option('#path', 'spherical'), '#walk')
  page.changes(lambda: tab.click('#play'))
  tab.click('#play')
  with tab.expect_download() as download:
    tab.click('#gif')
  download.value.save_as(tmp_path / 'walk.gif')
  assert Image.open(tmp_path / 'walk.gif').n_frames == 46

  # What is kept, and the command that makes it again.
  page.changes(lambda: tab.click('#mean'))
  page.changes(lambda: tab.click('#random'))
  with tab.expect_download() as download:
    tab.click('#save')
  download.value.save_as(tmp_path / 'image.png')
  tab.click('#command')
  wait_until(lambda: tab.text_content('#status').startswith('python'))
  command = tab.text_content('#status').split()
  code, _, err = run(
    *command[2:], f'--output={tmp_path / "made"}', script='generate.py'
  )
  assert code == 0, err
  saved, made = (
    np.asarray(Image.open(path).convert('RGB')).astype(int)
    for path in (tmp_path / 'image.png', tmp_path / 'made/0000.png')
  )
  assert abs(saved - made).max() <= 1  # z is rounded in the command.

  # An image of one's own.
  photo = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
  Image.fromarray(photo).save(tmp_path / 'photo.png')
  page.changes(lambda: tab.set_input_files('#file', tmp_path / 'photo.png'))
  assert '30×40' in tab.text_content('#caption-input')

  # The lasso around everything.
  tab.check('#lasso')
  box = tab.locator('#map').bounding_box()
  corners = [
    (1, 1),
    (box['width'] - 2, 1),
    (box['width'] - 2, box['height'] - 2),
  ]
  corners += [(1, box['height'] - 2), (1, 1)]
  tab.mouse.move(box['x'] + 1, box['y'] + 1)
  tab.mouse.down()
  for x, y in corners:
    tab.mouse.move(box['x'] + x, box['y'] + y)
  tab.mouse.up()
  wait_until(lambda: '40 images in the lasso' in tab.text_content('#status'))


@pytest.mark.slow
def test_many_moves_do_not_pile_up(page):
  in_flight, most = 0, 0

  def slow(route):  # Each answer takes 50 ms longer.
    nonlocal in_flight, most
    in_flight += 1
    most = max(most, in_flight)
    page.page.wait_for_timeout(50)
    in_flight -= 1
    route.continue_()

  page.page.route('**/decode', slow)
  before = len([u for u in page.requests if u.endswith('decode')])
  # A hundred within a second, as of a slider that is dragged.
  page.page.evaluate("""async () => {
    const slider = document.querySelector('#dimensions input');
    for (let i = 0; i < 100; i++) {
      slider.value = Number(slider.min) + i / 100;
      slider.dispatchEvent(new Event('input', {bubbles: true}));
      await new Promise(done => setTimeout(done, 10));
    }
  }""")
  page.page.wait_for_timeout(500)
  after = len([u for u in page.requests if u.endswith('decode')])
  assert 1 <= after - before < 50 and most == 1
  value = page.page.eval_on_selector('#dimensions input', 's => s.value')
  shown = page.page.text_content('#dimensions output >> nth=0')
  assert shown == f'{float(value):.2f}'


@pytest.mark.slow
def test_phone_shows_everything_without_scrolling_aside(chromium, address):
  page = Page(
    chromium, address, viewport={'width': 360, 'height': 740}, has_touch=True
  )
  width = page.page.evaluate('document.documentElement.scrollWidth')
  assert width <= 360
  page.changes(lambda: page.page.tap('#random'))
  page.check(address)
  page.page.close()


@pytest.mark.slow
def test_two_runs_and_a_sweep(chromium, trained_run, tmp_path):
  sweep = tmp_path / 'sweep'
  for name in ('beta=1', 'beta=4'):
    shutil.copytree(trained_run, sweep / 'points' / name)
  (sweep / 'results.csv').write_text(
    'point,state,objective.beta,rate,distortion,elbo\n'
    'beta=1,complete,1,9.5,100,-109.5\n'
    'beta=2,failed,2,,,\n'
    'beta=4,complete,4,2.5,120,-122.5\n'
  )
  with serving(f'--workdir={sweep}') as (address, _):
    page = Page(chromium, address)
    tab = page.page
    tab.select_option('#beside', '1')
    page.changes(lambda: tab.click('#random'), '#image-beside')
    # The same parameters give the same image.
    wait_until(lambda: page.image() == page.image('#image-beside'))
    assert tab.input_value('#run') == '0'
    box = tab.locator('#curve').bounding_box()
    # The second point has the least rate and the largest distortion.
    place = {'x': 0.1 * box['width'], 'y': 0.1 * box['height']}
    tab.click('#curve', position=place)
    wait_until(lambda: tab.input_value('#run') == '1')
    page.check(address)
