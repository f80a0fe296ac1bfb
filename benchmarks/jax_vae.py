"""The codebase's training step, and what a Flax tutorial would write.

Both of the same network, as contenders of a benchmark. Their images are on the
device before a clock runs.
"""

from collections.abc import Iterator
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import rounds
from vae import devices
from vae import model as models
from vae import optimizers
from vae import randomness
from vae import splits
from vae import training

# Of the batches that those go through who are given one batch at a time.
NUM_BATCHES = 4


def steps_per_dispatch() -> int:
  """As training has it where the config does not say."""
  return 10 if jax.default_backend() == 'cpu' else 100


def random_images(config, batch_size: int, num_batches: int) -> np.ndarray:
  """Noise, uint8 [num_batches · batch_size, height, width, channels]."""
  size = config.data.image_size
  shape = (num_batches * batch_size, size, size, config.data.channels)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def training_steps(
  name: str, config, split: splits.DeviceSplit, batch_size: int, max_steps: int
) -> rounds.Contender:
  """Training as `train.py` dispatches it, on all devices.

  Args:
    name: of the contender.
    config: of the run.
    split: whose images are stored on the devices.
    batch_size: global.
    max_steps: of a dispatch; no more than an epoch of the split has.
  """
  steps_per_epoch = split.num_examples // batch_size
  model = models.from_config(config, axis_name=devices.AXIS)
  optimizer = optimizers.from_config(config, steps_per_epoch)
  train_steps = training.make_train_steps(model, optimizer, config.train.flip)
  settings = training.settings_from_config(config, model)
  state = training.create_state(model, optimizer, config.seed)
  key = randomness.train_key(config.seed)
  chunks = _endless_chunks(split, config.seed, batch_size, max_steps)

  def run(num_steps):
    nonlocal state
    while num_steps:
      chunk = next(chunks)
      steps = min(num_steps, chunk.num_batches)
      state, _ = train_steps(
        state, settings, key, split.tiles, chunk.batches, steps
      )
      num_steps -= steps
    jax.block_until_ready(state)

  return rounds.Contender(name, batch_size, config.model.dtype, run)


def _endless_chunks(
  split: splits.DeviceSplit, seed: int, batch_size: int, max_steps: int
) -> Iterator[splits.Chunk]:
  epoch = 0
  while True:
    yield from splits.train_chunks(
      split, seed, epoch, 0, batch_size, max_steps, devices.current()
    )
    epoch += 1


class PlainVAE(nn.Module):
  """The network of `models.VAE` in Flax's own layers, with its parameters.

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
      x = _norm(self.dtype)(x)
      x = nn.leaky_relu(x)
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
      x = _norm(self.dtype)(x)
      x = nn.leaky_relu(x)
    x = nn.Conv(self.image_channels, (3, 3), dtype=self.dtype)(x)
    return x.astype(jnp.float32)


def _norm(dtype: str) -> nn.BatchNorm:
  return nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=dtype)


def plain_model(config) -> PlainVAE:
  """The network that `config` describes."""
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


def plain_steps(
  name: str, config, pixels: np.ndarray, batch_size: int
) -> rounds.Contender:
  """`jax.jit` of a step, which is dispatched for each batch.

  Args:
    name: of the contender.
    config: of the run.
    pixels: uint8 [≥ NUM_BATCHES · batch_size, height, width, channels].
    batch_size: images of a step.
  """
  model = plain_model(config)
  optimizer = optax.adam(config.optimizer.learning_rate)
  key = jax.random.key(config.seed)

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
      results, updates = model.apply(
        variables, images, epsilon, mutable='batch_stats'
      )
      return plain_loss(config, images, *results), updates['batch_stats']

    (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (count + 1, params, new_stats, opt_state), loss

  batches = [
    jax.device_put(pixels[i * batch_size : (i + 1) * batch_size])
    for i in range(NUM_BATCHES)
  ]
  state = init(batches[0][:1])

  def run(num_steps):
    nonlocal state
    for index in range(num_steps):
      state, _ = step(state, batches[index % NUM_BATCHES])
    jax.block_until_ready(state)

  return rounds.Contender(name, batch_size, config.model.dtype, run)
