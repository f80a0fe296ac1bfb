"""TensorFlow, imported when something of it is first used: it takes seconds.

A run whose decoded images are on disk reads them without it.
"""

import runs  # noqa: F401 (Sets the environment of TensorFlow.)

# isort: split
import functools
import importlib.metadata
import types
from typing import Any


def version() -> str:
  """TensorFlow's version, by what is installed."""
  try:
    return importlib.metadata.version('tensorflow')
  except importlib.metadata.PackageNotFoundError:
    return importlib.metadata.version('tensorflow-cpu')


@functools.cache
def _module() -> types.ModuleType:
  import tensorflow

  # The accelerators are JAX's alone.
  tensorflow.config.set_visible_devices([], 'GPU')
  tensorflow.config.set_visible_devices([], 'TPU')
  return tensorflow


def __getattr__(name: str) -> Any:
  return getattr(_module(), name)
