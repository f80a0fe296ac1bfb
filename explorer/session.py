"""A run that is explored: its model, and its data set in the latent space.

The model answers as soon as it is restored; the images are encoded in the
background. A run that still trains is followed: a newer checkpoint takes the
place of the one before once its images are encoded.
"""

import threading
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from data import image_files
from evaluation import posterior, reconstruction
from explorer.atlas import Atlas, of_posterior, survey
import input_pipeline
from runs import workdirs
from vae import (
  conditioning,
  distributions,
  figures,
  loading,
)
from vae.checkpoints import Checkpoints
from vae.errors import UserError

# Between two looks for a newer checkpoint.
_SECONDS = 2.0

# Draws of the prior for the ends of the sliders.
_NUM_SCALE_DRAWS = 256

# Half of a slider, in standard deviations of the prior or of q(z).
_REACH = 3.5


class _Shown(NamedTuple):
  """A checkpoint; `deviation` is that of its prior, [latent_dim]."""

  trained: loading.TrainedVAE
  deviation: np.ndarray
  atlas: Atlas | None = None


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
    self._config = workdirs.load_config(workdir, data_dir)
    self._is_own = data_dir is None
    self._config.data.cache = 'none'
    self._lock = threading.Lock()
    self.problem = ''
    self._data: Any = None
    self._shown = self._restore()
    self._closed = threading.Event()
    threading.Thread(target=self._follow, daemon=True).start()

  @property
  def trained(self) -> loading.TrainedVAE:
    """The model."""
    return self._shown.trained

  @property
  def atlas(self) -> Atlas | None:
    """The images in the latent space; None until they are encoded."""
    return self._shown.atlas

  def _restore(self) -> _Shown:
    trained = loading.restore(self._config, self.workdir, self._checkpoint)
    # Compiled before a page asks for it.
    trained.decode(np.zeros((1, *trained.latent_shape)), _labels(trained, 1, 0))
    draws = trained.sample_latents(_NUM_SCALE_DRAWS)
    return _Shown(trained, draws.reshape(len(draws), -1).std(axis=0))

  def close(self) -> None:
    """Ends the threads."""
    self._closed.set()

  def _follow(self) -> None:
    """Encodes the images, then looks for a newer checkpoint."""
    self._shown = self._surveyed(self._shown)
    while not self._closed.wait(_SECONDS):
      trained = self.trained
      try:
        step = Checkpoints(self.workdir).find(self._checkpoint)
        if step != trained.step:
          self._shown = self._surveyed(self._restore())
        elif self.atlas is not None:
          self.problem = ''
      except Exception as error:  # Such as memory that is used up.
        self.problem = (
          f'{" ".join(str(error).split())} What is shown is step '
          f'{trained.step:,}, from memory.'
        )

  def _surveyed(self, shown: _Shown) -> _Shown:
    """The checkpoint with its atlas, or without it if that fails."""
    try:
      shown = shown._replace(atlas=self._survey(shown.trained))
      self.problem = ''
    except Exception as error:  # The model can be explored without images.
      self.problem = (
        f'The images cannot be read: {" ".join(str(error).split())} Sliders '
        'and samples work without them.'
      )
    return shown

  def _survey(self, trained: loading.TrainedVAE) -> Atlas:
    if self._data is None:
      data = input_pipeline.load(trained.config)
      if self._is_own:
        identity = data.identity() | conditioning.identity(self._config, data)
        workdirs.check_data(self.workdir, identity)
      self._data = data
    return survey(trained, self._data.train)

  def describe(self) -> dict[str, Any]:
    """The run's facts and dimensions, for JSON."""
    trained, deviation, atlas = self._shown
    prior = trained.prior
    mean = np.ravel(prior.mean)
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
    return {
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

  def describe_atlas(self) -> dict[str, Any]:
    """Points, labels, directions and the map of holes, for JSON."""
    shown = self._shown
    return {'step': shown.trained.step, **self._atlas(shown).describe()}

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
    """The posterior of an image file, and where it lies, for JSON."""
    trained = self.trained
    shape = trained.model.image_shape
    try:
      with self._lock:  # A large file takes much memory.
        pixels, change = image_files.decode(content, shape, crop_size=None)
    except UserError as error:
      raise RequestError(f'the file {error}') from error
    encoded = trained.encode(pixels[None], _labels(trained, 1, label))
    codes = of_posterior(trained, reconstruction.codes(encoded, trained.prior))
    result = {name: np.asarray(values)[0] for name, values in codes.items()}
    return result | {'image': pixels, 'change': change}

  def near(self, z: np.ndarray, count: int) -> dict[str, Any]:
    """The training images whose means are nearest to z, for JSON."""
    atlas = self._atlas()
    count = min(count, len(atlas.points))
    (distances,), (indices,) = atlas.neighbours.kneighbors(z[None], count)
    return {
      'indices': indices,
      'positions': atlas.codes['positions'][indices],
      'distances': np.round(distances, 4),
      'point': atlas.plane.project(z[None])[0],
    }

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

  def _atlas(self, shown: _Shown | None = None) -> Atlas:
    atlas = (shown or self._shown).atlas
    if atlas is None:
      raise RequestError(self.problem or 'the images are still being encoded.')
    return atlas


def _labels(trained, count: int, label: int) -> np.ndarray | None:
  if not conditioning.num_classes(trained.model):
    return None
  return np.full(count, label, np.int32)
