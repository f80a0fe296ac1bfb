"""The files of an exported model."""

from collections.abc import Mapping
import json
import logging
import pathlib
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from exports.functions import Function
from vae import conditioning, splits, steps
from vae.errors import shown, UserError
from vae.loading import TrainedVAE

# ONNX operator set; the runtimes of the last two years read it.
_OPSET = 20

# Draws of the prior that a page chooses from.
_NUM_DRAWS = 256

# Dimensions whose effect is tried, and how many at a time.
_MOST_DIMENSIONS, _AT_A_TIME = 256, 32

# Settings that name places on the machine of the training.
_PLACES = (('data', 'dir'), ('data', 'decoded_dir'), ('init_from',))


def parameters(trained: TrainedVAE) -> dict[str, np.ndarray]:
  """Parameters and statistics by name, such as params.decoder.Conv_0.kernel."""
  kept = {
    name: collection
    for name, collection in trained.variables.items()
    if name not in (conditioning.COLLECTION, steps.AVERAGED)
  }
  flat = traverse_util.flatten_dict(jax.device_get(kept), sep='.')
  return {name: np.ascontiguousarray(value) for name, value in flat.items()}


def write_jax(folder: pathlib.Path, function: Function) -> None:
  """Writes a program for `jax.export.deserialize`."""
  (folder / f'{function.name}.jax').write_bytes(function.serialized())


def write_onnx(folder: pathlib.Path, function: Function) -> None:
  """Writes an ONNX file, with the first axis of any size.

  Raises UserError if the model has an operation that cannot be converted.
  """
  # Without a traceback for each operation of another JAX.
  logging.getLogger('jax2onnx').setLevel(logging.ERROR)
  import jax2onnx

  # It warns of numbers whose type the format can do without.
  logging.getLogger('onnx_ir').setLevel(logging.ERROR)
  inputs = [
    jax.ShapeDtypeStruct(('n', *value.shape), value.dtype)
    for value in function.inputs.values()
  ]
  try:
    model = jax2onnx.to_onnx(
      function.call,
      inputs,
      model_name=function.name,
      opset=_OPSET,
      input_names=list(function.inputs),
      output_names=list(function.outputs),
    )
  except Exception as error:  # Each operation has errors of its own.
    raise UserError(
      f'the {function.name} cannot be converted to ONNX ({shown(error)}); name '
      '--formats=jax,safetensors.'
    ) from error
  content = model.SerializeToString()
  _check_onnx(content, function)
  (folder / f'{function.name}.onnx').write_bytes(content)


def _check_onnx(content: bytes, function: Function) -> None:
  """Raises UserError unless ONNX Runtime computes the same."""
  import onnxruntime

  generator = np.random.default_rng(0)
  session_options = onnxruntime.SessionOptions()
  session_options.log_severity_level = 4  # Errors are raised.
  for count in (1, 3):
    inputs = {
      name: np.zeros(count, np.int32)
      if value.dtype == np.int32
      else generator.random((count, *value.shape), np.float32)
      for name, value in function.inputs.items()
    }
    try:
      session = onnxruntime.InferenceSession(content, session_options)
      found = session.run(list(function.outputs), inputs)
      for value, expected in zip(
        found, jax.jit(function.call)(*inputs.values()), strict=True
      ):
        np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5)
    except Exception as error:
      raise UserError(
        f'the {function.name} is not the same in ONNX ({shown(error, 200)}); '
        'name --formats=jax,safetensors.'
      ) from error


def write_safetensors(
  folder: pathlib.Path, arrays: Mapping[str, np.ndarray], step: int
) -> None:
  """Writes arrays by name."""
  from safetensors import numpy as safetensors

  safetensors.save_file(
    dict(arrays), folder / 'model.safetensors', {'step': str(step)}
  )


def write_config(folder: pathlib.Path, config) -> None:
  """Writes the config, without the paths of its machine."""
  content = config.copy_and_resolve_references().to_dict()
  for *groups, name in _PLACES:
    owner = content
    for group in groups:
      owner = owner[group]
    if name in owner:
      owner[name] = ''
  _write_json(folder / 'config.json', content)


def write_latents(folder: pathlib.Path, trained: TrainedVAE) -> None:
  """Writes draws of the prior, and the dimensions that change images the most.

  The change is the mean absolute difference of the images at -1.5 and 1.5
  standard deviations of the prior in that dimension, the others at its mean.
  Of a map with many dimensions some are tried, evenly spread.
  """
  draws = trained.sample_latents(_NUM_DRAWS)
  draws = draws.reshape(_NUM_DRAWS, -1)
  mean, deviation = draws.mean(axis=0), draws.std(axis=0)
  is_conditional = conditioning.in_turn(trained.model, 1) is not None
  tried = splits.spread(len(mean), _MOST_DIMENSIONS)
  changes = np.zeros(len(tried))
  for start in range(
    0, len(tried), _AT_A_TIME
  ):  # Images of 256 pixels are large.
    some = tried[start : start + _AT_A_TIME]
    offsets = 1.5 * np.diag(deviation)[some]
    ends = np.concatenate([mean + offsets, mean - offsets])
    images = trained.decode(
      ends.reshape(-1, *trained.latent_shape),
      np.zeros(len(ends), np.int32) if is_conditional else None,
    )
    up, down = np.split(images, 2)
    changes[start : start + len(some)] = np.abs(up - down).mean(axis=(1, 2, 3))
  order = np.argsort(-changes, kind='stable')
  content = {
    'latent_shape': trained.latent_shape,
    'image_shape': trained.model.image_shape,
    'num_classes': conditioning.num_classes(trained.model),
    'dimensions': tried[order].tolist(),
    'changes': _rounded(changes[order]),
    'mean': _rounded(mean),
    'deviation': _rounded(deviation),
    'draws': _rounded(draws),
  }
  _write_json(folder / 'latents.json', content)


def _rounded(values: np.ndarray) -> Any:
  return np.round(values.astype(np.float64), 5).tolist()


def _write_json(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content) + '\n')
