"""Image files to pixels: decoded, cut to a central square and resized."""

from __future__ import annotations  # Annotations would import it.

import dataclasses
import io

from etils import epath
import numpy as np
from PIL import Image, ImageOps

from runs import tf
from vae.errors import shown, UserError

# Version of `Crop.decode`: raised when it makes other pixels, so that decoded
# images on disk are not taken for them.
DECODING = 4

# Pillow knows other formats, and starts a PostScript interpreter for one.
_FORMATS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF')

# Suffixes of these formats' files, in lower case.
SUFFIXES = (
  *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.gif', '.webp'),
  *('.bmp', '.tif', '.tiff'),
)

_PNG = b'\x89PNG\r\n\x1a\n'

# Marks of a camera's orientation, which TensorFlow's decoders ignore.
_MAY_BE_TURNED = r'\C*(Exif\x00|eXIf|tiff:Orientation)\C*'


@dataclasses.dataclass(frozen=True)
class Crop:
  """The way from an image to an example.

  Attributes:
    crop_size: side of the central square that is cut out; the largest square
      if the image is smaller or this is 0.
    image_size: side that the square is resized to, bilinear, antialiased.
    channels: 3 or 1.
  """

  crop_size: int
  image_size: int
  channels: int

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (self.image_size, self.image_size, self.channels)

  def decode(self, image: tf.Tensor) -> tf.Tensor:
    """Makes an example, uint8 [image_size, image_size, channels].

    `image` is a file's bytes, or pixels, uint8 [height, width, channels].
    """
    if image.dtype == tf.string:
      image = self._decode_file(image)
    else:
      image = self._fit(image)
    image = tf.image.resize(
      image, (self.image_size, self.image_size), antialias=True
    )
    image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
    return tf.ensure_shape(image, self.image_shape)

  def _decode_file(self, encoded):
    turned = tf.strings.regex_full_match(encoded, _MAY_BE_TURNED)
    is_png = tf.strings.substr(encoded, 0, len(_PNG)) == _PNG
    return tf.cond(
      tf.io.is_jpeg(encoded) & ~turned,
      lambda: self._decode_jpeg(encoded),
      lambda: tf.cond(
        is_png & ~turned,
        lambda: self._fit(tf.io.decode_png(encoded, channels=3)),
        lambda: self._fit(self._decode_other(encoded)),
      ),
    )

  def _decode_jpeg(self, encoded):
    shape = tf.io.extract_jpeg_shape(encoded)

    def decode(channels):  # Only the part that is used.
      window = self._window(shape[0], shape[1])
      return tf.io.decode_and_crop_jpeg(
        encoded, window, channels, dct_method='INTEGER_ACCURATE'
      )

    if self.channels == 3:
      return decode(3)
    # The decoder cannot make grey of CMYK.
    return tf.cond(
      shape[2] == 4,
      lambda: tf.image.rgb_to_grayscale(decode(3)),
      lambda: decode(1),
    )

  def _decode_other(self, encoded):
    def by_pillow(content):
      # Outside a graph it comes in an array.
      image = _open(np.asarray(content, object).item())
      image = image.convert('RGB' if self.channels == 3 else 'L')
      return np.asarray(image).reshape(image.height, image.width, -1)

    image = tf.numpy_function(by_pillow, [encoded], tf.uint8)
    return tf.ensure_shape(image, (None, None, self.channels))

  def _fit(self, pixels):
    if pixels.shape[-1] < self.channels:
      pixels = tf.image.grayscale_to_rgb(pixels)
    elif pixels.shape[-1] > self.channels:
      pixels = tf.image.rgb_to_grayscale(pixels)
    shape = tf.shape(pixels)
    top, left, height, width = self._window(shape[0], shape[1])
    return pixels[top : top + height, left : left + width]

  def _window(self, height, width):
    side = tf.minimum(height, width)
    if self.crop_size:
      side = tf.minimum(self.crop_size, side)
    return (height - side) // 2, (width - side) // 2, side, side


def _open(content: bytes) -> Image.Image:
  """Decodes by Pillow: the first frame, upright."""
  try:
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
  except Image.UnidentifiedImageError:
    raise ValueError(f'it is none of {", ".join(_FORMATS)}') from None
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith(('I', 'F')):
    raise ValueError(f'its pixels are of type {image.mode}, not of 8 bits')
  return image


def why_undecodable(content: bytes) -> str:
  """Why an image cannot be decoded, in words."""
  try:
    _open(content)
  except Exception as error:
    return shown(error)
  return 'its data are damaged'


def load(
  path: str, image_shape: tuple[int, int, int], crop_size: int | None = None
) -> np.ndarray:
  """Reads an image file of any size; prints how it is cut and resized.

  As `decode`. Raises UserError if there is no such file, or it is not an image.
  """
  try:
    content = epath.Path(path).expanduser().read_bytes()
  except (OSError, RuntimeError, ValueError) as error:
    reason = shown(str(getattr(error, 'strerror', None) or error))
    raise UserError(f'{shown(path)} cannot be read ({reason}).') from error
  try:
    pixels, change = decode(content, image_shape, crop_size)
  except UserError as error:
    raise UserError(f'{shown(path)} {error}') from error
  if change:
    print(f'{shown(path)}: {change}')
  return pixels


def decode(
  content: bytes, image_shape: tuple[int, int, int], crop_size: int | None
) -> tuple[np.ndarray, str]:
  """Decodes an image file of any size, uint8 `image_shape`.

  The shape is (height, width, channels), a square. The central square of side
  `crop_size` is cut out, by default the largest one.

  Returns:
    The pixels, and a sentence on how they were cut and resized, if they were.

  Raises:
    UserError: if it is not an image; the message lacks its subject.
  """
  _, size, channels = image_shape
  crop = Crop(crop_size or 0, size, channels)
  try:
    with Image.open(io.BytesIO(content)) as image:
      width, height = image.size
    pixels = crop.decode(tf.constant(content)).numpy()
  except Exception as error:  # Damaged bytes make decoders raise anything.
    raise UserError(
      f'cannot be read as an image ({why_undecodable(content)}); name PNG, '
      'JPEG or other image files.'
    ) from error
  if (width, height) == (size, size):
    return pixels, ''
  side = min(width, height, crop_size or width)
  cut = (
    '' if width == height == side else f'cut to its central {side}×{side} and '
  )
  return pixels, f'{width}×{height}, {cut}resized to {size}×{size}.'
