"""A page as a real browser, headless Chromium, shows it."""

import json
import pathlib
import re
import shutil
import subprocess
import tempfile
from urllib.parse import unquote

import pytest

_NAMES = ('chromium', 'chromium-browser', 'google-chrome')

_FLAGS = (
  '--headless --no-sandbox --disable-gpu --no-first-run --disable-sync '
  '--disable-background-networking --disable-component-update --dump-dom'
)

# Reported by the page itself, once everything in it is loaded.
_PROBE = """
<script>
addEventListener('load', () => {
  const seen = {
    scroll_width: document.documentElement.scrollWidth,
    width: innerWidth,
    text: document.body.innerText,
    pictures: [...document.images].map(image => image.naturalWidth),
    sideways: [...document.querySelectorAll('.scroll')]
      .filter(box => box.scrollWidth > box.clientWidth)
      .map(box => box.innerText.split('\\n')[0]),
  };
  document.title = 'SEEN' + encodeURIComponent(JSON.stringify(seen)) + 'SEEN';
});
</script>
"""


def find_browser() -> str:
  """The path of Chromium; the test is skipped without it."""
  browser = next(filter(None, map(shutil.which, _NAMES)), None)
  if browser is None:
    pytest.skip('Chromium is not installed')
  return browser


def open_page(page: pathlib.Path, width: int) -> dict:
  """What a window of this width, in pixels, shows of a page: see `_PROBE`."""
  browser = find_browser()
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, 'page.html')
    copy.write_text(page.read_text() + _PROBE)
    flags = f'--user-data-dir={folder}/profile', f'--window-size={width},800'
    result = subprocess.run(
      [browser, *_FLAGS.split(), *flags, copy.as_uri()],
      capture_output=True,
      text=True,
      timeout=120,
    )
  seen = re.search('SEEN(.*?)SEEN', result.stdout)
  assert seen, result.stderr
  return json.loads(unquote(seen[1]))
