"""Likelihoods p(x|z): log densities of images given the decoder's outputs.

All sums and logarithms are taken in at least float32, whatever the dtype of
the network. Images are in [0, 1]; values are nats per image.
"""

import math

import jax
from jax import nn
import jax.numpy as jnp

LIKELIHOODS = ('gaussian', 'bernoulli')


def log_prob(
  likelihood: str,
  images: jax.Array,
  outputs: jax.Array,
  sigma: jax.Array | float,
) -> jax.Array:
  """log p(x|z) of each image under the decoder's outputs.

  Args:
    likelihood: one of `LIKELIHOODS`.
    images: [batch, height, width, channels], in [0, 1].
    outputs: the decoder's, [..., batch, height, width, channels].
    sigma: standard deviation of the Gaussian; the Bernoulli has none.

  Returns:
    [..., batch], nats per image.
  """
  outputs = at_least_float32(outputs)
  if likelihood == 'gaussian':
    return gaussian_log_prob(images, outputs, sigma)
  return bernoulli_log_prob(images, outputs)


def mean(likelihood: str, outputs: jax.Array) -> jax.Array:
  """E[x|z], the image that the decoder's outputs describe; shaped as they."""
  outputs = at_least_float32(outputs)
  return outputs if likelihood == 'gaussian' else nn.sigmoid(outputs)


def gaussian_log_prob(
  images: jax.Array, means: jax.Array, sigma: jax.Array | float
) -> jax.Array:
  """log N(x; means, sigma² I), constant included; [..., batch], nats."""
  dimensions = math.prod(images.shape[-3:])
  squares = jnp.sum(jnp.square(images - means), axis=(-3, -2, -1))
  log_normalizer = dimensions * (jnp.log(sigma) + 0.5 * math.log(2 * math.pi))
  return -0.5 * squares / jnp.square(sigma) - log_normalizer


def bernoulli_log_prob(images: jax.Array, logits: jax.Array) -> jax.Array:
  """Σ x log p + (1 - x) log(1 - p), p = sigmoid(logits); [..., batch], nats.

  For grey values between 0 and 1 this is the cross-entropy that is customary,
  not the density of a distribution: it has no normaliser (Loaiza-Ganem &
  Cunningham 2019).
  """
  return jnp.sum(images * logits - nn.softplus(logits), axis=(-3, -2, -1))


def at_least_float32(x: jax.Array) -> jax.Array:
  """`x` with no fewer bits than float32: bfloat16 is widened."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
