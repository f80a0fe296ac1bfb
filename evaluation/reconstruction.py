"""Reconstructions: the pass over the images; MSE, PSNR, SSIM.

As in training, every random draw is a function of the key and the image's
position in its split: neither batch size nor devices change a number but by
rounding. Images are [batch, height, width, channels] in [0, 1].
"""

from collections.abc import Callable
import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vae import (
  conditioning,
  devices,
  discrete,
  distributions,
  likelihoods,
  numerics,
  steps,
)

# Wang et al. 2004, section III: an 11×11 Gaussian window, and the constants
# that keep the ratios stable if an image is flat.
WINDOW = 11
_WEIGHTS = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / 1.5) ** 2)
_K1, _K2 = 0.01, 0.03

_THROUGH = 'of reconstructions through the posterior mean'


def evaluate(context, results) -> None:
  """Adds MSE, PSNR and SSIM of reconstructions through the posterior mean."""
  values = context.images
  add_mse(results, values)
  results.mean('psnr', values['psnr'], 'dB', _THROUGH)
  if 'ssim' in values:
    results.mean('ssim', values['ssim'], 'at most 1', _THROUGH)
  else:
    results.notes.append('ssim: the images are smaller than its window.')


def add_mse(results, values: dict[str, np.ndarray]) -> None:
  """Adds the MSE of the posterior mean."""
  about = f'{_THROUGH}, clipped; val/mse has z drawn and nothing clipped'
  results.mean('mse_of_mean', values['mse'], 'mean over pixels', about)


@functools.lru_cache(maxsize=8)
def make_step(
  model: nn.Module, num_draws: int, binarize: bool = False
) -> Callable[..., dict]:
  """Compiles the measurement of a batch, with 0 draws of z for its mean.

  `binarize` draws each image black and white, once.

  Returns:
    A function of variables, with the labels of the split if it is conditioned
    on them, a key, images uint8 [devices, per_device_batch,
    height, width, channels], and the position of the first, that returns, each
    [devices, per_device_batch, …],
      mean, logvar, kl: as of `codes`;
      rate: KL(q(z|x) ‖ p(z)), nats, from the draws if there is no closed form;
      distortion: E_q[-log p(x|z)], nats;
      squared_error, dequantised_squared_error: E_q‖x - x̂‖², of x in [0, 1]
        and of the dequantised image;
      sigma: of a Gaussian likelihood;
      is_density: whether log p(x|z) is that of a density or a probability;
      is_mass: whether it is a probability, of 8-bit or binary images;
      mse, psnr, ssim: of the reconstruction through the posterior mean, cut
        to [0, 1]; no ssim for images smaller than its window.
  """

  def step(variables, key, images, start):
    at = positions(start, len(images))
    return nn.apply(_measure, model)(
      conditioning.at(variables, at),
      *(images, numerics.example_keys(key, at), num_draws, at, binarize),
    )

  return jax.pmap(step, axis_name=devices.AXIS, in_axes=(None, None, 0, None))


def _measure(vae, images, keys, num_draws, at, binarize):
  x = unit_range(vae, images, at, binarize)
  y = dequantise(images, keys)
  posterior, prior = vae.encode(x), vae.prior()
  values = codes(posterior, prior)

  def squared_error(a, b):
    return jnp.sum(jnp.square(a - b), axis=(-3, -2, -1))

  def draw(i):
    z = draw_z(posterior, keys, i) if num_draws else posterior.mean
    likelihood = vae.decode(z)
    return {
      'rate': posterior.log_prob(z) - log_prior(prior, z, keys, i),
      'distortion': -likelihood.log_prob(x),
      'squared_error': squared_error(x, likelihood.mean),
      'dequantised_squared_error': squared_error(y, likelihood.mean),
    }

  draws = lax.map(draw, jnp.arange(max(num_draws, 1)))
  values |= jax.tree.map(lambda a: a.mean(axis=0), draws)
  if 'kl' in values:
    values['rate'] = values['kl'].sum(axis=1)
  likelihood = vae.decode(posterior.mean)
  is_mass = jnp.full(len(x), likelihood.is_mass)
  is_density = jnp.full(len(x), not likelihood.is_mass)
  if isinstance(likelihood, likelihoods.Bernoulli):
    is_mass = jnp.all((x == 0) | (x == 1), axis=(1, 2, 3))
  elif isinstance(likelihood, likelihoods.Gaussian):
    if not jnp.ndim(likelihood.sigma):
      values['sigma'] = jnp.full(len(x), likelihood.sigma)
  values |= {'is_mass': is_mass, 'is_density': is_density | is_mass}
  reconstruction = jnp.clip(likelihood.mean, 0, 1)
  values['mse'] = jnp.mean(jnp.square(x - reconstruction), axis=(1, 2, 3))
  values['psnr'] = psnr(x, reconstruction)
  if min(x.shape[1:3]) >= WINDOW:
    values['ssim'] = ssim(x, reconstruction)
  return values


def codes(posterior, prior) -> dict[str, jax.Array]:
  """The posterior in vectors, all axes of z in one, [batch, latent_dim] each.

  Returns:
    mean: of q(z|x).
    logvar: log σ², only of a diagonal Gaussian.
    certain: 1, only of a posterior that is its mean, [batch, 1].
    kl: KL(q(z_j|x) ‖ p(z_j)), nats; only in closed form.
  """
  values = {
    'mean': posterior.mean,
    'kl': distributions.kl_per_dimension(posterior, prior),
  }
  if isinstance(posterior, distributions.Normal):
    values['logvar'] = posterior.logvar
  elif isinstance(posterior, discrete.Codes):
    values['certain'] = jnp.ones(len(posterior.mean))
  return {
    name: a.reshape(len(a), -1) for name, a in values.items() if a is not None
  }


def unit_range(vae, images: jax.Array, at: jax.Array, binarize: bool):
  """uint8 images in [0, 1], or each pixel drawn black or white.

  The draws are the same for all models, by the images' positions.
  """
  x = steps.to_unit_range(images, steps.float_dtype(vae))
  if not binarize:
    return x
  keys = numerics.example_keys(numerics.binary_key(), at)
  return numerics.bernoulli(keys, x)


def positions(start: jax.Array, per_device: int) -> jax.Array:
  """The positions of this device's images in their split, [per_device]."""
  return start + numerics.global_positions(devices.AXIS, per_device)


def draw_z(posterior, keys: jax.Array, index: jax.Array) -> jax.Array:
  """Each image's draw of this index, [batch, *event]."""
  return posterior.sample(numerics.fold_in(keys, index + 1), 1)[0]


def log_prior(prior, z: jax.Array, keys: jax.Array, index: jax.Array):
  """log p(z) of `draw_z`, or its estimate; [batch]."""
  keys = numerics.fold_in(numerics.fold_in(keys, index + 1), 0)
  return distributions.log_prior(prior, z, keys)


def dequantise(images: jax.Array, keys: jax.Array) -> jax.Array:
  """8-bit images as draws from a density on [0, 1): y = (x + u) / 256.

  The density of y in a bin integrates to the probability of its grey value,
  so that -log p(y) bounds the cost of coding the image (Theis et al. 2016,
  section 3.1).
  """
  noise = numerics.uniform(numerics.fold_in(keys, 0), images.shape[1:])
  return (images + noise) / 256


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio, 10 log10(1 / MSE), dB; [batch]."""
  return -10 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(-3, -2, -1)))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
  """Structural similarity, 1 for equal images; Wang et al. 2004, equation 13.

  The mean over channels and over all positions at which the window lies within
  the image, [batch].
  """
  # The window at each position along a side, [side - 10, side].
  weights = (_WEIGHTS / _WEIGHTS.sum()).astype(np.float32)
  rows, columns = (
    np.stack(
      [np.convolve(e, weights) for e in np.eye(n - WINDOW + 1, dtype='f')]
    )
    for n in a.shape[-3:-1]
  )

  def blur(x):
    # As two matrix products, the separable window is fast on every backend.
    highest = lax.Precision.HIGHEST
    return jnp.einsum('ih,bhwc,jw->bijc', rows, x, columns, precision=highest)

  mean_a, mean_b = blur(a), blur(b)
  variance_a = blur(jnp.square(a)) - jnp.square(mean_a)
  variance_b = blur(jnp.square(b)) - jnp.square(mean_b)
  covariance = blur(a * b) - mean_a * mean_b
  c1, c2 = _K1**2, _K2**2
  similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
  similarity /= jnp.square(mean_a) + jnp.square(mean_b) + c1
  similarity /= variance_a + variance_b + c2
  return similarity.mean(axis=(-3, -2, -1))
