"""Pictures by which the points of a sweep are compared."""

from collections.abc import Sequence
import dataclasses
import io

from etils import epath
import numpy as np

from vae import figures
from vae import paths
from vae import splits
from vae.loading import TrainedVAE

FILENAME = 'gallery.npz'

# Of each point.
_NUM_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Gallery:
  """What a point makes of what every point is given.

  Attributes:
    reconstructions: of the same images in each point, uint8
      [n, height, width, channels].
    samples: decoded from the same z in each point, shaped likewise.
  """

  reconstructions: np.ndarray
  samples: np.ndarray


def draw(
  trained: TrainedVAE, split: splits.Split
) -> tuple[Gallery, np.ndarray]:
  """What a point makes of the split's first images, and of fixed z.

  Returns:
    The pictures, and the originals of the reconstructions.
  """
  count = min(_NUM_IMAGES, split.num_examples)
  originals = next(split.batches(np.arange(count), count))
  # Dimension by dimension: with more of them the first stay as they are.
  shape = (trained.model.latent_dim, _NUM_IMAGES)
  z = np.random.default_rng(0).standard_normal(shape).T
  pictures = Gallery(
    figures.to_uint8(trained.reconstruct(originals)),
    figures.to_uint8(trained.decode(z)),
  )
  return pictures, originals


def save(folder: epath.Path, pictures: Gallery, originals: np.ndarray) -> None:
  """Keeps a point's pictures in its folder."""
  file = io.BytesIO()
  np.savez(file, originals=originals, **dataclasses.asdict(pictures))
  paths.replace(folder / FILENAME, file.getvalue())


def load(
  folder: epath.Path, names: Sequence[str]
) -> tuple[dict[str, Gallery], np.ndarray | None]:
  """The pictures of the points that have some, and the originals.

  Args:
    folder: with a folder for each point.
    names: of the points.
  """
  pictures, originals = {}, None
  for name in names:
    path = folder / name / FILENAME
    if not path.exists():
      continue
    content = io.BytesIO(path.read_bytes())
    with np.load(content, allow_pickle=False) as arrays:
      pictures[name] = Gallery(arrays['reconstructions'], arrays['samples'])
      originals = arrays['originals'] if originals is None else originals
  return pictures, originals
