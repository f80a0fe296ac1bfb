"""What is told of a run while it trains, and of any long pass: progress."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import shutil
import sys
import time
from typing import Protocol

from etils import epath
import numpy as np

from vae import figures

# Of `progress`, where the output is no terminal.
_SECONDS_BETWEEN_LINES = 10


class Writer(Protocol):
  """Takes the metrics; `metric_writer.MetricWriter` is one."""

  def rewind(self, step: int) -> None:
    """Forgets what was written beyond `step`."""

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    """Takes numbers by name."""

  def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
    """Takes uint8 pictures [height, width, channels] by name."""

  def write_hparams(self, hparams: dict[str, object]) -> None:
    """Takes the settings of the run."""


class NullWriter:
  """Takes metrics and does nothing with them."""

  def rewind(self, step):
    """See `Writer`."""

  def write_scalars(self, step, scalars):
    """See `Writer`."""

  def write_images(self, step, images):
    """See `Writer`."""

  def write_hparams(self, hparams):
    """See `Writer`."""

  def close(self):
    """Nothing to wait for."""


class Report:
  """Tells of one run, to a writer, in the workdir and in the terminal.

  Its clock starts with the first dispatch, when compilation is over. It
  stands still in `pause`, for the speed but not for the time left.
  """

  def __init__(
    self,
    writer: Writer,
    workdir: epath.Path,
    *,
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    batch_size: int,
  ):
    """Starts at `step`.

    Args:
      writer: for metrics and pictures.
      workdir: gets the pictures, as PNG, in a folder for each kind.
      step: where the run starts, or goes on.
      total_steps: where it ends.
      steps_per_epoch: to say in which epoch a step is.
      batch_size: global, to say how many images a step is.
    """
    self._writer = writer
    self._workdir = workdir
    self._total_steps = total_steps
    self._steps_per_epoch = steps_per_epoch
    self._batch_size = batch_size
    self._first_step = self._last_step = step
    self._start_time = self._last_time = None
    self._last_pictures = []

  def dispatched(self) -> None:
    """To be called after each dispatch; the first starts the clock."""
    if self._start_time is None:
      self._start_time = self._last_time = time.monotonic()

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """What is done within is not training; the device must be idle before."""
    start = time.monotonic()
    yield
    self._last_time += time.monotonic() - start

  def training(
    self, step: int, metrics: dict[str, float], learning_rate: float
  ) -> None:
    """Tells the means of the metrics since the last time, up to `step`."""
    now = time.monotonic()
    images = (step - self._last_step) * self._batch_size
    speed = images / max(now - self._last_time, 1e-9)
    self._last_step, self._last_time = step, now
    epoch = step / self._steps_per_epoch
    scalars = {f'train/{name}': value for name, value in metrics.items()}
    scalars |= {'learning_rate': learning_rate, 'images_per_second': speed}
    self._writer.write_scalars(step, {'epoch': epoch, **scalars})

    per_step = (now - self._start_time) / (step - self._first_step)
    left = duration((self._total_steps - step) * per_step)
    _progress_line(
      f'step {step:,}/{self._total_steps:,}  epoch {epoch:.2f}  '
      f'loss {metrics["loss"]:,.1f} nats  {speed:,.0f} images/s  {left} left'
    )

  def validation(
    self,
    step: int,
    metrics: dict[str, float],
    pictures: dict[str, np.ndarray],
  ) -> None:
    """Tells the metrics of the validation split, and shows pictures."""
    epoch = step // self._steps_per_epoch
    scalars = {f'val/{name}': value for name, value in metrics.items()}
    self._writer.write_scalars(step, {'epoch': epoch, **scalars})
    self._writer.write_images(step, pictures)
    self._last_pictures = []
    for name, picture in pictures.items():
      path = self._workdir / name / f'epoch_{epoch:04d}.png'
      figures.save_png(picture, path)
      self._last_pictures.append(path)
    _lasting_line(
      f'epoch {epoch}/{self._total_steps // self._steps_per_epoch}  '
      f'val: loss {metrics["loss"]:,.1f}  distortion '
      f'{metrics["distortion"]:,.1f}  kl {metrics["kl"]:.2f} nats  '
      f'mse {metrics["mse"]:.5f}'
    )

  def done(self, best_step: int | None) -> None:
    """Tells that the run is over, and where its results are."""
    seconds = time.monotonic() - self._start_time
    print(
      f'Trained steps {self._first_step + 1:,} to {self._total_steps:,} in '
      f'{duration(seconds)}.'
    )
    print(f'  best checkpoint by val/loss: step {best_step}')
    for path in self._last_pictures:
      print(f'  {path}')
    print(f'To measure it: python evaluate.py --workdir={self._workdir}')


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
  """Tells how far a pass over images is, and at its end how fast it was.

  Args:
    label: what is being done.
    total: number of images.

  Yields:
    To be called with the number of images done.
  """
  start = last_told = time.monotonic()

  def tell(done):
    nonlocal last_told
    now = time.monotonic()
    # What is not a terminal keeps every line.
    if sys.stdout.isatty() or now - last_told > _SECONDS_BETWEEN_LINES:
      last_told = now
      left = duration((now - start) / max(done, 1) * (total - done))
      _progress_line(f'{label}: {done:,} of {total:,} images, {left} left')

  yield tell
  seconds = time.monotonic() - start
  _lasting_line(
    f'{label}: {total:,} images in {duration(seconds)} '
    f'({total / max(seconds, 1e-9):,.3g} images/s)'
  )


def duration(seconds: float) -> str:
  """Such as 12s, 3m05s or 2h07m."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02}s'
  return f'{seconds // 3600}h{seconds % 3600 // 60:02}m'


def _progress_line(text: str) -> None:
  """In a terminal the next line will overwrite it."""
  if sys.stdout.isatty():
    width = shutil.get_terminal_size().columns - 1
    print(f'\r\033[K{text[:width]}', end='', flush=True)
  else:
    print(text, flush=True)


def _lasting_line(text: str) -> None:
  print(f'\r\033[K{text}' if sys.stdout.isatty() else text, flush=True)
