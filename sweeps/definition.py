"""What makes a sweep the one that it is."""

from collections.abc import Mapping
import json

import ml_collections

from configs import default
from runs import schema
from sweeps.points import Range
from vae.errors import UserError


def define(
  base: ml_collections.ConfigDict,
  axes: Mapping[str, list[object] | Range],
  measured: Mapping[str, object],
  search: Mapping[str, object],
) -> dict[str, object]:
  """What two sweeps have in common where they are the same, as JSON has it.

  Args:
    base: the config that the points start from.
    axes: what varies, by config key.
    measured: what is measured of each point.
    search: how its points are chosen.
  """
  config = schema.flatten(schema.resolved(base))
  definition = {
    'config': {
      key: value
      for key, value in config.items()
      if key not in axes
      and (key not in schema.FREE_KEYS or key == 'train.num_epochs')
    },
    'values': {
      key: [v.low, v.high, v.log] if isinstance(v, Range) else v
      for key, v in axes.items()
    },
    'measured': measured,
    'search': search,
  }
  return json.loads(json.dumps(definition))


def check_same(
  given: Mapping[str, object], found: Mapping[str, object], where: str
) -> None:
  """Checks that a sweep is the one that is there already.

  Raises:
    UserError: if it is another, with the first difference.
  """
  # Sweeps that are older than a key had its default.
  defaults = json.loads(json.dumps(schema.flatten(default.get_config())))
  missing = defaults.keys() & given.get('config', {}).keys()
  config = {key: defaults[key] for key in missing} | found.get('config', {})
  given, found = {'config': {}} | given, found | {'config': config}
  for key in {**given, **found}:
    if given.get(key) == found.get(key):
      continue
    was, now = found.get(key), given.get(key)
    if isinstance(was, dict) and isinstance(now, dict):
      name = next(
        k for k in {**was, **now} if k not in was or was[k] != now.get(k)
      )
      key, was, now = f'{key} {name}', was.get(name), now.get(name)
    raise UserError(
      f'{where} holds another sweep: {key} was {was} and is now {now}. Name '
      'another --workdir, or give the old values.'
    )
