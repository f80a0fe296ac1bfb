"""TensorFlow, imported when something of it is first used: it takes seconds.

A run whose decoded images are on disk reads them without it.
"""

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
def load() -> types.ModuleType:
  """Imports it, and leaves the accelerators to JAX alone."""
  import tensorflow

  tensorflow.config.set_visible_devices([], 'GPU')
  tensorflow.config.set_visible_devices([], 'TPU')
  return tensorflow


def __getattr__(name: str) -> Any:
  return getattr(load(), name)
