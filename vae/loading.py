"""A trained model, read back from the workdir of its run."""

from collections.abc import Callable
import contextlib
import functools
import json
from typing import Any

from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vae import (
  checkpoints,
  conditioning,
  distributions,
  models,
  numerics,
  objectives,
  padding,
  paths,
  splits,
  steps,
)
from vae.errors import UserError

CONFIG = 'config.json'

# Images or latents that go through the network at a time.
_BATCH_SIZE = 64


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """The config in a run's workdir; UserError if it cannot be read."""
  path = paths.expand(workdir) / CONFIG
  try:
    return ml_collections.ConfigDict(json.loads(path.read_text()))
  except (FileNotFoundError, NotADirectoryError):
    message = f'{path} is missing; {workdir} holds no run'
    with contextlib.suppress(Exception):  # Only a hint.
      below = sorted(p.parent.name for p in path.parent.glob(f'*/{CONFIG}'))
      message += f'; folders in it do: {", ".join(below[:9])}' if below else ''
    raise UserError(f'{message}.') from None
  except (OSError, ValueError, TypeError, AttributeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path} cannot be read ({reason}).') from error


def load(
  workdir: epath.PathLike, checkpoint: str | int = 'best'
) -> 'TrainedVAE':
  """The trained model of a run.

  The checkpoint is `best`, by validation loss, `last`, or a step. Raises
  UserError if the workdir holds no run, or no such checkpoint that is sound.
  """
  return restore(read_config(workdir), workdir, checkpoint)


def restore(
  config, workdir: epath.PathLike, checkpoint: str | int = 'best'
) -> 'TrainedVAE':
  """`load`, with the config already read."""
  workdir = paths.expand(workdir)
  has_x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
  if config.model.get('dtype') == 'float64' and not has_x64:
    raise UserError(
      f'{workdir} holds a float64 model; that needs JAX_ENABLE_X64=1 in the '
      'environment.'
    )
  try:
    model = models.from_config(config)
    critic = objectives.critic(config, model)
  except (TypeError, AttributeError) as error:
    raise UserError(
      f'{workdir / CONFIG} does not fit this code ({error}); use the code that '
      'wrote it.'
    ) from error
  # The optimiser's state is part of a checkpoint; its schedule is not.
  program = steps.Program(
    model,
    critic=critic,
    average_decay=config.optimizer.get('average_decay', 0.0),
  )
  saved = checkpoints.Checkpoints(workdir)
  state = saved.restore(steps.abstract_state(program), saved.find(checkpoint))
  variables = dict(state.variables)
  variables['params'] = dict(variables['params'])
  variables['params'].pop('critic', None)
  return TrainedVAE(config, model, variables, int(state.step))


class TrainedVAE:
  """A model with its parameters, for use on NumPy arrays.

  Images are [n, height, width, channels], uint8 or floating in [0, 1], of the
  size that the model was trained on; latents are [n, *latent_shape]. Results
  are float32 NumPy arrays, computed precisely (`numerics.precise`). Any n goes:
  it is cut into batches of one size, so that each method is compiled once, and
  once more for a single image or latent. Arrays of another shape or range raise
  ValueError.

  A model with `num_classes` needs the class of each image, `labels` [n]; by
  default `sample` takes the classes in turn.

  `variables` are the collections of `model`, a Flax module; `step` is that of
  the checkpoint; `prior` is p(z), a distribution (`vae.distributions`).
  """

  def __init__(self, config, model: nn.Module, variables, step: int):
    self.config = config
    self.model = model
    self.variables = jax.device_put(
      jax.device_get(variables), jax.local_devices()[0]
    )
    self.step = step
    with numerics.precise(steps.float_dtype(model)):
      prior: Any = model.apply(self.variables, method='prior')
      self.prior, self.latent_shape = prior, prior.mean.shape

  def encode(self, images: np.ndarray, labels: Any = None) -> Any:
    """The posterior q(z|x) of each image, a distribution over [n, …].

    With `config.data.binarize=dynamic` uint8 images are binarised by a draw
    first; for `fixed` and `threshold` they must be black and white already.
    """
    images = self._check_images(images)
    is_grey = self.config.data.get('binarize') == 'dynamic'
    if is_grey and images.dtype == np.uint8:
      images = binarize(images)
    return self._in_batches(_encode, images, labels)

  def decode(self, z: np.ndarray, labels: Any = None) -> np.ndarray:
    """The mean images E[x|z] of latents, cut to [0, 1]."""
    z = np.asarray(z, np.float32)
    if z.shape[1:] != self.latent_shape or z.ndim == 1:
      raise ValueError(
        f'z has the shape {z.shape}; it must be '
        f'[n, {", ".join(map(str, self.latent_shape))}].'
      )
    return np.clip(self._in_batches(_decode, z, labels), 0, 1)

  def sample(
    self,
    num_images: int,
    seed: int = 0,
    temperature: float = 1.0,
    labels: Any = None,
  ) -> np.ndarray:
    """Mean images of draws of z from the prior.

    `temperature` is a factor on the standard deviation of the prior N(0, I);
    below 1 the images are more alike, and better. Another prior than N(0, I)
    has none (ValueError).
    """
    is_normal = isinstance(self.prior, distributions.StandardNormal)
    if temperature != 1 and not is_normal:
      raise ValueError(
        f'temperature is {temperature}; only the prior N(0, I) has one.'
      )
    z = temperature * self.sample_latents(num_images, seed)
    if labels is None:
      labels = conditioning.in_turn(self.model, num_images)
    return self.decode(z, labels)

  def sample_latents(self, num_latents: int, seed: int = 0) -> np.ndarray:
    """Draws of z from the prior, [num_latents, *latent_shape]."""
    return distributions.draw(
      self.prior, numerics.sample_key(seed), num_latents
    )

  def reconstruct(
    self,
    images: np.ndarray,
    seed: int | None = None,
    labels: Any = None,
  ) -> np.ndarray:
    """Images through the model, by the posterior's mean or a draw of `seed`."""
    posterior = self.encode(images, labels)
    if seed is None:
      return self.decode(posterior.mean, labels)
    with numerics.fixed('float32'):
      keys = numerics.example_keys(
        numerics.measure_key(seed), jnp.arange(len(images))
      )
      z = np.asarray(posterior.sample(keys)[0])
    return self.decode(z, labels)

  def _check_images(self, images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != self.model.image_shape:
      raise ValueError(
        f'the images have the shape {images.shape}; they must be '
        f'[n, {", ".join(map(str, self.model.image_shape))}].'
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

  def _check_labels(self, labels: Any, count: int) -> np.ndarray | None:
    num_classes = conditioning.num_classes(self.model)
    if labels is None and not num_classes:
      return None
    if labels is None or not num_classes:
      raise ValueError(
        'the model is conditioned on labels; give labels.'
        if num_classes
        else 'labels are given; the model is not conditioned on any.'
      )
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(
        f'the labels are {labels.dtype} {list(labels.shape)}; they must be '
        f'integers [{count}].'
      )
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
      raise ValueError(
        f'the labels go from {labels.min()} to {labels.max()}; the model has '
        f'the classes 0 to {num_classes - 1}.'
      )
    return labels.astype(np.int32)

  def _in_batches(self, function: Callable[..., Any], rows, labels):
    """Applies a function of the model to rows, padded to full batches."""
    labels = self._check_labels(labels, len(rows))
    results = []
    # A single image, as an explorer asks for, need not wait for a batch.
    size = 1 if len(rows) == 1 else _BATCH_SIZE
    for start in range(0, max(len(rows), 1), size):
      batch = splits.Examples(rows, labels)
      pad = functools.partial(_padded_batch, start, size)
      padded = jax.tree.map(pad, batch)
      variables = conditioning.given(self.variables, padded.labels)
      with numerics.precise(steps.float_dtype(self.model)):
        results.append(function(self.model, variables, padded.images))

    def join(path, *parts):
      # A network in a posterior (`distributions.Flow`) is one for all rows.
      if any(getattr(key, 'name', '') == 'variables' for key in path):
        return parts[0]
      return np.concatenate(parts)[: len(rows)]

    return jax.tree_util.tree_map_with_path(join, *results)


def _padded_batch(start: int, size: int, rows: np.ndarray) -> np.ndarray:
  batch = rows[start : start + size]
  missing = size - len(batch)
  return np.pad(batch, ((0, missing), *((0, 0),) * (rows.ndim - 1)))


def pad_trained(trained: TrainedVAE, latent_dim: int) -> TrainedVAE:
  """The same model with more latent dimensions, which carry nothing.

  Models that are padded to the same size share the programs that measure them.
  """
  model = trained.model
  if hasattr(model, 'latent_dim'):
    model = model.clone(latent_dim=latent_dim)
  wide = steps.abstract_state(steps.Program(model)).variables
  variables = padding.pad(jax.device_get(trained.variables), wide)
  variables |= padding.collection(trained.model, model)
  return TrainedVAE(trained.config, model, variables, trained.step)


def binarize(images: np.ndarray) -> np.ndarray:
  """Each pixel black or white, by its position; [n, …], uint8."""
  with numerics.fixed('float32'):
    keys = numerics.example_keys(numerics.binary_key(), jnp.arange(len(images)))
    drawn = numerics.bernoulli(keys, jnp.asarray(images / np.float32(255)))
    return np.where(drawn, 255, 0).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: nn.Module, variables, images: jax.Array):
  if images.dtype == jnp.uint8:
    images = steps.to_unit_range(images, steps.float_dtype(model))
  posterior: Any = model.apply(variables, images, method='encode')
  return jax.tree.map(lambda a: a.astype(jnp.float32), posterior)


@functools.partial(jax.jit, static_argnums=0)
def _decode(model: nn.Module, variables, z: jax.Array):
  likelihood: Any = model.apply(variables, z, method='decode')
  return likelihood.mean.astype(jnp.float32)
