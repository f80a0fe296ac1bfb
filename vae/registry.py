"""Modules by the names that configs and flags give, and settings of classes.

A name is that of a module in a package of this project, or of any other module
that can be imported, such as a file beside main.py.
"""

from collections.abc import Mapping
import dataclasses
import importlib
import importlib.util
import pathlib
import re
import types
from typing import Any, get_type_hints

from vae.errors import UserError

# Fields of a Flax module that no config sets.
_NOT_SETTINGS = ('image_shape', 'axis_name', 'parent', 'name')


def find(package: str, name: str, attribute: str) -> Any:
  """Finds a module by name, and returns its `attribute`; see `find_module`."""
  return getattr(find_module(package, name, attribute), attribute)


def find_module(package: str, name: str, attribute: str) -> types.ModuleType:
  """Finds a module in a package, such as `vae.models`, or on `sys.path`.

  Raises:
    UserError: if there is no such module, or it lacks the attribute.
  """
  for path in (f'{package}.{name}', name):
    try:
      found = importlib.util.find_spec(path) is not None
    except (ImportError, ValueError, AttributeError):
      found = False
    if found:
      module = importlib.import_module(path)
      if not hasattr(module, attribute):
        raise UserError(
          f'{module.__file__} has no {attribute}; docs/extending.md shows one.'
        )
      return module
  (folder,) = importlib.import_module(package).__path__
  pattern = re.compile(rf'^(class|def) {attribute}\b', re.M)
  names = [
    path.stem
    for path in sorted(pathlib.Path(folder).glob('[!_]*.py'))
    if pattern.search(path.read_text())
  ]
  raise UserError(
    f'{package} has no {name!r}; it has {", ".join(names)}, and a module of '
    'your own must be on PYTHONPATH.'
  )


def fields(cls: type) -> dict[str, tuple[Any, Any]]:
  """Type and default of each setting of a dataclass, by name."""
  hints = get_type_hints(cls)
  return {
    field.name: (hints[field.name], field.default)
    for field in dataclasses.fields(cls)
    if field.init and field.name not in _NOT_SETTINGS
  }


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
  """The fields that `config.model` or `config.objective` sets."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in group.items()
    if name != 'name'
  }


def check_at_least(low: float, **values: float | tuple[int, ...]) -> None:
  """Raises ValueError if a number, or one of a tuple, is below `low`."""
  for name, value in values.items():
    each = value if isinstance(value, tuple) else (value,)
    if not all(number >= low for number in each):
      raise ValueError(f'{name} is {value}; it must be at least {low:g}.')
