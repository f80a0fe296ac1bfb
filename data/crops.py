"""How encoded bytes become an example: decoded, cut to a square and resized."""

import dataclasses

import numpy as np
import tensorflow as tf

from data import image_files

# Of `Crop.decode`: to be raised when it makes other pixels, so that none that
# are kept on disk are taken for them.
DECODING = 3

_PNG = b'\x89PNG\r\n\x1a\n'
_PNG_SIZE = len(_PNG) + 8  # Where it says its width and height.
# What says, anywhere in a file, how the camera was held: EXIF, in a PNG as a
# chunk or as text, or XMP. Other bytes that read so cost nothing but time.
_MAY_BE_TURNED = (
  r'\C*(Exif\x00|eXIf|Raw profile type exif'
  r'|tiff:Orientation|XML:com\.adobe\.xmp)\C*'
)


@dataclasses.dataclass(frozen=True)
class Crop:
  """How a decoded image becomes an example.

  Attributes:
    crop_size: side of the central square that is cut out; a smaller image
      gives its largest one, and with 0 each does.
    image_size: side that the square is resized to, bilinear, antialiased.
    channels: 3 or 1.
  """

  crop_size: int
  image_size: int
  channels: int

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of an example."""
    return (self.image_size, self.image_size, self.channels)

  def decode(self, encoded: tf.Tensor) -> tf.Tensor:
    """Encoded bytes to uint8 [image_size, image_size, channels]."""
    # The other decoders do not turn what a camera held otherwise.
    turned = tf.strings.regex_full_match(encoded, _MAY_BE_TURNED)
    is_png = tf.strings.substr(encoded, 0, len(_PNG)) == _PNG
    is_png &= tf.strings.length(encoded) >= _PNG_SIZE + 8
    image = tf.cond(
      tf.io.is_jpeg(encoded) & ~turned,
      lambda: self._decode_jpeg(encoded),
      lambda: tf.cond(
        is_png & ~turned,
        lambda: self._decode_png(encoded),
        lambda: self._decode_other(encoded),
      ),
    )
    image = tf.image.resize(
      image, (self.image_size, self.image_size), antialias=True
    )
    image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
    return tf.ensure_shape(image, self.image_shape)

  def _decode_jpeg(self, encoded):
    shape = tf.io.extract_jpeg_shape(encoded)
    scans = tf.raw_ops.StringSplitV2(
      input=[encoded], sep=image_files.SCAN, maxsplit=image_files.MAX_SCANS + 1
    )
    few = tf.debugging.Assert(
      scans.shape[1] <= image_files.MAX_SCANS + 1, [scans.shape]
    )
    with tf.control_dependencies([few, _check_size(shape[:2])]):
      window = self._window(shape[0], shape[1])

    # Only what lies in the window is decoded.
    def decode(channels):
      return tf.io.decode_and_crop_jpeg(
        encoded, window, channels=channels, dct_method='INTEGER_ACCURATE'
      )

    if self.channels == 3:
      return decode(3)
    # The decoder makes no grey of CMYK.
    return tf.cond(
      shape[2] == 4,
      lambda: tf.image.rgb_to_grayscale(decode(3)),
      lambda: decode(1),
    )

  def _decode_png(self, encoded):
    size = tf.strings.substr(encoded, _PNG_SIZE, 8)
    size = tf.io.decode_raw(size, tf.int32, little_endian=False)
    with tf.control_dependencies([_check_size(size)]):
      # The decoder makes no grey of colour.
      image = tf.io.decode_png(encoded, channels=3)
    if self.channels == 1:
      image = tf.image.rgb_to_grayscale(image)
    shape = tf.shape(image)
    top, left, height, width = self._window(shape[0], shape[1])
    return image[top : top + height, left : left + width]

  def _decode_other(self, encoded):
    image = tf.numpy_function(self._decode_by_pillow, [encoded], tf.uint8)
    return tf.ensure_shape(image, (None, None, self.channels))

  def _decode_by_pillow(self, encoded: bytes) -> np.ndarray:
    # Outside a graph it comes in an array.
    encoded = np.asarray(encoded, object).item()
    image = image_files.decode(encoded, self.channels)
    image = image_files.central_square(image, self.crop_size)
    return np.asarray(image).reshape(*image.size, self.channels)

  def _window(self, height, width):
    side = tf.minimum(height, width)
    if self.crop_size:
      side = tf.minimum(self.crop_size, side)
    return (height - side) // 2, (width - side) // 2, side, side


def _check_size(size: tf.Tensor) -> tf.Operation:
  """Refuses an image of more pixels than there may be, before it is decoded."""
  num_pixels = tf.reduce_prod(tf.cast(size, tf.int64))
  limit = tf.constant(image_files.MAX_PIXELS, tf.int64)
  return tf.debugging.Assert(num_pixels <= limit, [num_pixels])
