"""Image files as damage, mistakes and malice leave them, from a seed."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import io
import os
import pathlib
import random
import socket
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 178, 218

# What may come of a case beside pixels.
REFUSED = 'refused'
EITHER = 'decoded as Pillow does, or refused'


@dataclasses.dataclass(frozen=True)
class Case:
  """A file in a folder of images.

  Attributes:
    kind: what is done to it; the short tests take one case of each.
    name: of the file, bytes.
    make: writes it at a path.
    expected: RGB [height, width, 3], REFUSED or EITHER.
    lossy: whether `expected` went through a lossy format.
    reason: if refused, a pattern of what is said.
  """

  kind: str
  name: bytes
  make: Callable[[bytes], None]
  expected: np.ndarray | str
  lossy: bool = False
  reason: str = ''


@functools.cache
def picture(size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = 'RGB'):
  """Smooth colours, so that another pixel's are others."""
  pixels = np.random.default_rng(5).integers(0, 256, (12, 10, 4), np.uint8)
  image = Image.fromarray(pixels, 'RGBA')
  return image.resize(size, Image.Resampling.BILINEAR).convert(mode)


def rgb(image: Image.Image) -> np.ndarray:
  return np.asarray(image.convert('RGB'))


def encode(image: Image.Image, format: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


@functools.cache
def sound() -> dict[str, tuple[bytes, np.ndarray, bool]]:
  """Whole files by name: content, pixels, and whether a format lost some."""
  image = picture()
  palette = image.quantize(200)
  grey = image.convert('L')
  deep = np.asarray(grey, np.uint16) * 256 + 255 - np.asarray(grey)
  jpeg = functools.partial(encode, format='JPEG', quality=92)
  cmyk = image.convert('CMYK')
  lossless = {
    'plain.png': (encode(image, 'PNG'), image),
    'palette.png': (encode(palette, 'PNG'), palette),
    'clear_palette.png': (encode(palette, 'PNG', transparency=3), palette),
    'alpha.png': (encode(picture(mode='RGBA'), 'PNG'), picture(mode='RGBA')),
    'grey_alpha.png': (encode(picture(mode='LA'), 'PNG'), grey),
    'one_bit.png': (encode(image.convert('1'), 'PNG'), image.convert('1')),
    'deep.png': (encode(Image.fromarray(deep), 'PNG'), grey),
    'moving.gif': (
      encode(palette, 'GIF', save_all=True, append_images=[grey, image]),
      palette,
    ),
    'plain.gif': (encode(palette, 'GIF'), palette),
    'plain.webp': (encode(image, 'WEBP', lossless=True), image),
    'alpha.webp': (
      encode(picture(mode='RGBA'), 'WEBP', lossless=True, exact=True),
      picture(mode='RGBA'),
    ),
    'moving.webp': (
      encode(image, 'WEBP', lossless=True, save_all=True, append_images=[grey]),
      image,
    ),
    'plain.bmp': (encode(image, 'BMP'), image),
    'palette.bmp': (encode(palette, 'BMP'), palette),
    'grey.bmp': (encode(grey, 'BMP'), grey),
    'tiff.jpg': (encode(image, 'TIFF'), image),
    'packed_tiff.jpg': (encode(image, 'TIFF', compression='tiff_lzw'), image),
    'png.jpg': (encode(image, 'PNG'), image),
    'gif.jpg': (encode(palette, 'GIF'), palette),
    'bmp.png': (encode(image, 'BMP'), image),
    'webp.jpg': (encode(image, 'WEBP', lossless=True), image),
  }
  lossy = {
    'plain.jpg': (jpeg(image), image),
    'progressive.jpg': (jpeg(image, progressive=True), image),
    'grey.jpg': (jpeg(grey), grey),
    'cmyk.jpg': (jpeg(cmyk), image),
    'ycck.jpg': (_ycck(image), image),
    'jpeg.png': (jpeg(image), image),
    'lossy.webp': (encode(image, 'WEBP', quality=90), image),
  }
  for size in ((1, 1), (1, 7), (20_000, 5), (5, 20_000)):
    small = picture(size)
    name = '{}x{}'.format(*size)
    lossless[f'{name}.png'] = (encode(small, 'PNG'), small)
    exact = encode(small, 'JPEG', quality=100, subsampling=0)
    lossy[f'{name}.jpg'] = (exact, small)
  files = {n: (data, rgb(i), False) for n, (data, i) in lossless.items()}
  files |= {n: (data, rgb(i), True) for n, (data, i) in lossy.items()}
  return files | _turned()


def _ycck(image: Image.Image) -> bytes:
  """A JPEG of YCCK, which Pillow reads and does not write."""
  inverse = Image.fromarray(255 - np.asarray(image)).convert('YCbCr')
  planes = [Image.fromarray(255 - np.asarray(p)) for p in inverse.split()]
  ink = Image.merge('CMYK', [*planes, Image.new('L', image.size, 0)])
  data = bytearray(encode(ink, 'JPEG', quality=92, subsampling=0))
  data[data.index(b'Adobe') + 11] = 2  # The transform: YCCK.
  return bytes(data)


def _turned() -> dict[str, tuple[bytes, np.ndarray, bool]]:
  """JPEGs of cameras held in the seven other ways, and the upright pixels.

  By EXIF's table: where the file's first row and first column are in what was
  seen.
  """
  seen = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p.swapaxes(0, 1)[::-1],
  }
  files = {}
  for orientation, upright in seen.items():
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), 'JPEG', quality=92, exif=exif)
    files[f'held_{orientation}.jpg'] = (data, upright(rgb(picture())), True)
  return files


def _content(kind, name, data, expected, **facts) -> Case:
  """A case of these bytes, or of what makes them, which may take long."""

  def write(path):
    with open(path, 'wb') as file:
      file.write(data() if callable(data) else data)

  name = name.encode() if isinstance(name, str) else name
  return Case(kind, name, write, expected, **facts)


def cases(seed: int) -> Iterator[Case]:
  """All cases; `seed` says where files are cut and which bits flip."""
  for name, (data, pixels, lossy) in sound().items():
    kind = 'turned' if name.startswith('held') else 'unusual'
    yield _content(kind, name, data, pixels, lossy=lossy)
  yield from _damaged(random.Random(seed))
  yield from _no_images()
  yield from _bombs()
  yield from _no_files()
  yield from _names()


_TO_DAMAGE = (
  'plain.jpg',
  'progressive.jpg',
  'cmyk.jpg',
  'held_6.jpg',
  'plain.png',
  'plain.gif',
  'plain.webp',
  'lossy.webp',
  'palette.bmp',
  'packed_tiff.jpg',
)


def _damaged(chance: random.Random) -> Iterator[Case]:
  for name in _TO_DAMAGE:
    data, pixels, lossy = sound()[name]
    # Early, late and in between.
    places = [1, 2, 11, 30, len(data) // 2, len(data) - 1]
    places += [chance.randrange(1, len(data)) for _ in range(3)]
    for number, place in enumerate(places):
      yield _content(
        'cut', f'cut_{number}_{name}', data[:place], EITHER, lossy=lossy
      )
    for number in range(9):
      flipped = bytearray(data)
      # A third of them in the head, where it says what it is.
      end = len(data) if number % 3 else min(len(data), 64)
      for _ in range(1 + number % 2 * 4):
        flipped[chance.randrange(end)] ^= 1 << chance.randrange(8)
      yield _content(
        'flipped', f'flip_{number}_{name}', bytes(flipped), EITHER, lossy=lossy
      )


def _no_images() -> Iterator[Case]:
  html = b'<!DOCTYPE html><html><body>404 Not Found</body></html>\n' * 40
  noise = np.random.default_rng(6).bytes(5000)
  files = {
    'empty.jpg': (b'', 'it is empty'),
    'empty.png': (b'', 'it is empty'),
    'text.jpg': (b'hello', 'none of JPEG, PNG'),
    'page.jpg': (html, 'none of JPEG, PNG'),
    'page.png': (html, 'none of JPEG, PNG'),
    'noise.jpg': (noise, 'none of JPEG, PNG'),
    'zeros.bmp': (bytes(5000), 'none of JPEG, PNG'),
    'drawing.gif': (
      b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n',
      'none of JPEG, PNG',
    ),
    'pickle.jpg': (b'\x80\x04cos\nsystem\n(Vtouch x\ntR.', 'none of JPEG, PNG'),
    'jpeg_head.jpg': (b'\xff\xd8\xff' + noise, ''),
    'png_head.png': (b'\x89PNG\r\n\x1a\n' + noise, ''),
    'gif_head.gif': (b'GIF89a' + b'\xff' * 5000, ''),
    'webp_head.webp': (b'RIFF\xff\xff\xff\xffWEBPVP8 ' + noise, ''),
    'floats.jpg': (
      encode(Image.new('F', (20, 20), 0.5), 'TIFF'),
      'of no known range',
    ),
  }
  for name, (data, reason) in files.items():
    yield _content('no image', name, data, REFUSED, reason=reason)


def _chunk(kind: bytes, data: bytes) -> bytes:
  checksum = struct.pack('>I', zlib.crc32(kind + data))
  return struct.pack('>I', len(data)) + kind + data + checksum


def _zeros(size: int) -> bytes:
  """As zlib packs them, without having them all."""
  packer = zlib.compressobj(9)
  step = bytes(1 << 20)
  parts = [packer.compress(step) for _ in range(size >> 20)]
  rest = packer.compress(bytes(size & ((1 << 20) - 1)))
  return b''.join([*parts, rest, packer.flush()])


def _png(width, height, pixels, interlaced=0, before=b'') -> bytes:
  head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, interlaced)
  chunks = _chunk(b'IHDR', head) + before + _chunk(b'IDAT', pixels)
  return b'\x89PNG\r\n\x1a\n' + chunks + _chunk(b'IEND', b'')


def _claiming(data: bytes, place: int, form: str, width: int, height: int):
  """The file with another size written where its size is."""
  size = struct.pack(form, width, height)
  return data[:place] + size + data[place + len(size) :]


def _bombs() -> Iterator[Case]:
  """A few bytes that claim to be, or are, very many."""

  def bomb(name, data, reason='and the limit is|more pixels than the limit'):
    return _content('bomb', name, data, REFUSED, reason=reason)

  files = sound()
  many = 60_000
  yield bomb('claims.png', _png(many, many, _zeros(1000)))
  yield bomb('woven.png', _png(many, many, _zeros(1000), interlaced=1))
  yield bomb('zeros.png', lambda: _png(13_000, 13_000, _zeros(13_001 * 13_000)))
  yield bomb('negative.png', _png(1 << 31, 1 << 31, _zeros(1000)), '')
  for name in ('plain.jpg', 'progressive.jpg', 'grey.jpg', 'held_6.jpg'):
    data = files[name][0]
    frame = max(data.find(b'\xff\xc0'), data.find(b'\xff\xc2'))
    for width, height in ((many, many), (65_500, 65_500), (8_193, 8_192)):
      yield bomb(
        f'claims_{width}_{name}',
        _claiming(data, frame + 5, '>HH', height, width),
      )
  gif = files['plain.gif'][0]
  frame = gif.index(b',' + struct.pack('<HHHH', 0, 0, WIDTH, HEIGHT))
  yield bomb('screen.gif', _claiming(gif, 6, '<HH', many, many))
  yield bomb('frame.gif', _claiming(gif, frame + 5, '<HH', many, many))
  bmp = files['plain.bmp'][0]
  yield bomb('claims.bmp', _claiming(bmp, 18, '<ii', many, many))
  yield bomb('down.bmp', _claiming(bmp, 18, '<ii', many, -many))
  # Its size is that of the canvas, in 24 bits each, less one.
  webp = bytearray(files['moving.webp'][0])
  webp[24:30] = b'\x5f\xea\x00' * 2
  yield bomb('canvas.webp', bytes(webp), '')
  tiff = bytearray(files['tiff.jpg'][0])
  for old in (WIDTH, HEIGHT):
    entry = struct.pack('<HI', 4, 1) + struct.pack('<I', old)
    entry = entry if entry in tiff else struct.pack('<HIHH', 3, 1, old, 0)
    place = tiff.index(entry) + len(entry) - 4
    tiff[place : place + 4] = struct.pack('<I', many)
  yield bomb('tiff.jpg.png', bytes(tiff))
  blank = functools.partial(Image.new, 'L')
  large = (9_000, 9_000)
  yield bomb(
    'blank.jpg', lambda: encode(blank(large), 'JPEG', progressive=True)
  )
  yield bomb('blank.gif', lambda: encode(blank(large), 'GIF'))
  yield bomb('blank.webp', lambda: _blank_webp(16_383, 4_200))
  yield bomb('scans.jpg', _scans, 'scans')
  exif = Image.Exif()
  exif[0x0112] = 3
  yield bomb('held_scans.jpg', lambda: _scans(exif=exif), 'scans')
  # Beside the pixels.
  pixels = zlib.compress(bytes(11 * 10))
  for name, kind, size in (
    ('text.png', b'zTXt', 600_000_000),
    ('profile.png', b'iCCP', 300_000_000),
  ):

    def beside(kind=kind, size=size):
      chunk = _chunk(kind, b'a\0\0' + _zeros(size))
      return _png(10, 10, pixels, before=chunk)

    yield _content('bomb', name, beside, np.zeros((10, 10, 3), np.uint8))
  # No more than the limit, and so to be decoded.
  side = 8_192
  largest = (side, side)
  black = np.zeros((side, side, 3), np.uint8)
  for name, data in {
    'largest.png': lambda: _png(side, side, _zeros((side + 1) * side)),
    'largest.jpg': lambda: encode(
      blank(largest).convert('RGB'), 'JPEG', progressive=True
    ),
    'largest.gif': lambda: encode(blank(largest), 'GIF'),
    'largest.webp': lambda: _blank_webp(side, side),
    'largest_held.jpg': lambda: encode(blank(largest), 'JPEG', exif=exif),
  }.items():
    yield _content('largest', name, data, black)


def _blank_webp(width, height) -> bytes:
  image = Image.new('RGB', (width, height))
  return encode(image, 'WEBP', lossless=True, method=0)


def _scans(**options) -> bytes:
  """A JPEG that goes over the image 2000 times, in 100 bytes each."""
  image = Image.new('L', (4_000, 4_000))
  data = encode(image, 'JPEG', progressive=True, **options)
  last = data[data.rindex(b'\xff\xda') : -2]
  return data[:-2] + last * 2000 + data[-2:]


def _no_files() -> Iterator[Case]:
  def link(target):
    return lambda path: os.symlink(target, path)

  def sparse(path, head=b''):
    with open(path, 'wb') as file:
      file.write(head)
      file.truncate(1 << 30)

  def bind(path):
    # The name of a socket has to be short.
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
      listener.bind(f'/proc/self/fd/{folder}/{os.path.basename(path).decode()}')
    os.close(folder)

  jpeg = sound()['plain.jpg'][0]
  missing = 'No such file'
  files = {
    'pipe.jpg': (os.mkfifo, 'named pipe'),
    'pipe.png': (os.mkfifo, 'named pipe'),
    'folder.jpg': (os.mkdir, 'a folder'),
    'nowhere.jpg': (link('nothing'), missing),
    b'nowhere_\xff\xfe.jpg': (link('nothing'), missing),
    'loop.jpg': (link('loop.jpg'), 'Too many levels'),
    'zero.jpg': (link('/dev/zero'), 'a device'),
    'random.jpg': (link('/dev/urandom'), 'a device'),
    'null.jpg': (link('/dev/null'), 'a device'),
    'terminal.jpg': (link('/dev/tty'), 'a device'),
    'messages.jpg': (link('/proc/kmsg'), 'it is empty'),
    'to_pipe.jpg': (link('pipe.jpg'), 'named pipe'),
    'sparse.jpg': (sparse, '1,073,741,824 bytes, and the limit is'),
    'padded.jpg': (
      functools.partial(sparse, head=jpeg),
      '1,073,741,824 bytes, and the limit is',
    ),
    'socket.jpg': (bind, 'a socket'),
  }
  for name, (make, reason) in files.items():
    name = os.fsencode(name)
    yield Case('no file', name, make, REFUSED, reason=reason)


def _names() -> Iterator[Case]:
  data, pixels, _ = sound()['plain.png']
  names = (
    b'with a space.png',
    b'two\nlines.png',
    b'\xff\xfe.png',
    'Ä\u202egpj.png'.encode(),
    b'-rf *.png',
    b"quote'%s{x}.png",
    b'n' * 251 + b'.png',
  )
  for name in names:
    yield _content('name', name, data, pixels)
    # The same names in a message.
    bad = name.removesuffix(b'.png')[-240:] + b'_bad.png'
    yield _content('name', bad, b'', REFUSED, reason='it is empty')


def write_all(folder: pathlib.Path, some: list[Case]) -> list[bytes]:
  """Writes the cases, and returns their paths."""
  paths = [os.path.join(os.fsencode(folder), case.name) for case in some]
  for case, path in zip(some, paths, strict=True):
    case.make(path)
  return paths
