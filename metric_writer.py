"""Where a run's metrics go: TensorBoard, through clu, and `metrics.jsonl`."""

from collections.abc import Mapping
import json

from clu import metric_writers
from etils import epath
import numpy as np

FILENAME = 'metrics.jsonl'


def read(workdir: epath.Path) -> list[dict[str, float]]:
  """The lines of a run's `metrics.jsonl`; none where there is no file."""
  path = workdir / FILENAME
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:  # Cut short by a kill.
      continue
  return rows


class MetricWriter:
  """Writes scalars to both, pictures and hyperparameters to TensorBoard."""

  def __init__(self, workdir: epath.Path):
    self._path = workdir / FILENAME
    self._tensorboard = metric_writers.AsyncWriter(
      metric_writers.SummaryWriter(str(workdir / 'tensorboard'))
    )

  def rewind(self, step: int) -> None:
    """Drops the lines of `metrics.jsonl` beyond `step`.

    A killed run wrote them after its last checkpoint; the run that goes on
    from there writes them again.
    """
    if not self._path.exists():
      return
    kept = [
      json.dumps(row) + '\n'
      for row in read(self._path.parent)
      if row['step'] <= step
    ]
    partial = self._path.with_suffix('.partial')
    partial.write_text(''.join(kept))
    partial.replace(self._path)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """One JSON object on a line of its own, and a point on each curve."""
    row = {'step': step, **scalars}
    with self._path.open('a') as file:
      file.write(json.dumps(row) + '\n')
    self._tensorboard.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Pictures, uint8 [height, width, channels]."""
    self._tensorboard.write_images(step, images)

  def write_hparams(self, hparams: Mapping[str, object]) -> None:
    """The settings of the run; what is not a plain value goes as text."""
    self._tensorboard.write_hparams(
      {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in hparams.items()
      }
    )

  def close(self) -> None:
    """Waits until everything is written."""
    self._tensorboard.close()
