"""The page of `explore.py` in Chromium: each control, on desktop and phone."""

import shutil

import numpy as np
from PIL import Image
import pytest

from tests.browser import find_browser
from tests.exploring import serving, wait_for_atlas, wait_until
from tests.preloaded import run


@pytest.fixture(scope='module')
def address(trained_run):
  with serving(f'--workdir={trained_run}') as (address, _):
    wait_for_atlas(address)
    yield address


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
def test_every_control_changes_what_it_should(page, tmp_path):
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


@pytest.mark.slow
def test_command_makes_the_image_again(page, tmp_path):
  tab = page.page
  page.changes(lambda: tab.click('#random'))
  with tab.expect_download() as download:
    tab.click('#save')
  download.value.save_as(tmp_path / 'image.png')
  tab.click('#command')
  wait_until(lambda: tab.input_value('#line'))
  command = tab.input_value('#line').split()
  code, _, err = run(
    *command[2:], f'--output={tmp_path / "made"}', script='generate.py'
  )
  assert code == 0, err
  saved, made = (
    np.asarray(Image.open(path).convert('RGB')).astype(int)
    for path in (tmp_path / 'image.png', tmp_path / 'made/0000.png')
  )
  assert abs(saved - made).max() <= 1  # z is rounded in the command.


@pytest.mark.slow
def test_own_image_and_lasso(page, tmp_path):
  tab = page.page
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
  tab.click('#map', position={'x': 2, 'y': 2})
  tab.wait_for_timeout(200)
  assert tab.text_content('#status') == 'No image is in the lasso.'


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
def test_swipe_on_the_map_scrolls_and_tap_decodes(chromium, address):
  page = Page(
    chromium, address, viewport={'width': 360, 'height': 740}, has_touch=True
  )
  tab, plot = page.page, page.page.locator('#map')
  device = tab.context.new_cdp_session(tab)

  def swipe(x, y):
    """Moves a finger from the map's middle; returns how far that scrolls."""
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    left, top = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    before = tab.evaluate('scrollY')
    for step in range(11):
      place = {'x': left + x * step / 10, 'y': top + y * step / 10}
      kind = 'touchMove' if step else 'touchStart'
      content = {'type': kind, 'touchPoints': [place]}
      device.send('Input.dispatchTouchEvent', content)
    end = {'type': 'touchEnd', 'touchPoints': []}
    device.send('Input.dispatchTouchEvent', end)
    tab.wait_for_timeout(500)
    return before - tab.evaluate('scrollY')

  before = page.image()
  assert swipe(0, 140) > 50 and swipe(20, -100) < -50
  assert page.image() == before
  page.changes(lambda: plot.tap(position={'x': 40, 'y': 60}))
  page.changes(lambda: swipe(100, 0))
  tab.check('#lasso')
  swipe(0, 100)
  wait_until(lambda: 'in the lasso' in tab.text_content('#status'))
  page.check(address)
  page.page.close()


@pytest.mark.slow
def test_a_run_that_disappears_is_said_by_both_explorers(
  chromium, trained_run, tmp_path
):
  workdir = tmp_path / 'run'
  shutil.copytree(trained_run, workdir)
  flag = f'--workdir={workdir}'
  with serving(flag) as (first, _), serving(flag) as (second, _):
    pages = [Page(chromium, first), Page(chromium, second)]
    shutil.rmtree(workdir)
    for page in pages:
      page.page.wait_for_selector('#problem:not([hidden])')
      assert 'from memory' in page.page.text_content('#problem')
      before = page.image()
      page.page.click('#random')
      wait_until(lambda p=page, b=before: p.image() != b)


@pytest.mark.slow
def test_two_runs_and_a_sweep(chromium, trained_run, tmp_path):
  sweep = tmp_path / 'sweep'
  for name in ('beta=1', 'beta=4'):
    shutil.copytree(trained_run, sweep / 'points' / name)
  # Another model: that of an earlier checkpoint.
  saved = sweep / 'points/beta=4/checkpoints'
  shutil.rmtree(max(saved.iterdir(), key=lambda path: int(path.name)))
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
    tab.click('#mean')
    tab.wait_for_timeout(1000)
    assert page.image() != page.image('#image-beside')
    # A run beside itself has the same image.
    tab.select_option('#beside', '0')
    wait_until(lambda: page.image() == page.image('#image-beside'))
    assert tab.input_value('#run') == '0'
    box = tab.locator('#curve').bounding_box()
    # The second point has the least rate and the largest distortion.
    place = {'x': 0.1 * box['width'], 'y': 0.1 * box['height']}
    tab.click('#curve', position=place)
    wait_until(lambda: tab.input_value('#run') == '1')
    page.check(address)
