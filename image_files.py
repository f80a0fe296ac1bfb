"""Images that the user names, as the model takes them."""

import io

from etils import epath
import numpy as np
from PIL import Image
from PIL import ImageOps

from vae.errors import UserError


def load(
  path: str, image_shape: tuple[int, int, int], crop_size: int | None = None
) -> np.ndarray:
  """Reads an image file of any size, and says so where it is resized.

  Args:
    path: of any format that Pillow reads.
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
    content = epath.Path(path).expanduser().read_bytes()
    image = Image.open(io.BytesIO(content))
    # As a camera held it.
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):  # 16 bits, which `convert` would cut off.
      grey = np.asarray(image, np.float32) / 257
      image = Image.fromarray(np.round(grey).astype(np.uint8))
    image = image.convert('RGB' if channels == 3 else 'L')
  except FileNotFoundError:
    raise UserError(f'{path}: there is no such file.') from None
  except (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
  ) as error:
    raise UserError(
      f'{path} cannot be read as an image ({error}); name PNG, JPEG or other '
      'image files.'
    ) from error
  if image.size != (width, height):
    side = min(image.size)
    side = min(side, crop_size or side)
    print(
      f'{path}: {image.width}×{image.height}, cut to its central {side}×{side} '
      f'and resized to {width}×{height}.'
    )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(image, np.uint8).reshape(image_shape)
