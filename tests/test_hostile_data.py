"""Whatever lies on the disk: pixels, a line of error, or skipped and counted.

Everything is read by another process (data_process.py), whose time and memory
are limited. The short tests take one case of each kind, `-m faults` all.
"""

import dataclasses
import errno
import io
import json
import os
import pathlib
import pickle
import re
import select
import shutil
import struct
import subprocess
import sys
import warnings

import numpy as np
from PIL import Image
import pytest

from data import celeba
from data import image_files
from data.decoded import DecodedStore
from tests import data_process
from tests import hostile_images
from tests.celeba_builder import CelebA
from tests.conftest import SPLIT_SIZES
from vae import ordinary_files
from vae.errors import UserError

linux = pytest.mark.skipif(
  sys.platform != 'linux', reason='asks /proc for the memory'
)
pytestmark = linux

SEED = 20
SIZE = 32

# What no case may exceed: seconds, generously, and MB that memory grows by.
SECONDS = 120
MEMORY = 1200

# Beside which the others are bad; a decoder's and a resizer's rounding.
ROUNDING = 3


class Reader:
  """A process that reads data, and is replaced when it hangs or dies."""

  def __init__(self, folder: pathlib.Path):
    self._arrays = folder / 'arrays.npz'
    self._log = folder / 'log'
    self._process = None

  def _start(self):
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    with open(self._log, 'ab') as log:
      self._process = subprocess.Popen(
        [sys.executable, data_process.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
      )

  def stop(self):
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
      self._process = None

  def __call__(self, command, **arguments):
    """The reply, with `arrays` where there are some.

    That there is one within the time, without a traceback, in one line and in
    bounded memory, is seen to here.
    """
    if self._process is None:
      self._start()
    question = {'command': command, 'arguments': arguments}
    question['arrays'] = str(self._arrays)
    self._process.stdin.write(json.dumps(question) + '\n')
    self._process.stdin.flush()
    ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
    line = self._process.stdout.readline() if ready else ''
    if not line:
      self.stop()
      raise AssertionError(f'{arguments}: {"died" if ready else "hangs"}')
    reply = json.loads(line)
    assert reply['trace'] is None, f'{arguments}: {reply["trace"]}'
    assert reply['growth'] < MEMORY, f'{arguments}: {reply["growth"]} MB'
    if reply['error'] is None:
      with np.load(self._arrays, allow_pickle=False) as arrays:
        reply['arrays'] = dict(arrays)
    else:
      assert reply['error'].isprintable(), reply['error']
      assert len(reply['error']) < 2000
    return reply


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
  reader = Reader(tmp_path_factory.mktemp('reader'))
  yield reader
  reader.stop()


def one_of_each(cases, kind=lambda case: case.kind):
  return list({kind(case): case for case in reversed(cases)}.values())


# Image files.


def example(pixels, size=SIZE, mode='RGB', crop=148):
  """Crop and antialiased resize by another library."""
  image = Image.fromarray(np.ascontiguousarray(pixels))
  side = min(crop, *image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  return np.asarray(image.convert(mode).resize((size, size), Image.BILINEAR))


def differs(image, pixels, mode='RGB'):
  expected = example(pixels, image.shape[0], mode).reshape(image.shape)
  return np.abs(image.astype(int) - expected)


def as_pillow_does(path):
  with warnings.catch_warnings(action='ignore'), Image.open(path) as image:
    return np.asarray(image.convert('RGB'))


def judge(case, path, image):
  """Whether an image, or None, is what should come of a case."""
  if image is None:
    return isinstance(case.expected, str)
  if isinstance(case.expected, np.ndarray):
    difference = differs(image, case.expected)
    if case.lossy:
      return difference.mean() < 2 and difference.max() < 20
    return difference.max() <= ROUNDING
  if case.expected == hostile_images.REFUSED:
    return False
  try:
    expected = as_pillow_does(path)
  except Exception:
    # Of what was cut off none was within the square.
    expected = hostile_images.sound()[os.fsdecode(case.name).split('_', 2)[2]]
    return differs(image, expected[1]).mean() < 2
  if case.name.endswith(b'held_6.jpg'):
    turned = np.ascontiguousarray(expected.swapaxes(0, 1)[:, ::-1])
    return (
      min(differs(image, pixels).max() for pixels in (turned, expected))
      <= ROUNDING
    )
  return differs(image, expected).max() <= ROUNDING


def try_images(reader, cases, folder):
  """Reads each by itself, strictly, and returns the names of the lost."""
  lost, refused = [], set()
  paths = hostile_images.write_all(folder, cases)
  for case, path in zip(cases, paths, strict=True):
    try:
      reply = reader('read_image', path=path.hex(), channels=3, image_size=SIZE)
      image = None
      if reply['error'] is None:
        image = reply['arrays']['images'][0]
      else:
        refused.add(case.name)
        assert re.search(f'cannot be decoded.*{case.reason}', reply['error']), (
          reply['error']
        )
        assert 'a sound one in its place' in reply['error']
      assert judge(case, path, image), reply['error'] or 'other pixels'
    except AssertionError as error:
      lost.append(f'{case.name}: {error}')
  return lost, refused


def as_celeba(folder, names, sound='sound.png'):
  """Makes a folder of images a data set with `names` in the train split."""
  images = folder / 'img_align_celeba'
  data, pixels, _ = hostile_images.sound()['plain.png']
  (images / sound).write_bytes(data)
  rows = [os.fsencode(name) + b',0\n' for name in names]
  rows += [f'{n}_{sound},{n}\n'.encode() for n in (0, 1, 2)]
  for number in (0, 1, 2):
    (images / f'{number}_{sound}').write_bytes(data)
  (folder / 'list_eval_partition.csv').write_bytes(b''.join(rows))
  return pixels


def try_all_skipping(reader, cases, refused, folder):
  """Reads all as a data set that leaves out what cannot be decoded."""
  # As a list of lines can name them. Several are decoded at a time, and so
  # without the largest.
  listed = [
    case
    for case in cases
    if os.fsdecode(case.name).isprintable() and case.kind != 'largest'
  ]
  as_celeba(folder, [case.name for case in listed])
  settings = {
    'source': 'celeba',
    'dir': str(folder),
    'image_size': SIZE,
    'skip_corrupt': True,
    'cache': 'host',
  }
  reply = reader('load', settings=settings)
  assert reply['error'] is None, reply['error']
  kept = [case for case in listed if case.name not in refused]
  left_out = len(listed) - len(kept)
  images = reply['arrays']['train']
  assert len(images) == len(kept) + 1
  assert f'skipped {left_out} of {len(listed) + 1} images' in reply['said']
  for case, image in zip(kept, images, strict=False):
    path = os.fsencode(folder / 'img_align_celeba') + b'/' + case.name
    assert judge(case, path, image), case.name
  return len(kept), left_out


def images_in(tmp_path):
  folder = tmp_path / 'images' / 'img_align_celeba'
  folder.mkdir(parents=True)
  return folder


def run_images(reader, cases, tmp_path):
  folder = images_in(tmp_path)
  lost, refused = try_images(reader, cases, folder)
  assert not lost, '\n'.join(lost)
  # Not nothing, and not all.
  assert 0 < len(refused) < len(cases)
  try_all_skipping(reader, cases, refused, folder.parent)


def test_one_image_file_of_each_kind(reader, tmp_path):
  cases = list(hostile_images.cases(SEED))
  some = one_of_each(cases)
  # What most would have waited for, or have taken memory for.
  more = (b'zero.jpg', b'sparse.jpg', b'palette.bmp')
  some += [case for case in cases if case.name in more]
  run_images(reader, some, tmp_path)


@pytest.mark.faults
def test_hostile_image_files(reader, tmp_path, record_property):
  cases = list(hostile_images.cases(SEED))
  assert len(cases) >= 200
  assert len({case.name for case in cases}) == len(cases)
  folder = images_in(tmp_path)
  lost, refused = try_images(reader, cases, folder)
  survived = len(cases) - len(lost)
  record_property(
    'faults', ['hostile image files', len(cases), survived, what(lost)]
  )
  assert not lost, '\n'.join(lost)
  kept, left_out = try_all_skipping(reader, cases, refused, folder.parent)
  assert kept > 60 and left_out > 60


def what(lost):
  return '; '.join(lost) or 'nothing'


GREY = (
  'plain.jpg',
  'cmyk.jpg',
  'ycck.jpg',
  'held_6.jpg',
  'deep.png',
  'palette.png',
  'palette.bmp',
  'alpha.webp',
  'moving.gif',
)


@pytest.mark.parametrize('name', GREY)
def test_unusual_images_in_grey(reader, tmp_path, name):
  data, pixels, lossy = hostile_images.sound()[name]
  (tmp_path / name).write_bytes(data)
  path = os.fsencode(tmp_path / name).hex()
  reply = reader('read_image', path=path, channels=1, image_size=SIZE)
  difference = differs(reply['arrays']['images'][0], pixels, 'L')
  assert difference.mean() < (1 if lossy else 0.6)
  assert difference.max() <= (10 if lossy else ROUNDING)


def try_named_files(reader, cases, folder):
  lost = []
  paths = hostile_images.write_all(folder, cases)
  for case, path in zip(cases, paths, strict=True):
    try:
      reply = reader('load_image', path=path.hex(), side=SIZE)
      image = None
      if reply['error'] is None:
        image = reply['arrays']['images'][0]
      else:
        assert re.search(
          'cannot be read as an image|no such file', reply['error']
        )
      assert judge(case, path, image), reply['error'] or 'other pixels'
    except AssertionError as error:
      lost.append(f'{case.name}: {error}')
  return lost


def for_pillow(cases):
  """Pillow refuses a PNG with a very long text, which another passes over."""
  return [
    dataclasses.replace(case, expected=hostile_images.REFUSED)
    if case.name in (b'text.png', b'profile.png')
    else case
    for case in cases
  ]


def test_one_named_file_of_each_kind(reader, tmp_path):
  cases = one_of_each(for_pillow(list(hostile_images.cases(SEED))))
  assert not try_named_files(reader, cases, tmp_path)


@pytest.mark.faults
def test_hostile_files_named_to_generate(reader, tmp_path, record_property):
  cases = for_pillow(list(hostile_images.cases(SEED + 1)))
  lost = try_named_files(reader, cases, tmp_path)
  survived = len(cases) - len(lost)
  record_property(
    'faults',
    ['hostile files for generate.py', len(cases), survived, what(lost)],
  )
  assert not lost, '\n'.join(lost)


def test_two_decoders_agree_on_what_is_turned():
  """Pillow's own upright image, beside the table that the cases are made by."""
  for orientation in range(2, 9):
    data, pixels, _ = hostile_images.sound()[f'held_{orientation}.jpg']
    upright = image_files.decode(data, 3)
    difference = np.abs(np.asarray(upright).astype(int) - pixels)
    assert difference.mean() < 2


@pytest.mark.parametrize('change', data_process.CHANGES)
def test_images_that_change_after_they_were_listed(
  reader, celeba_dir, tmp_path, change
):
  folder = shutil.copytree(celeba_dir, tmp_path / 'celeba')
  path = str(folder / 'img_align_celeba' / '000007.jpg')
  # It was sound when those that are not were left out.
  settings = {'source': 'celeba', 'dir': str(folder), 'skip_corrupt': True}
  change = [change, path]
  reply = reader('load', settings=settings, read=['train'], change=change)
  assert '000007.jpg cannot be decoded' in reply['error']


# Lists.

WHOLE = b'000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n'
CSV = b'image_id,partition\n000001.jpg,0\n000002.jpg,1\n000003.jpg,2\n'


def as_utf(encoding):
  return WHOLE.decode().encode(encoding)


def link(target):
  return lambda path: path.symlink_to(target)


# Name: suffix, content or what makes it, what is said of it or None if sound.
LISTS = {
  'whole': ('txt', WHOLE, None),
  'whole csv': ('csv', CSV, None),
  'twice in a split': ('txt', WHOLE + b'000001.jpg 0\n', 'line 4: .*line 1'),
  'twice in two': ('txt', WHOLE + b'000001.jpg 2\n', 'line 4: .*line 1'),
  'csv, in two': ('csv', CSV + b'000002.jpg,0\n', 'line 5: .*line 3'),
  'no column': ('txt', WHOLE + b'000004.jpg\n', 'line 4'),
  'no name': ('csv', CSV + b',0\n', 'line 5'),
  'one column more': ('txt', WHOLE + b'000004.jpg 0 0\n', 'line 4'),
  'csv, one more': ('csv', CSV + b'000004.jpg,0,\n', 'line 5'),
  'Windows': ('txt', WHOLE.replace(b'\n', b'\r\n'), None),
  'old Mac': ('txt', WHOLE.replace(b'\n', b'\r'), None),
  'old Mac, wrong': ('csv', CSV.replace(b'\n', b'\r') + b'x,3\r', 'line 5'),
  'mixed ends': ('txt', WHOLE.replace(b'\n', b'\r\n', 1), None),
  'empty lines': ('csv', CSV.replace(b'\n', b'\n\n \n'), None),
  'no last end': ('txt', WHOLE.strip(), None),
  'UTF-8 mark': ('txt', as_utf('utf-8-sig'), None),
  'UTF-16': ('txt', as_utf('utf-16'), 'no text in UTF-8'),
  'UTF-16 without mark': ('txt', as_utf('utf-16-le'), 'line 1'),
  'UTF-32': ('txt', as_utf('utf-32'), 'no text in UTF-8'),
  'Latin-1': ('txt', WHOLE + b'\xe4.jpg 0\n', 'no text in UTF-8'),
  'NUL in a name': ('txt', WHOLE + b'a\0.jpg 0\n', 'line 4'),
  'NULs': ('txt', bytes(5000), 'line 1'),
  'empty': ('txt', b'', 'it is empty'),
  'spaces': ('txt', b' \n\t\n', 'names no images'),
  'header': ('csv', b'image_id,partition\n', 'names no images'),
  'no header': ('csv', CSV.split(b'\n', 1)[1], None),
  'other header': ('csv', CSV.replace(b'image_id', b'file'), 'line 1'),
  'quoted': ('csv', CSV.replace(b'000001.jpg', b'"000001.jpg"'), None),
  'all quoted': (
    'csv',
    CSV.replace(b',', b'","').replace(b'\n', b'"\n"')[:-1].join([b'"', b'']),
    None,
  ),
  'quoted and wrong': ('csv', CSV + b'"a,b.jpg",0\n', 'line 5'),
  'parent': ('txt', WHOLE + b'../secret.jpg 0\n', 'line 4'),
  'parent within': ('csv', CSV + b'a/../../secret.jpg,0\n', 'line 5'),
  'absolute': ('txt', WHOLE + b'/etc/passwd 0\n', 'line 4'),
  'a bucket': ('txt', WHOLE + b'gs://a/b.jpg 0\n', 'line 4'),
  'dot': ('txt', WHOLE + b'. 0\n', 'line 4'),
  'two dots': ('csv', CSV + b'..,0\n', 'line 5'),
  'backslashes': ('txt', WHOLE + b'..\\secret.jpg 0\n', 'line 4'),
  'drive': ('csv', CSV + b'C:\\secret.jpg,0\n', 'line 5'),
  'three': ('txt', WHOLE + b'000004.jpg 3\n', 'line 4'),
  'minus': ('txt', WHOLE + b'000004.jpg -1\n', 'line 4'),
  'fraction': ('csv', CSV + b'000004.jpg,0.0\n', 'line 5'),
  'words': ('csv', CSV + b'000004.jpg,train\n', 'line 5'),
  'other digits': ('txt', WHOLE + '000004.jpg ١\n'.encode(), 'line 4'),
  'wide digit': ('csv', CSV + '000004.jpg,１\n'.encode(), 'line 5'),
  'long number': ('txt', WHOLE + b'a ' + b'9' * 100_000, 'line 4'),
  'long name': ('txt', WHOLE + b'n' * 100_000 + b' 0\n', 'names 1 files'),
  'long line': ('csv', CSV + b'n,' * 100_000, 'line 5'),
  'one long line': ('txt', WHOLE.replace(b'\n', b' ') * 10_000, 'line 1'),
  'not there': ('txt', WHOLE + b'000009.jpg 0\n', 'names 1 files.*000009'),
  'controls': ('txt', WHOLE + b'\x1b[31m.jpg 0\n', r'names 1 files.*\\x1b'),
  'picture': ('txt', hostile_images.sound()['plain.jpg'][0], 'no text'),
  'pickle': ('csv', pickle.dumps(['a', 0]), 'no text|line'),
  'cut': ('txt', WHOLE[:-2], 'line 3'),
  'folder': ('txt', lambda path: path.mkdir(), 'it is a folder'),
  'pipe': ('txt', os.mkfifo, 'it is a named pipe'),
  'pipe csv': ('csv', os.mkfifo, 'it is a named pipe'),
  'endless': ('txt', link('/dev/zero'), 'it is a device'),
  'link to itself': ('txt', link('list_eval_partition.txt'), 'which says'),
  'link nowhere': ('csv', link('nothing'), 'which says'),
  'sparse': (
    'txt',
    lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    '1,099,511,627,776 bytes, and the limit',
  ),
}
OF_LISTS = ('twice in two', 'parent', 'pipe', 'endless', 'UTF-16', 'all quoted')


def make(path, content):
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    content(path)


def try_list(reader, folder, name):
  """What is wrong with what is made of a list, or nothing."""
  suffix, content, said = LISTS[name]
  images = folder / 'img_align_celeba'
  images.mkdir(parents=True)
  data = hostile_images.sound()['plain.png'][0]
  for number in range(1, 5):
    (images / f'{number:06d}.jpg').write_bytes(data)
  (folder / 'secret.jpg').write_bytes(data)
  make(folder / f'list_eval_partition.{suffix}', content)
  settings = {'source': 'celeba', 'dir': str(folder)}
  reply = reader('load', settings=settings, read=[])
  if said is None:
    assert reply['error'] is None
    sizes = [int(reply['arrays'][f'num_{s}']) for s in data_process.SPLITS]
    assert sizes == [1, 1, 1]
  else:
    assert re.search(f'list_eval_partition.*{said}', str(reply['error'])), (
      reply['error']
    )


def try_each(names, attempt, tmp_path):
  """The names of those that end otherwise than they should, and how."""
  lost = []
  for number, name in enumerate(names):
    folder = tmp_path / str(number)
    folder.mkdir()
    try:
      attempt(folder, name)
    except AssertionError as error:
      lost.append(f'{name}: {error}')
  return lost


def test_some_hostile_lists(reader, tmp_path):
  attempt = lambda folder, name: try_list(reader, folder, name)
  assert not try_each(OF_LISTS, attempt, tmp_path)


@pytest.mark.faults
def test_hostile_lists(reader, tmp_path, record_property):
  attempt = lambda folder, name: try_list(reader, folder, name)
  lost = try_each(LISTS, attempt, tmp_path)
  survived = len(LISTS) - len(lost)
  record_property(
    'faults', ['hostile lists of splits', len(LISTS), survived, what(lost)]
  )
  assert not lost, '\n'.join(lost)


def attributes(folder):
  return (folder / 'list_attr_celeba.txt').read_bytes()


# Name: what is made of the list's bytes, what is said or None if sound.
ATTRIBUTES = {
  'whole': (lambda data: data, None),
  'Windows': (lambda data: data.replace(b'\n', b'\r\n'), None),
  'old Mac': (lambda data: data.replace(b'\n', b'\r'), None),
  'UTF-8 mark': (lambda data: b'\xef\xbb\xbf' + data, None),
  'spaces': (lambda data: data.replace(b' ', b'   '), None),
  'UTF-16': (lambda data: data.decode().encode('utf-16'), 'no text in UTF-8'),
  'NULs': (lambda data: data.replace(b'000002', b'00\x0002'), 'lacks'),
  'empty': (lambda data: b'', 'it is empty'),
  'header': (lambda data: data[: data.index(b'0000')], 'lacks'),
  'no count': (lambda data: data.split(b'\n', 1)[1], 'line 1'),
  'other digits': (lambda data: '٥٦'.encode() + data[2:], 'line 1'),
  'a name twice': (lambda data: data.replace(b'Bald', b'Smiling', 1), 'once'),
  'an image twice': (
    lambda data: data + b'000001.jpg 1 1 1 1\n',
    'line 59: .*line 3',
  ),
  'a column less': (lambda data: data[:-4] + b'\n', 'line 58'),
  'a column more': (lambda data: data[:-1] + b' 1\n', 'line 58'),
  'zeros for no': (lambda data: data.replace(b' -1', b' 0'), None),
  'two': (lambda data: data + b'x.jpg 2 1 1 1\n', 'line 59'),
  'wide digit': (lambda data: data + 'x.jpg １ 1 1 1\n'.encode(), 'line 59'),
  'long line': (lambda data: data + b'x ' * 100_000, 'line 59'),
  'long name': (lambda data: data + b'x' * 100_000 + b' 1 1 1 1\n', None),
  'cut': (lambda data: data[: len(data) // 2], 'line|lacks'),
  'picture': (
    lambda data: hostile_images.sound()['plain.jpg'][0],
    'no text in UTF-8',
  ),
  'pipe': (os.mkfifo, 'it is a named pipe'),
  'endless': (link('/dev/zero'), 'it is a device'),
  'folder': (lambda path: path.mkdir(), 'it is a folder'),
}
MAKE_A_FILE = ('pipe', 'endless', 'folder')


def try_attributes(reader, celeba_dir, folder, name):
  change, said = ATTRIBUTES[name]
  folder = shutil.copytree(celeba_dir, folder / 'celeba')
  path = folder / 'list_attr_celeba.txt'
  if name in MAKE_A_FILE:
    path.unlink()
    change(path)
  else:
    path.write_bytes(change(path.read_bytes()))
  settings = {'source': 'celeba', 'dir': str(folder)}
  reply = reader('load', settings=settings, read=[], labels=True)
  if said is None:
    assert reply['error'] is None
    lines = attributes(celeba_dir).decode().splitlines()[2:]
    signs = [[int(sign) for sign in line.split()[1:]] for line in lines]
    expected = np.array(signs[: SPLIT_SIZES[0]]) > 0
    np.testing.assert_array_equal(reply['arrays']['labels_train'], expected)
  else:
    assert re.search(f'list_attr_celeba.*{said}', str(reply['error'])), reply[
      'error'
    ]


def test_some_hostile_attributes(reader, celeba_dir, tmp_path):
  attempt = lambda folder, name: try_attributes(
    reader, celeba_dir, folder, name
  )
  some = ('pipe', 'an image twice', 'old Mac', 'long line', 'zeros for no')
  assert not try_each(some, attempt, tmp_path)


@pytest.mark.faults
def test_hostile_attributes(reader, celeba_dir, tmp_path, record_property):
  attempt = lambda folder, name: try_attributes(
    reader, celeba_dir, folder, name
  )
  lost = try_each(ATTRIBUTES, attempt, tmp_path)
  survived = len(ATTRIBUTES) - len(lost)
  record_property(
    'faults',
    ['hostile lists of attributes', len(ATTRIBUTES), survived, what(lost)],
  )
  assert not lost, '\n'.join(lost)


# Folders.


def images_below(folder, count=6):
  folder.mkdir(parents=True, exist_ok=True)
  data = hostile_images.sound()['plain.png'][0]
  for number in range(count):
    (folder / f'{number}.png').write_bytes(data)
  return folder


def looped(path):
  images_below(path / 'a' / 'b')
  (path / 'a' / 'loop').symlink_to(path)
  (path / 'a' / 'b' / 'up').symlink_to('..')


def two_links(path):
  (path.parent / 'other').symlink_to(path)
  path.symlink_to('other')


def with_pipe_beside(path):
  images_below(path)
  os.mkfifo(path / 'notes.txt')


def as_tfds(path):
  """A data set of TFDS of which a description never comes."""
  version = path / 'celeb_a' / '2.1.0'
  version.mkdir(parents=True)
  os.mkfifo(version / 'dataset_info.json')


def as_broken_tfds(path):
  version = path / 'celeb_a' / '2.1.0'
  version.mkdir(parents=True)
  (version / 'dataset_info.json').write_text('{"name": "celeb_a", ')
  (version / 'features.json').write_text('{}')


def endless_path(path):
  path.symlink_to('/dev/zero')


# Name: what is made, the source, what is said or the number of images.
FOLDERS = {
  'a file': (lambda path: path.write_text('x'), 'folder', 'it is no folder'),
  'a file for celeba': (
    lambda path: path.write_text('x'),
    'celeba',
    'it is no folder',
  ),
  'a pipe': (os.mkfifo, 'folder', 'it is no folder'),
  'a device': (endless_path, 'folder', 'it is no folder'),
  'empty': (lambda path: path.mkdir(), 'folder', 'holds 0 images'),
  'empty, celeba': (lambda path: path.mkdir(), 'celeba', 'holds neither'),
  'two images': (lambda path: images_below(path, 2), 'folder', 'at least 3'),
  'nothing': (lambda path: None, 'folder', 'there is no such folder'),
  'link nowhere': (link('nothing'), 'folder', 'there is no such folder'),
  'link to itself': (link('data'), 'celeba', 'there is no such folder'),
  'links to each other': (two_links, 'folder', 'there is no such folder'),
  'a loop below': (looped, 'folder', 6),
  'a pipe beside': (with_pipe_beside, 'folder', 6),
  'TFDS, pipe': (as_tfds, 'celeba', 'no intact data set.*named pipe'),
  'TFDS, broken': (as_broken_tfds, 'celeba', 'no intact data set'),
}


def try_folder(reader, folder, name):
  make, source, said = FOLDERS[name]
  path = folder / 'data'
  make(path)
  reply = reader('load', settings={'source': source, 'dir': str(path)})
  if isinstance(said, int):
    assert reply['error'] is None
    sizes = [int(reply['arrays'][f'num_{s}']) for s in data_process.SPLITS]
    assert sum(sizes) == said
  else:
    error = str(reply['error'])
    assert re.search(f'{re.escape(str(path))}.*{said}', error), error


def test_folders(reader, tmp_path, monkeypatch):
  attempt = lambda folder, name: try_folder(reader, folder, name)
  names = [name for name in FOLDERS if name != 'empty, celeba']
  assert not try_each(names, attempt, tmp_path)


@pytest.mark.parametrize('name', ['\0', 'x' * 300, '~nobody_of_this_name/x'])
def test_impossible_names_of_folders(reader, name):
  for source in ('folder', 'celeba'):
    reply = reader('load', settings={'source': source, 'dir': name})
    assert 'config.data.dir is ' in reply['error']


def test_folder_that_may_not_be_listed(reader, tmp_path, monkeypatch):
  """Root may list everything, so that the system's refusal is played."""
  from data import sources

  images_below(tmp_path)
  refused = images_below(tmp_path / 'refused')

  def scan(path, scan=os.scandir):
    if os.fspath(path) == str(refused):
      raise PermissionError(errno.EACCES, 'Permission denied', str(refused))
    return scan(path)

  monkeypatch.setattr(os, 'scandir', scan)
  with pytest.raises(UserError, match=f'{refused} cannot be read .Permission'):
    sources.find('folder', str(tmp_path))


def test_image_that_may_not_be_read(reader, tmp_path):
  images_below(tmp_path)
  (tmp_path / '3.png').chmod(0)
  if os.access(tmp_path / '3.png', os.R_OK):
    pytest.skip('root may read everything')
  path = os.fsencode(tmp_path / '3.png').hex()
  reply = reader('read_image', path=path, channels=3, image_size=SIZE)
  assert '3.png cannot be decoded (Permission denied)' in reply['error']


# Records of TFDS.


@pytest.fixture(scope='module')
def prepared(celeba_dir, tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  CelebA.folder = celeba_dir
  CelebA(data_dir=folder).download_and_prepare()
  return folder


def record_size(data):
  """Bytes of the first record: two lengths and two checksums around it."""
  return struct.unpack('<Q', data[:8])[0] + 16


RECORDS = {
  'cut': lambda data: data[: len(data) // 2],
  'cut between two': lambda data: data[: record_size(data)],
  'one twice': lambda data: data + data[: record_size(data)],
  'flipped': lambda data: flipped(len(data) // 2)(data),
  'flipped length': lambda data: flipped(2)(data),
  'empty': lambda data: b'',
  'text': lambda data: b'no records',
}


@pytest.mark.parametrize('settings', [{}, {'cache': 'host'}, {'skip': True}])
def test_damaged_records(reader, prepared, tmp_path, settings):
  settings = {
    'source': 'celeba',
    'cache': settings.get('cache', 'none'),
    'skip_corrupt': 'skip' in settings,
  }
  whole = reader('load', settings=settings | {'dir': str(prepared)})
  assert len(whole['arrays']['train']) == SPLIT_SIZES[0]
  for name, change in RECORDS.items():
    folder = shutil.copytree(prepared, tmp_path / name)
    [path] = folder.glob('celeb_a/*/*-train.*')
    path.write_bytes(change(path.read_bytes()))
    reply = reader('load', settings=settings | {'dir': str(folder)})
    assert re.search(
      'train split in .* are damaged|-train.* cannot be read .it is empty',
      str(reply['error']),
    ), f'{name}: {reply["error"]}'
    assert 'prepare it again' in reply['error']


# Decoded images.


def damaged_head(data):
  """A head that claims four times as many images."""
  return data.replace(b"'shape': (40,", b"'shape': (160,").replace(
    b' ' * 9 + b'\n', b' ' * 8 + b'\n', 1
  )


def object_array(data):
  file = io.BytesIO()
  np.save(file, np.array([Trap()], object), allow_pickle=True)
  return file.getvalue()


class Trap:
  """What is unpickled leaves a trace."""

  path = '/tmp/trap'

  def __reduce__(self):
    return (os.mkdir, (self.path,))


def array_of(array):
  def save(data):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()

  return save


def flipped(place):
  def flip(data):
    place_in = place if place >= 0 else len(data) + place
    return data[:place_in] + bytes([data[place_in] ^ 4]) + data[place_in + 1 :]

  return flip


CACHES = {
  'whole': lambda data: data,
  'empty': lambda data: b'',
  'cut': lambda data: data[: len(data) // 2],
  'cut by one': lambda data: data[:-1],
  'checksum cut off': lambda data: data[:-4],
  'longer': lambda data: data + b'x',
  'zeros': lambda data: bytes(len(data)),
  'another shape': array_of(np.zeros((40, 16, 16, 1), np.uint8)),
  'as many in another shape': array_of(np.zeros((40, 8, 32, 3), np.uint8)),
  'another type': array_of(np.zeros((40, 16, 16, 3), np.int8)),
  'floats': array_of(np.zeros((40, 16, 16, 3), np.float32)),
  'no checksum': array_of(np.zeros((40, 16, 16, 3), np.uint8)),
  'objects': object_array,
  'pickle': lambda data: pickle.dumps(Trap()),
  'larger': damaged_head,
  'enormous': lambda data: data.replace(b'(40, 16,', b'(9999999999999, 16,'),
  'other order': lambda data: data.replace(b'False', b'True '),
  'other letters': lambda data: data.replace(b'|u1', b'|i1'),
  **{f'flip {place}': flipped(place) for place in (0, 7, 9, 30, 60, 100)},
  **{f'flip {place}': flipped(place) for place in (128, 5000, 20_000, -5, -1)},
  'pipe': os.mkfifo,
  'a folder': lambda path: path.mkdir(),
  'a device': link('/dev/zero'),
  'link nowhere': link('nothing'),
}
CACHE_FILES = ('pipe', 'a folder', 'a device', 'link nowhere')


@pytest.fixture(scope='module')
def decoded(reader, celeba_dir, tmp_path_factory):
  """A folder of decoded images, and those of the train split."""
  folder = tmp_path_factory.mktemp('decoded')
  reply = reader('load', settings=cached(celeba_dir, folder))
  return folder, reply['arrays']['train']


def cached(celeba_dir, folder):
  return {
    'source': 'celeba',
    'dir': str(celeba_dir),
    'cache': 'host',
    'decoded_dir': str(folder),
  }


def try_cache(reader, celeba_dir, decoded, folder, name):
  kept = shutil.copytree(decoded[0], folder / 'kept')
  [path] = kept.glob('train_*.npy')
  content = path.read_bytes()
  if name in CACHE_FILES:
    path.unlink()
    CACHES[name](path)
  else:
    path.write_bytes(CACHES[name](content))
    assert name == 'whole' or path.read_bytes() != content
  settings = cached(celeba_dir, kept)
  reply = reader('load', settings=settings, read=['train'])
  assert reply['error'] is None, reply['error']
  np.testing.assert_array_equal(reply['arrays']['train'], decoded[1])
  how = 'read' if name == 'whole' else 'decoded'
  assert f'train: {how} 40 images' in reply['said'], reply['said']
  if name == 'a folder':
    assert 'are not kept' in reply['said']
  else:  # Whole again.
    assert path.read_bytes() == content
  assert not os.path.exists(Trap.path)


def test_some_damaged_decoded_images(
  reader, celeba_dir, decoded, tmp_path, monkeypatch
):
  monkeypatch.setattr(Trap, 'path', str(tmp_path / 'trap'))
  attempt = lambda folder, name: try_cache(
    reader, celeba_dir, decoded, folder, name
  )
  some = ('whole', 'flip 5000', 'cut', 'objects', 'pipe', 'enormous')
  assert not try_each(some, attempt, tmp_path)


@pytest.mark.faults
def test_damaged_decoded_images(
  reader, celeba_dir, decoded, tmp_path, monkeypatch, record_property
):
  monkeypatch.setattr(Trap, 'path', str(tmp_path / 'trap'))
  attempt = lambda folder, name: try_cache(
    reader, celeba_dir, decoded, folder, name
  )
  lost = try_each(CACHES, attempt, tmp_path)
  survived = len(CACHES) - len(lost)
  record_property(
    'faults', ['damaged decoded images', len(CACHES), survived, what(lost)]
  )
  assert not lost, '\n'.join(lost)


def test_the_trap_is_one(tmp_path, monkeypatch):
  monkeypatch.setattr(Trap, 'path', str(tmp_path / 'trap'))
  pickle.loads(pickle.dumps(Trap()))
  assert os.path.exists(Trap.path)


def test_a_flipped_bit_anywhere_in_a_decoded_image_is_seen(tmp_path):
  store = DecodedStore(str(tmp_path))
  array = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
  store.write('a', array)
  content = bytearray(store.path('a').read_bytes())
  np.testing.assert_array_equal(store.read('a'), array)
  for place in range(len(content)):
    bit = 1 << place % 8
    content[place] ^= bit
    store.path('a').write_bytes(content)
    content[place] ^= bit
    found = store.read('a')
    # The blanks in the head may be others.
    assert found is None or place < len(content) - array.nbytes - 4
    if found is not None:
      np.testing.assert_array_equal(found, array)


# Reading at all.


def test_nothing_is_unpickled():
  root = pathlib.Path(__file__).resolve().parent.parent
  sources = [
    path
    for folder in ('', 'data', 'runs', 'vae', 'evaluation', 'sweeps', 'configs')
    for path in (root / folder).glob('*.py')
  ]
  assert len(sources) > 50
  for path in sources:
    text = path.read_text()
    assert not re.search(
      r'\bpickle\.|import pickle|torch\.load|joblib|allow_pickle=True', text
    ), path
    calls = re.findall(r'np\.load\(.*\)|read_array\(.*\)', text)
    assert all('allow_pickle=False' in call for call in calls), path


def test_what_is_no_file_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'four').write_bytes(b'1234')
  assert ordinary_files.read(tmp_path / 'four', max_bytes=4) == b'1234'
  for name, reason in (
    ('pipe', 'it is a named pipe'),
    ('', 'it is a folder'),
    ('none', 'No such file or directory'),
    ('a\0b', 'its name has a zero byte'),
  ):
    with pytest.raises(OSError) as caught:
      ordinary_files.read(tmp_path / name)
    assert caught.value.strerror.endswith(reason)
  with pytest.raises(OSError, match='it has 4 bytes, and the limit is 3'):
    ordinary_files.read(tmp_path / 'four', max_bytes=3)


def test_a_list_of_a_pipe_is_refused_in_this_process_too(tmp_path):
  os.mkfifo(tmp_path / 'list.txt')
  with pytest.raises(UserError, match='named pipe'):
    celeba._read_partition(tmp_path / 'list.txt')
