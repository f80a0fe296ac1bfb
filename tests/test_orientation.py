"""Images that say how the camera was held are turned by both decoders.

The upright pixels are Pillow's own: it opens the same bytes and transposes.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL import ImageOps
import pytest
import tensorflow as tf

from data import crops
from data import image_files

ORIENTATIONS = range(1, 9)
SIZE = 32


def picture():
  """A square, so that each way of turning it is another picture."""
  pixels = np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8)
  return Image.fromarray(pixels).resize((SIZE, SIZE), Image.BILINEAR)


def encode(format, **options):
  file = io.BytesIO()
  picture().save(file, format, **options)
  return file.getvalue()


def tiff(orientation, endian='<'):
  """EXIF's own content: a TIFF of one entry."""
  mark = {'<': b'II', '>': b'MM'}[endian]
  head = mark + struct.pack(f'{endian}HI', 42, 8)
  entry = struct.pack(f'{endian}HHIHH', 0x0112, 3, 1, orientation, 0)
  return head + struct.pack(f'{endian}H', 1) + entry + bytes(4)


def xmp(orientation):
  return (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description '
    f'tiff:Orientation="{orientation}"/></x:xmpmeta>'
  ).encode()


# JPEG.


def segment(marker, data):
  return bytes([0xFF, marker]) + struct.pack('>H', len(data) + 2) + data


def jpeg(*segments, before_jfif=False):
  """A JPEG with segments after, or before, its first."""
  data = encode('JPEG', quality=95, subsampling=0)
  place = 2 if before_jfif else 4 + struct.unpack('>H', data[4:6])[0]
  return data[:place] + b''.join(segments) + data[place:]


def app1(orientation, endian='<'):
  return segment(0xE1, b'Exif\0\0' + tiff(orientation, endian))


PROFILE = segment(0xE2, b'ICC_PROFILE\0\1\1' + bytes(60_000))
XMP = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>' + b' ' * 4000)
COMMENT = segment(0xFE, b'made by hand ' * 100)
# A thumbnail has a start of scan, of its own.
THUMBNAIL = segment(0xED, b'Photoshop 3.0\0' + encode('JPEG', quality=50))


def split_app1(orientation):
  """EXIF that goes on in a second segment."""
  content = tiff(orientation)
  parts = content[:11], content[11:]
  return b''.join(segment(0xE1, b'Exif\0\0' + part) for part in parts)


JPEGS = {
  'first': lambda o: jpeg(app1(o), before_jfif=True),
  'after JFIF': lambda o: jpeg(app1(o)),
  'big-endian': lambda o: jpeg(app1(o, '>')),
  'after a profile': lambda o: jpeg(PROFILE, app1(o)),
  'after XMP': lambda o: jpeg(XMP, app1(o)),
  'after a comment': lambda o: jpeg(COMMENT, app1(o)),
  'after a thumbnail': lambda o: jpeg(THUMBNAIL, app1(o)),
  'after all': lambda o: jpeg(COMMENT, PROFILE, PROFILE, XMP, app1(o)),
  'in two segments': lambda o: jpeg(PROFILE, split_app1(o)),
  'in XMP': lambda o: jpeg(
    segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0' + xmp(o))
  ),
}

# PNG.


def chunk(kind, data):
  checksum = struct.pack('>I', zlib.crc32(kind + data))
  return struct.pack('>I', len(data)) + kind + data + checksum


def png(*chunks, at_end=False):
  data = encode('PNG')
  place = data.index(b'IEND') - 4 if at_end else data.index(b'IDAT') - 4
  return data[:place] + b''.join(chunks) + data[place:]


def raw_profile(orientation):
  """As ImageMagick writes it."""
  content = b'Exif\0\0' + tiff(orientation)
  return f'\nexif\n{len(content):8}\n{content.hex()}\n'.encode()


TEXT = chunk(b'tEXt', b'Comment\0' + b'x' * 5000)
XMP_KEY = b'XML:com.adobe.xmp\0'

PNGS = {
  'first': lambda o: png(chunk(b'eXIf', tiff(o))),
  'big-endian': lambda o: png(chunk(b'eXIf', tiff(o, '>'))),
  'after a text': lambda o: png(TEXT, chunk(b'eXIf', tiff(o))),
  'at the end': lambda o: png(chunk(b'eXIf', tiff(o)), at_end=True),
  'as a text': lambda o: png(
    chunk(b'tEXt', b'Raw profile type exif\0' + raw_profile(o))
  ),
  'packed': lambda o: png(
    TEXT,
    chunk(
      b'zTXt', b'Raw profile type exif\0\0' + zlib.compress(raw_profile(o))
    ),
  ),
  'in XMP': lambda o: png(chunk(b'iTXt', XMP_KEY + bytes(4) + xmp(o))),
  'in packed XMP': lambda o: png(
    chunk(b'iTXt', XMP_KEY + b'\1\0\0\0' + zlib.compress(xmp(o)))
  ),
}


def exif(orientation):
  found = Image.Exif()
  found[0x0112] = orientation
  return found


OTHERS = {
  'WebP': lambda o: encode('WEBP', lossless=True, exif=exif(o)),
  'TIFF': lambda o: encode('TIFF', exif=exif(o)),
}

PLACES = {
  **{f'JPEG, {place}': make for place, make in JPEGS.items()},
  **{f'PNG, {place}': make for place, make in PNGS.items()},
  **OTHERS,
}


def upright(data):
  with Image.open(io.BytesIO(data)) as image:
    return np.asarray(ImageOps.exif_transpose(image).convert('RGB')).astype(int)


def in_training(data, channels=3):
  decoded = crops.Crop(0, SIZE, channels).decode(tf.constant(data))
  return decoded.numpy().astype(int)


def named_by_the_user(data):
  return np.asarray(image_files.decode(data, 3)).astype(int)


def turned(orientation):
  """By EXIF's table: where the first row and column were, seen upright."""
  pixels = np.asarray(picture()).astype(int)
  across = np.swapaxes(pixels, 0, 1)
  return {
    1: pixels,
    2: pixels[:, ::-1],
    3: pixels[::-1, ::-1],
    4: pixels[::-1],
    5: across,
    6: across[:, ::-1],
    7: across[::-1, ::-1],
    8: across[::-1],
  }[orientation]


@pytest.mark.parametrize('place', PLACES)
def test_wherever_it_is_said_both_decoders_turn_the_image(place):
  for orientation in ORIENTATIONS:
    data = PLACES[place](orientation)
    expected = upright(data)
    # Pillow did find it.
    assert np.abs(expected - turned(orientation)).mean() < 4
    for found in (in_training(data), named_by_the_user(data)):
      assert np.abs(found - expected).max() <= 2, orientation


def test_grey_images_are_turned_too():
  data = PLACES['PNG, at the end'](6)
  expected = Image.fromarray(upright(data).astype(np.uint8)).convert('L')
  difference = in_training(data, channels=1)[..., 0] - np.asarray(expected)
  assert np.abs(difference).max() <= 2


DAMAGED = {
  'no TIFF': b'no TIFF at all, but some bytes',
  'cut': tiff(6)[:14],
  'leads nowhere': b'II*\0\xff\xff\xff\x7f' + bytes(40),
  'nothing': b'',
}


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
@pytest.mark.parametrize('content', DAMAGED.values(), ids=DAMAGED)
def test_damaged_exif_turns_nothing(content):
  for data in (
    jpeg(PROFILE, segment(0xE1, b'Exif\0\0' + content)),
    png(chunk(b'eXIf', content)),
    encode('WEBP', lossless=True, exif=b'Exif\0\0' + content),
  ):
    for found in (in_training(data), named_by_the_user(data)):
      assert np.abs(found - turned(1)).mean() < 4


def test_ordinary_images_are_not_for_pillow(monkeypatch):
  """Which is slower, and takes turns."""

  def refuse(*_):
    raise AssertionError('decoded by Pillow')

  monkeypatch.setattr(image_files, 'decode', refuse)
  for data in (jpeg(), jpeg(COMMENT, PROFILE, XMP), png(), png(TEXT)):
    assert np.abs(in_training(data) - turned(1)).mean() < 4
