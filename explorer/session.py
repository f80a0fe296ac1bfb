"""A run that is explored: its model, and its data set in the latent space.

The model answers as soon as it is restored; the images are encoded in the
background. A run that still trains is followed: a new checkpoint takes the
place of the one before.
"""

from collections.abc import Callable
import dataclasses
import threading
from typing import Any

from etils import epath
import numpy as np

from data import image_files
from evaluation import measure, posterior, reconstruction
from explorer import latents
import input_pipeline
from runs import schema, workdirs
from vae import conditioning, distributions, figures, loading
from vae.checkpoints import Checkpoints
from vae.errors import UserError

# Between two looks for a newer checkpoint.
_SECONDS = 2.0

# Draws of the prior and of q(z) for the map of holes and the sliders' bands.
_NUM_DRAWS = 20_000

# Classes of a label, each of which has a direction.
_MAX_CLASSES = 6

# Half of a slider, in standard deviations of the prior or of q(z).
_REACH = 3.5


@dataclasses.dataclass(frozen=True)
class Atlas:
  """The images of the training split in the latent space.

  Attributes:
    codes: `measure.encode` of them.
    plane: the one that they are shown in.
    points: their means in it, [n, 2].
    bands: mean and ends of q(z) in each dimension, [latent_dim, 3].
    holes: the map of holes.
    labels: values [n] and class names, by the label's name.
    directions: steps along labels of two classes, and to each class of labels
      whose few classes have names.
    neighbours: by distance of the means.
    images: of some indices, uint8 [n, height, width, channels].
  """

  codes: dict[str, np.ndarray]
  plane: latents.Plane
  points: np.ndarray
  bands: np.ndarray
  holes: latents.HoleMap
  labels: dict[str, tuple[np.ndarray, list[str]]]
  directions: dict[str, np.ndarray]
  neighbours: latents.Neighbours
  images: Callable[[list[int]], np.ndarray]


class RequestError(Exception):
  """A request that cannot be answered, in a line."""


class Session:
  """One run; all methods may be called from any thread.

  Attributes:
    workdir: of the run.
    problem: a sentence on what cannot be shown now, or nothing.
  """

  def __init__(
    self, workdir: epath.Path, checkpoint: str, data_dir: str | None
  ):
    """Restores the model; raises UserError if there is none."""
    self.workdir, self._checkpoint = workdir, checkpoint
    self._config = workdirs.load_config(workdir)
    self._is_own = data_dir is None
    if data_dir is not None:
      self._config.data.dir = data_dir
      schema.validate(self._config)
    self._config.data.cache = 'none'
    self._lock = threading.Lock()
    self.problem = ''
    self._data: Any = None
    self._shown = self._restore(), None
    self._closed = threading.Event()
    threading.Thread(target=self._follow, daemon=True).start()

  @property
  def trained(self) -> loading.TrainedVAE:
    """The model."""
    return self._shown[0]

  @property
  def atlas(self) -> Atlas | None:
    """The images in the latent space; None until they are encoded."""
    return self._shown[1]

  def _restore(self) -> loading.TrainedVAE:
    trained = loading.restore(self._config, self.workdir, self._checkpoint)
    # Compiled before a page asks for it.
    trained.decode(np.zeros((1, *trained.latent_shape)), _labels(trained, 1, 0))
    return trained

  def close(self) -> None:
    """Ends the threads."""
    self._closed.set()

  def _follow(self) -> None:
    """Encodes the images, then looks for a newer checkpoint."""
    surveyed = None  # The step, whether it succeeded or not.
    while not self._closed.wait(0 if surveyed is None else _SECONDS):
      trained = self.trained
      try:
        if surveyed != trained.step:
          surveyed = trained.step
          self._shown = trained, self._survey(trained)
          self.problem = ''
      except Exception as error:  # The model can be explored without images.
        self.problem = (
          f'The images cannot be read: {" ".join(str(error).split())} Sliders '
          'and samples work without them.'
        )
      try:
        step = Checkpoints(self.workdir).find(self._checkpoint)
        if step != trained.step:
          self._shown = self._restore(), None
        elif self.atlas is not None:
          self.problem = ''
      except Exception as error:  # Such as memory that is used up.
        self.problem = (
          f'{" ".join(str(error).split())} What is shown is step '
          f'{trained.step:,}, from memory.'
        )

  def _survey(self, trained: loading.TrainedVAE) -> Atlas:
    if self._data is None:
      data = input_pipeline.load(trained.config)
      if self._is_own:
        identity = data.identity() | conditioning.identity(self._config, data)
        workdirs.check_data(self.workdir, identity)
      self._data = data
    split = self._data.train
    codes = measure.encode(trained, split)
    means, positions = codes['mean'], codes['positions']
    draws = means
    if {'logvar', 'certain'} & codes.keys():
      spread = np.arange(_NUM_DRAWS) % len(means)
      draws = posterior.draw(
        {
          k: v[spread]
          for k, v in codes.items()
          if k in ('mean', 'logvar', 'certain')
        },
        0,
      )
    prior = trained.sample_latents(_NUM_DRAWS).reshape(_NUM_DRAWS, -1)
    plane = latents.Plane.of(means)
    found = split.labels()
    labels = {}
    for name in found.names if found else ():
      column = found.values[positions, found.names.index(name)]
      labels[name] = column, found.class_names(name)
    ways = {}
    for name, (values, names) in labels.items():
      if len(names) == 2:
        ways[name] = latents.direction(means, values)
      elif name in found.classes and len(names) <= _MAX_CLASSES:
        for index, of_class in enumerate(names):
          way = latents.direction(means, values == index)
          ways[f'{name}: {of_class}'] = way

    def images(indices):
      return next(split.batches(positions[indices], len(indices)))

    return Atlas(
      codes,
      plane,
      plane.project(means),
      latents.bands(draws),
      latents.HoleMap.of(plane.project(prior), plane.project(draws)),
      labels,
      {name: way for name, way in ways.items() if way is not None},
      latents.Neighbours(means),
      images,
    )

  def describe(self) -> dict[str, Any]:
    """Facts and dimensions of the run for the page, as JSON."""
    trained, atlas = self._shown
    prior = trained.prior
    draws = trained.sample_latents(256).reshape(256, -1)
    mean, deviation = np.ravel(prior.mean), draws.std(axis=0)
    low, high = mean - _REACH * deviation, mean + _REACH * deviation
    order, carried = np.arange(len(mean)), None
    if atlas is not None:
      # A slider reaches where the prior or q(z) does.
      low = np.minimum(low, atlas.bands[:, 1])
      high = np.maximum(high, atlas.bands[:, 2])
      carried = posterior.mean_variance(atlas.codes['mean'])
      if 'kl' in atlas.codes:
        carried = atlas.codes['kl'].mean(axis=0)
      order = posterior.most_informative(carried)
    dimensions = []
    for index in order:
      row = {'index': index, 'low': low[index], 'high': high[index]}
      row['mean'] = mean[index]
      if atlas is not None:
        row['band'] = atlas.bands[index, 1:]
        row['carried'] = carried[index]
      dimensions.append(row)
    return _plain(
      {
        'name': self.workdir.name,
        'workdir': str(self.workdir),
        'step': trained.step,
        'image_shape': trained.model.image_shape,
        'latent_shape': trained.latent_shape,
        'has_temperature': isinstance(prior, distributions.StandardNormal),
        'prior': type(prior).__name__,
        'num_classes': conditioning.num_classes(trained.model),
        'unit': 'nats' if atlas and 'kl' in atlas.codes else 'variance',
        'dimensions': dimensions,
        'is_surveyed': atlas is not None,
        'problem': self.problem,
      }
    )

  def describe_atlas(self) -> dict[str, Any]:
    """Points, labels, directions and the map of holes, as JSON."""
    step = self.trained.step
    atlas = self._atlas()
    holes = atlas.holes
    return _plain(
      {
        'step': step,
        'points': np.round(atlas.points, 4),
        'variance': atlas.plane.variance,
        'labels': {
          name: {'values': values, 'names': names}
          for name, (values, names) in atlas.labels.items()
        },
        'directions': atlas.directions,
        'holes': {
          'low': holes.low,
          'high': holes.high,
          'prior': np.round(holes.prior / holes.prior.max(), 4),
          'holes': holes.holes,
          'share': holes.share,
        },
      }
    )

  def decode(self, z: np.ndarray, label: int = 0) -> np.ndarray:
    """Images of latents [n, latent_dim], uint8."""
    with self._lock:
      trained = self.trained
      images = trained.decode(
        z.reshape(-1, *trained.latent_shape), _labels(trained, len(z), label)
      )
    return figures.to_uint8(images)

  def sample(self, seed: int, temperature: float) -> np.ndarray:
    """A draw from the prior, [latent_dim]."""
    z = np.ravel(self.trained.sample_latents(1, seed))
    if isinstance(self.trained.prior, distributions.StandardNormal):
      return temperature * z
    return z

  def encode(self, content: bytes, label: int = 0) -> dict[str, Any]:
    """The posterior of an image file, and where it lies, as JSON."""
    trained = self.trained
    shape = trained.model.image_shape
    try:
      pixels, change = image_files.decode(content, shape, crop_size=None)
    except UserError as error:
      raise RequestError(f'the file {error}') from error
    encoded = trained.encode(pixels[None], _labels(trained, 1, label))
    codes = reconstruction.codes(encoded, trained.prior)
    result = {name: np.asarray(values)[0] for name, values in codes.items()}
    result |= {'image': pixels, 'change': change}
    return _plain(result)

  def near(self, z: np.ndarray, count: int) -> dict[str, Any]:
    """The training images whose means are nearest to z, as JSON."""
    atlas = self._atlas()
    indices, distances = atlas.neighbours.find(z, count)
    return _plain(
      {
        'indices': indices,
        'distances': np.round(distances, 4),
        'point': atlas.plane.project(z[None])[0],
      }
    )

  def code(self, indices: list[int]) -> np.ndarray:
    """The mean of q(z) over some training images, [latent_dim]."""
    return self._atlas().codes['mean'][self._check(indices)].mean(axis=0)

  def images(self, indices: list[int]) -> np.ndarray:
    """Some training images, uint8 [n, height, width, channels]."""
    return self._atlas().images(self._check(indices))

  def lift(self, xy: np.ndarray) -> np.ndarray:
    """The latent of a point of the plane, [latent_dim]."""
    return self._atlas().plane.lift(xy)

  def _check(self, indices: list[int]) -> list[int]:
    count = len(self._atlas().points)
    if max(indices) >= count:
      raise RequestError(f'index is {max(indices)}; there are {count} images.')
    return indices

  def _atlas(self) -> Atlas:
    if self.atlas is None:
      raise RequestError(self.problem or 'the images are still being encoded.')
    return self.atlas


def _labels(trained, count: int, label: int) -> np.ndarray | None:
  if not conditioning.num_classes(trained.model):
    return None
  return np.full(count, label, np.int32)


def _plain(value: Any) -> Any:
  """Arrays as lists; no NaN, which JSON does not have."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, np.ndarray):
    if value.dtype.kind == 'f':
      value = np.nan_to_num(value.astype(np.float64))
    return value.tolist()
  if isinstance(value, np.generic):
    return value.item()
  return value
