import base64
import html.parser

from etils import epath
import numpy as np

from evaluation import html_page
from vae import figures


class Outline(html.parser.HTMLParser):
  """Collects texts, pictures, and whether every tag is closed in order."""

  def __init__(self, text):
    super().__init__()
    self.open, self.texts, self.images = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    if tag == 'img':
      self.images.append(dict(attrs))
    elif tag != 'meta':
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


def test_page_is_whole_and_takes_nothing_from_elsewhere(tmp_path):
  path = epath.Path(tmp_path / 'a.png')
  figures.save_png(np.zeros((4, 4, 3), np.uint8), path)
  page = html_page.Page('A <title> & more')
  page.banner('all "well"')
  page.cards([('elbo', '1 ± 2', 'nats')])
  page.heading('Figures')
  page.figure(path, 'one')
  page.figure(path, 'two')
  page.table(('', 'b'), [('x<y', '3')])
  page.text('the end')
  outline = Outline(page.html())
  assert not outline.open
  for text in ('A <title> & more', 'all "well"', '1 ± 2', 'x<y', 'the end'):
    assert text in outline.texts
  assert [image['alt'] for image in outline.images] == ['one', 'two']
  for image in outline.images:
    kind, data = image['src'].split(',')
    assert kind == 'data:image/png;base64'
    assert base64.b64decode(data) == path.read_bytes()
  assert '://' not in page.html()
