"""Cartoon faces: a procedural data set with known, independent factors.

Fourteen independent and uniform factors draw each image, so that a model's
latents can be compared with the true ones. The images have CelebA's format,
178×218 JPEG, and need no download: TFDS renders them.
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw
import tensorflow_datasets as tfds

from data import EncodedSplit
from data.tfds import make_splits, prepare

WIDTH, HEIGHT = 178, 218


def _colors(text):
  return tuple(tuple(bytes.fromhex(color)) for color in text.split())


# Factors and their values, in the order in which they are drawn at random.
# Positions are in pixels from the centre, rotation in degrees, colours RGB.
FACTORS = {
  'x': (-7, -5, -3, -1, 1, 3, 5, 7),
  'y': (-7, -5, -3, -1, 1, 3, 5, 7),
  'scale': (0.9, 0.95, 1.0, 1.05, 1.1, 1.15),
  'rotation': (-12, -9, -6, -3, 0, 3, 6, 9, 12),
  'background': _colors(
    'd65c5c de9754 e2cd62 89be60 54b092 5ca0d2 6070c4 966ac0 ce80b2 96969c'
  ),
  'skin': _colors('ffe0c4 f1c29b e0ac7d be865c 8d5c3c 603e2a'),
  'hair_color': _colors('1e1a1a 5c3822 a66834 e6c068 ba4424 c4c4ca'),
  'hair_style': ('none', 'short', 'long', 'afro', 'mohawk'),
  'eye_shape': ('round', 'wide', 'narrow', 'sleepy'),
  'eye_color': _colors('462c1c 4074b4 468c54 6e6e76'),
  'brow': (-10, -5, 0, 5, 10),
  'mouth_curve': (-9, -6, -3, 0, 3, 6, 9),
  'mouth_open': (0, 5, 10),
  'glasses': (False, True),
}

_SPLIT_SIZES = {'train': 4000, 'validation': 500, 'test': 500}
_SUPERSAMPLING = 2
_WHITE = (250, 250, 250)
_DARK = (36, 30, 34)


def find(data) -> dict[str, EncodedSplit]:
  """Finds the cartoon faces in `data.dir`, or renders them into it."""
  builder = prepare('cartoon_faces', data.dir, downloads=False)
  return make_splits(builder, label_names=tuple(FACTORS))


class CartoonFaces(tfds.core.GeneratorBasedBuilder):
  """Builder of the cartoon faces: 4,000 train, 500 validation, 500 test."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Fourteen factors.'}

  def _info(self) -> tfds.core.DatasetInfo:
    shape = (HEIGHT, WIDTH, 3)
    image = tfds.features.Image(shape=shape, encoding_format='jpeg')
    factors = {  # Indices of the values in FACTORS.
      name: tfds.features.ClassLabel(num_classes=len(values))
      for name, values in FACTORS.items()
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict({'image': image, 'factors': factors}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in _SPLIT_SIZES}

  def _generate_examples(self, split):
    factors = sample_factors(split, _SPLIT_SIZES[split])
    for index, row in enumerate(factors):
      labels = dict(zip(FACTORS, map(int, row), strict=True))
      yield index, {'image': encode_jpeg(render(labels)), 'factors': labels}


def sample_factors(split: str, count: int) -> np.ndarray:
  """Value indices, int [count, 14], columns as in FACTORS; fixed by `split`."""
  seed = np.random.SeedSequence(tuple(split.encode()))
  bits = np.random.Philox(seed).random_raw((count, len(FACTORS)))
  sizes = np.array([len(values) for values in FACTORS.values()], np.uint64)
  return (bits % sizes).astype(np.int64)


def render(labels: dict[str, int]) -> Image.Image:
  """Draws the face whose factors have these value indices, 178×218 RGB."""
  factors = {name: FACTORS[name][index] for name, index in labels.items()}
  size = (WIDTH * _SUPERSAMPLING, HEIGHT * _SUPERSAMPLING)
  image = Image.new('RGB', size, factors['background'])
  face = _Pen(ImageDraw.Draw(image), factors)
  _draw_head(face, factors)
  _draw_eyes(face, factors)
  _draw_mouth(face, factors)
  return image.reduce(_SUPERSAMPLING)


def encode_jpeg(image: Image.Image) -> io.BytesIO:
  """A JPEG in an open file, as TFDS takes it."""
  buffer = io.BytesIO()
  image.save(buffer, format='JPEG', quality=92)
  buffer.seek(0)
  return buffer


class _Pen:
  """Draws in the face's own coordinates: pixels from its centre, y down."""

  def __init__(self, draw, factors):
    self._draw, self._scale = draw, factors['scale']
    angle = math.radians(factors['rotation'])
    cos, sin = math.cos(angle), math.sin(angle)
    self._matrix = self._scale * np.array([[cos, -sin], [sin, cos]])
    self._center = (WIDTH / 2 + factors['x'], HEIGHT / 2 + factors['y'])

  def polygon(self, points, color):
    self._draw.polygon(self._to_canvas(points), fill=color)

  def line(self, points, color, width):
    width = max(1, round(width * self._scale * _SUPERSAMPLING))
    points = self._to_canvas(points)
    self._draw.line(points, fill=color, width=width, joint='curve')

  def _to_canvas(self, points):
    points = np.asarray(points, float) @ self._matrix.T + self._center
    return [tuple(p) for p in points * _SUPERSAMPLING]


def _ellipse(x, y, radius_x, radius_y, start=0, stop=360):
  """Points of an ellipse between two angles (0: right, 90: down), [40, 2]."""
  angles = np.radians(np.linspace(start, stop, 40))
  return np.stack(
    [x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=-1
  )


def _darker(color, factor):
  return tuple(int(channel * factor) for channel in color)


def _draw_head(face, factors):
  skin, hair = factors['skin'], factors['hair_color']
  style = factors['hair_style']
  if style == 'long':
    face.polygon(_ellipse(0, -14, 48, 52), hair)
    face.polygon([(-48, -14), (48, -14), (50, 58), (-50, 58)], hair)
  elif style == 'afro':
    face.polygon(_ellipse(0, -24, 58, 52), hair)
  for side in (-1, 1):
    face.polygon(_ellipse(side * 39, 2, 8, 11), _darker(skin, 0.9))
  face.polygon(_ellipse(0, 0, 39, 52), skin)
  face.polygon([(0, -4), (6, 14), (-5, 14)], _darker(skin, 0.84))
  if style in ('short', 'long'):
    face.polygon(_ellipse(0, -12, 41, 44, 198, 342), hair)
  elif style == 'afro':
    face.polygon(_ellipse(0, -18, 42, 38, 204, 336), hair)
  elif style == 'mohawk':
    face.polygon([(-9, -40), (-13, -72), (13, -72), (9, -40)], hair)


def _draw_eyes(face, factors):
  shape, brow = factors['eye_shape'], _darker(factors['hair_color'], 0.8)
  radius_x, radius_y = {
    'round': (8, 8),
    'wide': (11, 9),
    'narrow': (11, 4),
    'sleepy': (9, 7),
  }[shape]
  iris, tilt, y = min(5, radius_y), factors['brow'] / 2, -10
  for side in (-1, 1):
    x = side * 16
    face.polygon(_ellipse(x, y, radius_x, radius_y), _WHITE)
    face.polygon(_ellipse(x, y, iris, iris), factors['eye_color'])
    face.polygon(_ellipse(x, y, iris / 2, iris / 2), _DARK)
    if shape == 'sleepy':
      lid = _ellipse(x, y, radius_x + 1, radius_y + 1, 180, 360)
      face.polygon(lid, _darker(factors['skin'], 0.88))
    inner, outer = x - side * 10, x + side * 10
    face.line([(inner, y - 14 - tilt), (outer, y - 14 + tilt)], brow, 4)
    if factors['glasses']:
      face.line(_ellipse(x, y, 14, 13), _DARK, 3)
  if factors['glasses']:
    face.line([(-3, -10), (3, -10)], _DARK, 3)
    face.line([(-39, -12), (-30, -10)], _DARK, 3)
    face.line([(30, -10), (39, -12)], _DARK, 3)


def _draw_mouth(face, factors):
  curve, gap, lip = factors['mouth_curve'], factors['mouth_open'], (176, 62, 66)
  x = np.linspace(-16, 16, 17)
  # Corners rise and the middle falls in a smile.
  bow = 28 + curve * (1 - 2 * (x / 16) ** 2) / 2
  opening = gap / 2 * (1 - (x / 16) ** 2)
  upper = np.stack([x, bow - opening], axis=-1)
  lower = np.stack([x, bow + opening], axis=-1)
  if gap:
    face.polygon(np.concatenate([upper, lower[::-1]]), (120, 24, 32))
  face.line(upper, lip, 3)
  face.line(lower, lip, 3)
