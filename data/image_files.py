"""Images that the user names, as the model takes them.

Here too are decoded those images of a data set that are no plain JPEG or PNG.
"""

import contextlib
import io
import warnings

from etils import epath
import numpy as np
from PIL import Image
from PIL import ImageOps

from vae import ordinary_files
from vae.errors import shown
from vae.errors import UserError

# That an image may have, 8,192 × 8,192: some of a few bytes claim to have
# billions, and several are decoded at a time.
MAX_PIXELS = 1 << 26

# Passes over the image that a JPEG may consist of, of which a progressive one
# has about ten: each takes time, and but a few bytes.
MAX_SCANS = 64
SCAN = b'\xff\xda'

# Pillow knows others, and for one of them it starts a PostScript interpreter.
_FORMATS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF')

# Of files of these formats, in lower case.
SUFFIXES = (
  *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.gif', '.webp'),
  *('.bmp', '.tif', '.tiff'),
)

# What it has to say comes as exceptions.
warnings.filterwarnings('ignore', module=r'PIL\.')


def load(
  path: str, image_shape: tuple[int, int, int], crop_size: int | None = None
) -> np.ndarray:
  """Reads an image file of any size, and says so where it is resized.

  Args:
    path: a JPEG, PNG, GIF, WebP, BMP or TIFF file.
    image_shape: (height, width, channels) that the model wants, a square.
    crop_size: side of the central square that is cut out; by default, and
      where the image is smaller, its largest one.

  Returns:
    uint8 [height, width, channels]; bilinear and antialiased.

  Raises:
    UserError: if there is no such file, or it is not an image.
  """
  height, width, channels = image_shape
  try:
    content = ordinary_files.read(epath.Path(path).expanduser())
    image = decode(content, channels)
  except FileNotFoundError:
    raise UserError(f'{shown(path)}: there is no such file.') from None
  except (OSError, RuntimeError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{shown(path)} cannot be read as an image ({reason}); name PNG, JPEG or '
      'other image files.'
    ) from error
  if image.size != (width, height):
    square = central_square(image, crop_size)
    print(
      f'{path}: {image.width}×{image.height}, cut to its central '
      f'{square.width}×{square.height} and resized to {width}×{height}.'
    )
    image = square.resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(image, np.uint8).reshape(image_shape)


def decode(content: bytes, channels: int) -> Image.Image:
  """The image in a file's bytes: its first frame, upright, without alpha.

  Args:
    content: of a JPEG, PNG, GIF, WebP, BMP or TIFF file.
    channels: 3 or 1.

  Raises:
    ValueError: why it cannot be decoded, in a line.
  """
  try:
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
      raise ValueError(
        f'it has {image.width:,}×{image.height:,} pixels, and the limit is '
        f'{MAX_PIXELS:,}'
      )
    if image.format in ('JPEG', 'MPO') and content.count(SCAN) > MAX_SCANS:
      raise ValueError(f'it has more than {MAX_SCANS} scans')
    image.load()
    # As a camera held it, unless what says so is damaged.
    with contextlib.suppress(Exception):
      ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith('I;16'):  # Which `convert` would cut off.
      grey = np.asarray(image, np.float32) / 257
      image = Image.fromarray(np.round(grey).astype(np.uint8))
    if image.mode in ('I', 'F'):
      raise ValueError('its pixels are numbers of no known range')
    return image.convert('RGB' if channels == 3 else 'L')
  except Image.UnidentifiedImageError:
    formats = ', '.join(_FORMATS)
    raise ValueError(f'it is none of {formats}') from None
  except Image.DecompressionBombError:
    raise ValueError(
      f'it has more pixels than the limit of {MAX_PIXELS:,}'
    ) from None
  except Exception as error:  # Damaged bytes make decoders raise anything.
    raise ValueError(shown(error) or type(error).__name__) from error


def central_square(
  image: Image.Image, crop_size: int | None = None
) -> Image.Image:
  """Cuts out the central square of this side, or the largest there is."""
  side = min(image.size)
  side = min(side, crop_size or side)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  return image.crop((left, top, left + side, top + side))
