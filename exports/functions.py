"""Encoder and decoder of a trained model as functions of arrays alone.

The parameters are constants of the functions. Both compute what `vae.load`
does, in float32 products (`numerics.precise`), for any number of images.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from vae import conditioning, distributions, numerics, steps
from vae.loading import TrainedVAE

# Platforms of the exported programs.
PLATFORMS = ('cpu', 'cuda', 'tpu')


@dataclasses.dataclass(frozen=True)
class Function:
  """A function of arrays [n, …] that gives arrays [n, …].

  Attributes:
    name: of its files, `encoder` or `decoder`.
    call: takes the inputs in order, and gives the outputs in a tuple.
    inputs: shape without n, and dtype, by name.
    outputs: their names.
  """

  name: str
  call: Callable[..., tuple[jax.Array, ...]]
  inputs: dict[str, jax.ShapeDtypeStruct]
  outputs: tuple[str, ...]

  def serialized(self) -> bytes:
    """The program for `PLATFORMS`, as `jax.export.deserialize` reads it."""
    (n,) = export.symbolic_shape('n')
    inputs = [
      jax.ShapeDtypeStruct((n, *value.shape), value.dtype)
      for value in self.inputs.values()
    ]
    program = export.export(jax.jit(self.call), platforms=PLATFORMS)(*inputs)
    return program.serialize()


def encoder(trained: TrainedVAE, convolution: str) -> Function:
  """Images in [0, 1] to the posterior's mean, and its logvar if it has one.

  logvar is log σ² of a posterior that is a diagonal Gaussian. `convolution` is
  a method of `vae.convolutions` that the format knows: `native`, `dilated`.
  """
  model, variables = _portable(trained, convolution)

  def parts(images, *labels):
    posterior = _apply(model, variables, labels, images, 'encode')
    if isinstance(posterior, distributions.Normal):
      return posterior.mean, posterior.logvar
    return (posterior.mean,)

  def encode(*inputs):
    return tuple(part.astype(jnp.float32) for part in parts(*inputs))

  inputs = {'images': _row(model.image_shape), **_labels(model)}
  rows = [
    jax.ShapeDtypeStruct((1, *value.shape), value.dtype)
    for value in inputs.values()
  ]
  outputs = 'mean', 'logvar'
  outputs = outputs[: len(jax.eval_shape(encode, *rows))]
  return Function('encoder', _precise(model, encode), inputs, outputs)


def decoder(trained: TrainedVAE, convolution: str) -> Function:
  """Latents to the mean images E[x|z], cut to [0, 1]."""
  model, variables = _portable(trained, convolution)

  def decode(z, *labels):
    likelihood = _apply(model, variables, labels, z, 'decode')
    return (jnp.clip(likelihood.mean.astype(jnp.float32), 0, 1),)

  inputs = {'z': _row(trained.latent_shape), **_labels(model)}
  return Function('decoder', _precise(model, decode), inputs, ('images',))


def _portable(trained: TrainedVAE, convolution: str) -> tuple[Any, Any]:
  """The model with a method of convolution, and its parameters."""
  model = trained.model
  # By itself a model chooses by the platform on which it is traced.
  if hasattr(model, 'convolution'):
    model = model.clone(convolution=convolution)
  return model, trained.variables


def _apply(model, variables, labels, rows, method: str) -> Any:
  return model.apply(
    conditioning.given(variables, *labels or (None,)), rows, method=method
  )


def _precise(model, function: Callable) -> Callable:
  def precise(*arrays):
    with numerics.precise(steps.float_dtype(model)):
      return function(*arrays)

  return precise


def _row(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, np.float32)


def _labels(model) -> dict[str, jax.ShapeDtypeStruct]:
  if not conditioning.num_classes(model):
    return {}
  return {'labels': jax.ShapeDtypeStruct((), np.int32)}
