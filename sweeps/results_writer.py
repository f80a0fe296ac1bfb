"""Writes what came of a sweep's points: table, HParams view and page."""

from collections.abc import Callable
import contextlib
import time

from etils import epath
import jax
import ml_collections

from runs import progress
from sweeps import disk
from sweeps import gallery
from sweeps import hparams
from sweeps import page
from sweeps import points
from sweeps import table
from sweeps.results import Result

# A page with pictures is made again when that takes less than this of the time
# since it was made; that it takes so many seconds is a first guess.
_SHARE_OF_TIME = 0.01
_PAGE_SECONDS = 5.0

# At the end a disk that does not take the page is waited for, and tried again.
_PATIENCE_SECONDS = 300.0
_SECONDS_TO_RETRY = 10.0


class ResultsWriter:
  """Writes into the folder of a sweep."""

  def __init__(
    self, folder: epath.Path, base: ml_collections.ConfigDict, split: str
  ):
    """Takes where to write, and what the page says of all points.

    Args:
      folder: of the sweep.
      base: the config that its points start from.
      split: that they are measured on.
    """
    self._folder, self._base, self._split = folder, base, split
    self._last_page, self._page_seconds = time.monotonic(), _PAGE_SECONDS
    self._is_failing = False

  def write_if_cheap(self, results: list[Result]) -> None:
    """Writes the table, and all else where that takes little of the time.

    What the disk does not take is told of once; it is written with the next.
    """
    try:
      table.write(self._folder, results)
      self._is_failing = False
    except OSError as error:
      self._warn(error)
      return
    since = time.monotonic() - self._last_page
    if self._page_seconds < _SHARE_OF_TIME * since:
      # Another worker may be at it too; at the end one writes it alone.
      with contextlib.suppress(OSError):
        self._write(results)

  def write_patiently(
    self, results: list[Result], sleep: Callable[[float], None]
  ) -> None:
    """Writes all, at the end, when nothing comes after it.

    Args:
      results: of all points.
      sleep: waits for so many seconds before another try.

    Raises:
      WriteError: if the disk does not take it for minutes.
    """
    start = time.monotonic()
    while True:
      try:
        self._write(results)
        return
      except OSError as error:
        self._warn(error)
        if time.monotonic() - start > _PATIENCE_SECONDS:
          raise disk.told(
            error,
            self._folder,
            'All points are done and recorded; once it can be, the same '
            'command writes their results.',
          ) from error
      sleep(_SECONDS_TO_RETRY)

  def _warn(self, error: OSError) -> None:
    if not self._is_failing:
      progress.warn(
        f'warning: the results cannot be written into {self._folder} '
        f'({disk.reason(error)}). They are recorded, and writing is tried '
        'again.'
      )
    self._is_failing = True

  def _write(self, results: list[Result]) -> None:
    start = time.monotonic()
    table.write(self._folder, results)
    hparams.write(self._folder / 'tensorboard', results)
    galleries, originals = gallery.load(
      self._folder / points.FOLDER, [result.name for result in results]
    )
    data = self._base.data
    facts = {
      'data': f'{data.source} {data.dir}'.strip(),
      'split': self._split,
      'images': f'{data.image_size}×{data.image_size}',
      'epochs': self._base.train.num_epochs,
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
    }
    title = f'{self._folder.name}: {len(results)} points'
    page.write(self._folder, title, results, galleries, originals, facts)
    self._last_page = time.monotonic()
    self._page_seconds = self._last_page - start
