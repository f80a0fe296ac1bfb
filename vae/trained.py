"""A trained model, read back from the workdir of its run."""

import functools
import json

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vae import checkpoints
from vae import model as models
from vae import numerics
from vae import optimizers
from vae import paths
from vae import training
from vae.errors import UserError
from vae.model import VAE

CONFIG = 'config.json'

# Images or latents that go through the network at a time.
_BATCH_SIZE = 64


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """The config that a run left in its workdir, as it was written.

  Raises:
    UserError: if there is none, or an unreadable one.
  """
  path = paths.expand(workdir) / CONFIG
  try:
    return ml_collections.ConfigDict(json.loads(path.read_text()))
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f'{path} is missing; {workdir} holds no run.') from None
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror or error}).'
    ) from error
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f'{path} cannot be read as a config: {error}') from error


def load(
  workdir: epath.PathLike, checkpoint: str | int = 'best'
) -> 'TrainedVAE':
  """The trained model of a run.

  Args:
    workdir: of the run.
    checkpoint: `best`, by validation loss, `last`, or a step.

  Raises:
    UserError: if the workdir holds no run or no such checkpoint, or one that
      is damaged or contradicts the config.
  """
  return restore(read_config(workdir), workdir, checkpoint)


def restore(
  config, workdir: epath.PathLike, checkpoint: str | int = 'best'
) -> 'TrainedVAE':
  """As `load`, with the config already read."""
  workdir = paths.expand(workdir)
  if config.model.dtype == 'float64' and not jax.config.jax_enable_x64:
    raise UserError(
      f'{workdir} holds a float64 model; that needs JAX_ENABLE_X64=1 in the '
      'environment.'
    )
  try:
    model = models.from_config(config)
  except TypeError as error:
    raise UserError(
      f'{workdir / CONFIG} does not fit this code ({error}); use the code that '
      'wrote it.'
    ) from error
  # The optimiser's state is part of a checkpoint; its schedule is not.
  optimizer = optimizers.Optimizer()
  state = training.abstract_state(model, optimizer)
  saved = checkpoints.Checkpoints(workdir)
  state = saved.restore(state, saved.find(checkpoint))
  return TrainedVAE(config, model, state.variables, int(state.step))


class TrainedVAE:
  """A model with its parameters, for use on numpy arrays.

  Images are [n, height, width, channels], uint8 or floating in [0, 1], of the
  size that the model was trained on; latents are [n, latent_dim]. What is
  returned is float32, and computed precisely (`numerics.precise`). Any n goes:
  it is cut into batches of one size, so that each method is compiled once.

  Attributes:
    config: of the run.
    model: the Flax module.
    variables: its parameters and statistics.
    step: of the checkpoint.
  """

  def __init__(self, config, model: VAE, variables, step: int):
    """Takes what was restored, on any devices."""
    self.config = config
    self.model = model
    self.variables = jax.device_put(
      jax.device_get(variables), jax.local_devices()[0]
    )
    self.step = step

  def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and log variance of q(z|x), [n, latent_dim] each.

    Raises:
      ValueError: if the images are not of the model's shape, or not in [0, 1].
    """
    return self._in_batches('encode', self._check_images(images))

  def decode(self, z: np.ndarray) -> np.ndarray:
    """The mean images E[x|z] of latents, cut to [0, 1].

    Raises:
      ValueError: if `z` is not [n, latent_dim].
    """
    z = np.asarray(z, np.float32)
    if z.ndim != 2 or z.shape[1] != self.model.latent_dim:
      raise ValueError(
        f'z has the shape {z.shape}; it must be [n, {self.model.latent_dim}].'
      )
    return np.clip(self._in_batches('decode', z), 0, 1)

  def sample(
    self, num_images: int, seed: int = 0, temperature: float = 1.0
  ) -> np.ndarray:
    """Mean images of draws of z from the prior.

    Args:
      num_images: how many.
      seed: fixes the draws.
      temperature: factor on the prior's standard deviation; below 1 the
        images are more alike, and better.

    Returns:
      [num_images, height, width, channels], in [0, 1].
    """
    shape = (num_images, self.model.latent_dim)
    z = np.random.default_rng(seed).standard_normal(shape)
    return self.decode(temperature * z)

  def reconstruct(
    self, images: np.ndarray, seed: int | None = None
  ) -> np.ndarray:
    """Images through the model: by the posterior mean, or a draw.

    Args:
      images: to be encoded and decoded.
      seed: of the draw, or None for the mean.

    Returns:
      [n, height, width, channels], in [0, 1].
    """
    z, logvar = self.encode(images)
    if seed is not None:
      # Not the noise that `sample` has for this seed.
      epsilon = np.random.default_rng([seed, 1]).standard_normal(z.shape)
      z = z + np.exp(0.5 * logvar) * epsilon
    return self.decode(z)

  def _check_images(self, images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != self.model.image_shape:
      raise ValueError(
        f'the images have the shape {images.shape}; they must be [n, '
        f'{", ".join(map(str, self.model.image_shape))}].'
      )
    if images.dtype == np.uint8:
      return images
    if not np.issubdtype(images.dtype, np.floating):
      raise ValueError(
        f'the images are {images.dtype}; they must be uint8 or floating.'
      )
    # NaN is not in [0, 1] either.
    if images.size and not (images.min() >= 0 and images.max() <= 1):
      raise ValueError(
        f'the images go from {images.min():.3g} to {images.max():.3g}; '
        'floating images must be in [0, 1].'
      )
    return images.astype(np.float32)

  def _in_batches(self, method: str, rows: np.ndarray):
    """Applies a method of the model to rows, padded to full batches."""
    results = []
    for start in range(0, max(len(rows), 1), _BATCH_SIZE):
      batch = rows[start : start + _BATCH_SIZE]
      missing = _BATCH_SIZE - len(batch)
      padded = np.pad(batch, ((0, missing), *((0, 0),) * (rows.ndim - 1)))
      with numerics.precise(self.model.dtype):
        results.append(_apply(self.model, method, self.variables, padded))
    return jax.tree.map(
      lambda *parts: np.concatenate(parts)[: len(rows)], *results
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: VAE, method: str, variables, rows: jax.Array):
  if rows.dtype == jnp.uint8:
    rows = training.to_unit_range(rows, training.float_dtype(model))
  result = model.apply(variables, rows, method=method)
  return jax.tree.map(lambda a: a.astype(jnp.float32), result)
