"""The points of a sweep as a table that any program reads."""

import csv
import io
import math

from etils import epath

from sweeps import variation
from sweeps.results import Result
from vae import paths

FILENAME = 'results.csv'


def write(folder: epath.Path, results: list[Result]) -> epath.Path:
  """Writes a row for each point: its settings, its state, its metrics.

  Args:
    folder: of the sweep.
    results: of its points.

  Returns:
    The path of the table, UTF-8, its first row the names of the columns; what
    a point does not have, or what is not finite, is empty.
  """
  keys = variation.keys(results)
  ordered = variation.grouped(results, keys).values()
  metrics = dict.fromkeys(name for r in results for name in r.metrics)
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(['point', 'state', *keys, *metrics, 'error'])
  for result in (result for members in ordered for result in members):
    values = [variation.text(result.values[key], digits=12) for key in keys]
    numbers = [result.metrics.get(name, math.nan) for name in metrics]
    writer.writerow(
      [
        result.name,
        result.state,
        *values,
        *(repr(n) if math.isfinite(n) else '' for n in numbers),
        result.error,
      ]
    )
  paths.replace(folder / FILENAME, file.getvalue().encode())
  return folder / FILENAME
