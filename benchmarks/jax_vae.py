"""Contenders in JAX: the codebase's training step, and a Flax tutorial's.

Both train the same network. Their images are on the device before a clock runs.
"""

from collections.abc import Callable
import itertools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import rounds
from configs import celeba
from vae import splits
from vae.trainer import Trainer

# Batches of a contender that is given one batch at a time.
NUM_BATCHES = 4


def make_config(quick: bool = False):
  """configs/celeba.py; for a try a tiny network, in batches of 8."""
  config = celeba.get_config()
  if quick:
    config.data.image_size = 16
    config.model.latent_dim = 4
    config.model.hidden_channels = (4, 8)
    config.train.batch_size = 8
  return config


def steps_per_dispatch() -> int:
  """The default of `train.py`."""
  return 10 if jax.default_backend() == 'cpu' else 100


def random_images(config, count: int) -> np.ndarray:
  """Noise, uint8 [count, height, width, channels]."""
  size = config.data.image_size
  shape = (count, size, size, config.data.channels)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_data(config, num_batches: int) -> splits.DataSet:
  """Noise on the devices, in every split a number of batches."""
  images = random_images(config, num_batches * config.train.batch_size)
  split = splits.DeviceSplit(splits.ArraySplit(images))
  return splits.DataSet(split, split, split)


def dispatches(
  trainer: Trainer, max_steps: int, after: Callable[[], None] | None = None
) -> Callable[[int], None]:
  """Makes training steps as `train.py` dispatches them, on all devices.

  Args:
    trainer: of a run or a population.
    max_steps: of a dispatch.
    after: called after each dispatch.

  Returns:
    The `run` of a contender.
  """
  chunks = itertools.chain.from_iterable(
    trainer.train_chunks(epoch, 0, max_steps) for epoch in itertools.count()
  )

  def run(num_steps):
    while num_steps:
      chunk = next(chunks)
      chunk.num_batches = min(num_steps, chunk.num_batches)
      metrics = trainer.train(chunk)
      num_steps -= chunk.num_batches
      if after is not None:
        after()
    jax.block_until_ready(metrics)

  return run


def training(
  name: str, config, max_steps: int | None = None
) -> rounds.Contender:
  """The codebase's training step.

  Args:
    name: of the contender.
    config: of the run.
    max_steps: of a dispatch; the default is that of `train.py`.
  """
  max_steps = max_steps or steps_per_dispatch()
  trainer = Trainer(config, make_data(config, max_steps))
  return rounds.Contender(
    name,
    config.train.batch_size,
    config.model.dtype,
    dispatches(trainer, max_steps),
  )


class PlainVAE(nn.Module):
  """The network of `vae.models.conv` in Flax's layers, with its parameters.

  Attributes:
    image_shape: (height, width, channels).
    latent_dim: size of z.
    hidden_channels: of the encoder's convolutions.
    dtype: of the computation.
  """

  image_shape: tuple[int, int, int]
  latent_dim: int
  hidden_channels: tuple[int, ...]
  dtype: str = 'float32'

  def setup(self):
    height, width, channels = self.image_shape
    stride = 2 ** len(self.hidden_channels)
    self.encoder = PlainEncoder(
      self.latent_dim, self.hidden_channels, self.dtype
    )
    self.decoder = PlainDecoder(
      (height // stride, width // stride),
      channels,
      self.hidden_channels[::-1],
      self.dtype,
    )

  def __call__(self, images, epsilon):
    """Outputs, mean and logvar; z = mean + σ · epsilon [batch, latent_dim]."""
    mean, logvar = self.encoder(images)
    z = mean + jnp.exp(0.5 * logvar) * epsilon
    return self.decoder(z), mean, logvar


class PlainEncoder(nn.Module):
  """Images to (mean, logvar)."""

  latent_dim: int
  hidden_channels: tuple[int, ...]
  dtype: str

  @nn.compact
  def __call__(self, x):
    for features in self.hidden_channels:
      x = nn.Conv(features, (3, 3), strides=2, dtype=self.dtype)(x)
      x = nn.leaky_relu(_norm(self.dtype)(x))
    x = x.reshape(x.shape[0], -1)
    mean = nn.Dense(self.latent_dim, dtype=self.dtype, name='mean')(x)
    logvar = nn.Dense(self.latent_dim, dtype=self.dtype, name='logvar')(x)
    return mean.astype(jnp.float32), logvar.astype(jnp.float32)


class PlainDecoder(nn.Module):
  """Latents to images."""

  start_size: tuple[int, int]
  image_channels: int
  hidden_channels: tuple[int, ...]
  dtype: str

  @nn.compact
  def __call__(self, z):
    shape = (*self.start_size, self.hidden_channels[0])
    x = nn.Dense(math.prod(shape), dtype=self.dtype)(z)
    x = x.reshape(-1, *shape)
    for features in (*self.hidden_channels[1:], self.hidden_channels[-1]):
      x = nn.ConvTranspose(features, (3, 3), strides=(2, 2), dtype=self.dtype)(
        x
      )
      x = nn.leaky_relu(_norm(self.dtype)(x))
    x = nn.Conv(self.image_channels, (3, 3), dtype=self.dtype)(x)
    return x.astype(jnp.float32)


def _norm(dtype: str) -> nn.BatchNorm:
  return nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=dtype)


def plain_model(config) -> PlainVAE:
  """The plain network of a config."""
  size = config.data.image_size
  return PlainVAE(
    (size, size, config.data.channels),
    config.model.latent_dim,
    tuple(config.model.hidden_channels),
    config.model.dtype,
  )


def plain_loss(config, images, outputs, mean, logvar) -> jax.Array:
  """-log p(x|z) + β · KL, nats per image, mean over the batch."""
  sigma = config.model.sigma
  squares = jnp.sum(jnp.square(images - outputs), axis=(1, 2, 3))
  constant = math.log(sigma) + 0.5 * math.log(2 * math.pi)
  constant *= math.prod(images.shape[1:])
  kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar, axis=-1)
  distortion = squares / (2 * sigma**2) + constant
  return jnp.mean(distortion + config.objective.beta * kl)


def plain(name: str, config) -> rounds.Contender:
  """A tutorial's training step: `jax.jit`, dispatched for each batch."""
  model = plain_model(config)
  optimizer = optax.adam(config.optimizer.learning_rate)
  key = jax.random.key(config.seed)
  batch_size = config.train.batch_size

  @jax.jit
  def init(images):
    epsilon = jnp.zeros((1, config.model.latent_dim))
    variables = model.init(key, images / 255, epsilon)
    return (
      jnp.zeros((), jnp.int32),
      variables['params'],
      variables['batch_stats'],
      optimizer.init(variables['params']),
    )

  @jax.jit
  def step(state, images):
    count, params, batch_stats, opt_state = state
    flip_key, z_key = jax.random.split(jax.random.fold_in(key, count))
    images = images.astype(jnp.float32) / 255
    if config.train.flip:
      mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
      images = jnp.where(mirrored, images[:, :, ::-1], images)
    shape = (len(images), config.model.latent_dim)
    epsilon = jax.random.normal(z_key, shape)

    def loss_fn(params):
      variables = {'params': params, 'batch_stats': batch_stats}
      found, updates = model.apply(
        variables, images, epsilon, mutable='batch_stats'
      )
      return plain_loss(config, images, *found), updates['batch_stats']

    (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (count + 1, params, new_stats, opt_state), loss

  batches = jax.device_put(
    np.split(random_images(config, NUM_BATCHES * batch_size), NUM_BATCHES)
  )
  state = init(batches[0][:1])

  def run(num_steps):
    nonlocal state
    for index in range(num_steps):
      state, _ = step(state, batches[index % NUM_BATCHES])
    jax.block_until_ready(state)

  return rounds.Contender(name, batch_size, config.model.dtype, run)
