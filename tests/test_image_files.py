"""Decoding, against Pillow."""

import functools
import io
import random
import warnings

import numpy as np
from PIL import Image, ImageOps
import pytest
import tensorflow as tf

from data import image_files
from vae.errors import UserError

SIZE = 32

# Grey levels between decoders and resizers of the same image.
ROUNDING = 3


def picture(size=(178, 218), mode='RGB'):
  """Smooth colours, different everywhere."""
  pixels = np.random.default_rng(5).integers(0, 256, (12, 10, 4), np.uint8)
  image = Image.fromarray(pixels, 'RGBA')
  return image.resize(size, Image.Resampling.BILINEAR).convert(mode)


def encode(image, format, **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def by_pillow(content, channels=3, crop=148):
  """The example of an image file, by another library."""
  with warnings.catch_warnings(action='ignore'):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
  image = image.convert('RGB')
  side = min(crop or 10**6, *image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  image = image.convert('RGB' if channels == 3 else 'L')
  image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
  return np.asarray(image, int).reshape(SIZE, SIZE, channels)


@functools.cache
def decoder(channels, crop):
  return tf.function(image_files.Crop(crop, SIZE, channels).decode)


def decode(content, channels=3, crop=148):
  return decoder(channels, crop)(tf.constant(content)).numpy().astype(int)


def exif(orientation):
  found = Image.Exif()
  found[0x0112] = orientation
  return found


PALETTE = picture().quantize(200)
FILES = {
  'JPEG': encode(picture(), 'JPEG', quality=92),
  'progressive JPEG': encode(picture(), 'JPEG', progressive=True),
  'grey JPEG': encode(picture(mode='L'), 'JPEG'),
  'CMYK JPEG': encode(picture(mode='CMYK'), 'JPEG'),
  'PNG': encode(picture(), 'PNG'),
  'wide PNG': encode(picture((900, 300)), 'PNG'),
  'small PNG': encode(picture((20, 90)), 'PNG'),
  'grey PNG': encode(picture(mode='L'), 'PNG'),
  'PNG with alpha': encode(picture(mode='RGBA'), 'PNG'),
  'PNG with a palette': encode(PALETTE, 'PNG'),
  'GIF': encode(PALETTE, 'GIF', save_all=True, append_images=[picture()]),
  'WebP': encode(picture(), 'WEBP', lossless=True),
  'BMP': encode(picture(), 'BMP'),
  'TIFF': encode(picture(), 'TIFF', compression='tiff_lzw'),
}


DAMAGED = (
  'JPEG',
  'progressive JPEG',
  'CMYK JPEG',
  'PNG',
  'GIF',
  'WebP',
  'TIFF',
)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', FILES)
def test_image_files_are_decoded_as_by_pillow(name, channels):
  for crop in (148, 0):
    expected = by_pillow(FILES[name], channels, crop)
    difference = decode(FILES[name], channels, crop) - expected
    assert np.abs(difference).max() <= ROUNDING


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP'])
def test_images_are_turned_as_the_camera_was_held(format):
  """By EXIF's table: places of the first row and column, seen upright."""
  square = picture((SIZE, SIZE))
  pixels = np.asarray(square, int)
  across = pixels.swapaxes(0, 1)
  upright = {
    1: pixels,
    2: pixels[:, ::-1],
    3: pixels[::-1, ::-1],
    4: pixels[::-1],
    5: across,
    6: across[:, ::-1],
    7: across[::-1, ::-1],
    8: across[::-1],
  }
  options = {'quality': 100, 'subsampling': 0, 'lossless': True}
  for orientation, expected in upright.items():
    content = encode(square, format, exif=exif(orientation), **options)
    assert np.abs(decode(content) - expected).mean() < 2


@pytest.mark.parametrize(('mode', 'channels'), [('L', 3), ('RGB', 1)])
def test_pixels_are_treated_as_their_file(mode, channels):
  pixels = np.asarray(picture(mode=mode)).reshape(218, 178, -1)
  np.testing.assert_array_equal(
    decode(pixels, channels),
    decode(encode(picture(mode=mode), 'PNG'), channels),
  )


def test_image_of_the_right_size_is_not_resampled():
  pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 1), np.uint8)
  content = encode(Image.fromarray(pixels[..., 0]), 'PNG')
  np.testing.assert_array_equal(decode(content, 1, 0), pixels)


def damaged(seed):
  """Files that are cut short, or have flipped bits."""
  chance = random.Random(seed)
  for name in DAMAGED:
    content = FILES[name]
    for number in range(9):
      yield name, content[: chance.randrange(len(content))]
      flipped = bytearray(content)
      # A third of them in the head, which describes the rest.
      end = len(content) if number % 3 else min(len(content), 64)
      for _ in range(1 + number % 2 * 4):
        flipped[chance.randrange(end)] ^= 1 << chance.randrange(8)
      yield name, bytes(flipped)


@pytest.mark.filterwarnings('ignore')
def test_damaged_files_are_decoded_as_by_pillow_or_refused(record_property):
  cases = list(damaged(20))
  num_refused = 0
  for name, content in cases:
    try:
      found = decode(content)
    except tf.errors.OpError:
      num_refused += 1
      assert image_files.why_undecodable(content).isprintable()
      continue
    try:
      expected = by_pillow(content)
    except Exception:  # The part that was lost is outside the square.
      expected = by_pillow(FILES[name])
    assert np.abs(found - expected).max() <= 20, name
  assert len(cases) / 2 < num_refused < len(cases)
  record_property(
    'faults', ['damaged image files', len(cases), len(cases), 'nothing']
  )


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    (b'<!DOCTYPE html>' * 40, 'it is none of JPEG, PNG'),
    (encode(picture(), 'PNG')[:5000], 'truncated'),
    (encode(Image.new('F', (20, 20)), 'TIFF'), 'its pixels are of type F'),
  ],
)
def test_reason_is_in_words(content, reason):
  with pytest.raises(tf.errors.OpError):
    decode(content)
  assert reason in image_files.why_undecodable(content)


def test_users_file_becomes_an_example(tmp_path, capsys):
  path = tmp_path / 'a.jpg'
  path.write_bytes(FILES['JPEG'])
  for crop, side in ((148, 148), (None, 178), (500, 178)):
    image = image_files.load(str(path), (SIZE, SIZE, 3), crop)
    assert image.dtype == np.uint8
    difference = image - by_pillow(FILES['JPEG'], crop=side)
    assert np.abs(difference).max() <= ROUNDING
    out = capsys.readouterr().out
    assert f'178×218, cut to its central {side}×{side}' in out
  for name in ('gone.jpg', 'a\0b'):
    with pytest.raises(UserError, match='cannot be read'):
      image_files.load(str(tmp_path / name), (SIZE, SIZE, 3))
