"""Progress and metrics of runs in training, and of long passes over images."""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import math
import shutil
import sys
import time
from typing import Literal

from etils import epath
import numpy as np

from vae import figures

# How a run ended. One that is stopped goes on with the same command.
Outcome = Literal['finished', 'stopped', 'failed']

# Between two lines of `track`, if the output is not a terminal.
_SECONDS_BETWEEN_LINES = 10


class Writer:
  """The base class of metric writers, which writes nothing."""

  # A local folder that is copied into the workdir, and gets the pictures.
  folder: epath.Path | None = None

  def rewind(self, step: int, validated: bool) -> None:
    """Drops the rows beyond a step, with its validation unless `validated`."""

  def flush(self) -> Callable[[], None]:
    """Returns a function that waits until the numbers are saved."""
    return lambda: None

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    """Writes numbers by name."""

  def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
    """Writes uint8 pictures [height, width, channels] by name."""

  def write_hparams(self, hparams: dict[str, object]) -> None:
    """Writes the settings of the run."""

  def close(self, outcome: Outcome = 'finished') -> None:
    """Waits until everything is written; trackers show how the run ended."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The steps at which a run is logged and validated, and ends.

  It is validated every `every_epochs` epochs and at its end. A row is logged
  every `log_every_steps` steps of an epoch, and at the epoch's end.
  """

  steps_per_epoch: int
  num_epochs: int
  every_epochs: int
  log_every_steps: int

  @property
  def total_steps(self) -> int:
    """The last step."""
    return self.steps_per_epoch * self.num_epochs

  def validates(self, step: int) -> bool:
    """Whether the state at a step is validated."""
    epoch, within_epoch = divmod(step, self.steps_per_epoch)
    is_due = epoch % self.every_epochs == 0 or step == self.total_steps
    return step > 0 and within_epoch == 0 and is_due

  def logs(self, step: int) -> bool:
    """Whether a row ends at a step."""
    return step % self.steps_per_epoch % self.log_every_steps == 0


class Progress:
  """Logs a run, or several that train together, to writers and the terminal.

  The clock starts with the first dispatch, when compilation is over. For the
  speed, though not for the time left, it stands still during validation.
  """

  def __init__(
    self,
    runs: Sequence[tuple[Writer, epath.Path]],
    schedule: Schedule,
    step: int,
    batch_size: int,
    learning_rates: Sequence[np.ndarray],
  ):
    """Starts at `step`; the `learning_rates` of each run are [num_epochs]."""
    self._writers, self._workdirs = zip(*runs, strict=True)
    self._schedule, self._batch_size = schedule, batch_size
    self._learning_rates = learning_rates
    self._first_step = self._step = self._last_step = step
    self._start_time = self._last_time = None
    # Values [num_runs, num_metrics] of each step since the last row.
    self._names, self._values = (), []
    self._runs = list(range(len(runs)))
    # Compressing pictures takes longer than many a dispatch.
    self._painter = futures.ThreadPoolExecutor(1, 'pictures')
    self._painting = None
    self._last_pictures = []
    self._has_skipped = False

  @contextlib.contextmanager
  def dispatching(self) -> Iterator[None]:
    """The context of each dispatch; the first one compiles."""
    if self._start_time is None:
      say('Compiling …')
    yield
    if self._start_time is None:
      self._start_time = self._last_time = time.monotonic()

  def training(self, metrics: dict[str, np.ndarray]) -> None:
    """Logs the means of each row that is complete.

    The metrics are of the steps since the last call, [num_runs, num_steps].
    """
    self._names = tuple(metrics)
    rows = []
    for values in np.stack(list(metrics.values()), axis=-1).swapaxes(0, 1):
      self._step += 1
      self._values.append(values)
      if self._schedule.logs(self._step):
        rows.append((self._step, self._means()))
    if not self._has_skipped and np.any(metrics.get('skipped', 0)):
      self._has_skipped = True
      warn(
        f'note: a step before {self._step + 1:,} was skipped, as its loss or '
        'gradient is not finite; train/skipped_steps counts such steps.'
      )
    self._write_rows(rows)

  def stopped(self) -> None:
    """Logs the steps since the last row, which ends before its time."""
    if self._values:
      self._write_rows([(self._step, self._means())])

  def _means(self) -> list[dict[str, float]]:
    """The means of each run since the last row, over steps not skipped."""
    # In double precision, one by one, so that how the steps were cut into
    # dispatches changes nothing.
    steps = np.array(self._values, np.float64)
    self._values = []
    means = []
    for values in steps.swapaxes(0, 1):
      row = {}
      if 'skipped' in self._names:
        skipped = values[:, self._names.index('skipped')] > 0
        values, row['skipped_steps'] = values[~skipped], int(skipped.sum())
      if len(values):
        found = zip(self._names, values.mean(axis=0).tolist(), strict=True)
        row = {name: mean for name, mean in found if name != 'skipped'} | row
      means.append(row)
    return means

  def _write_rows(self, rows: list[tuple[int, list[dict[str, float]]]]) -> None:
    if not rows or not self._runs:
      return
    now = time.monotonic()
    images = (self._step - self._last_step) * self._batch_size
    speed = images / max(now - self._last_time, 1e-9)
    self._last_step, self._last_time = self._step, now
    steps_per_epoch = self._schedule.steps_per_epoch
    for step, means in rows:
      for run in self._runs:
        rate = self._learning_rates[run][(step - 1) // steps_per_epoch]
        row = {f'train/{name}': value for name, value in means[run].items()}
        row = {'epoch': step / steps_per_epoch, **row}
        row |= {'learning_rate': float(rate), 'images_per_second': speed}
        self._writers[run].write_scalars(step, row)
    per_step = (now - self._start_time) / (self._step - self._first_step)
    total = self._schedule.total_steps
    losses = [means[run].get('loss', math.nan) for run in self._runs]
    _progress_line(
      f'step {step:,}/{total:,}  epoch {step / steps_per_epoch:.2f}  '
      f'loss {_span(losses, ",.1f")} nats  '
      f'{speed * len(self._runs):,.0f} images/s  '
      f'{duration((total - self._step) * per_step)} left'
    )

  def flush(self, run: int) -> Callable[[], None]:
    """Returns a function that waits until a run's metrics are saved."""
    return self._writers[run].flush()

  def drop(self, run: int) -> None:
    """Logs no more of a run."""
    self._runs.remove(run)

  def validation(self, step: int, metrics: dict[str, list[float]]) -> None:
    """Logs the metrics of the validation split, by name one of each run."""
    self._last_time = time.monotonic()
    if not self._runs:
      return
    epoch = step // self._schedule.steps_per_epoch
    for run in self._runs:
      scalars = {f'val/{name}': values[run] for name, values in metrics.items()}
      self._writers[run].write_scalars(step, {'epoch': epoch, **scalars})
    values = {k: [v[run] for run in self._runs] for k, v in metrics.items()}
    if not np.all(np.isfinite(values['loss'])):
      warn(
        f'warning: the validation loss at step {step:,} is not finite; its '
        'checkpoint counts as the worst.'
      )
    line = f'epoch {epoch}/{self._schedule.num_epochs}  val:'
    specs = {'loss': ',.1f', 'distortion': ',.1f', 'kl': '.2f nats'}
    for name, spec in (specs | {'mse': '.5f'}).items():
      if name in values:
        line += f' {name} {_span(values[name], spec)} '
    _lasting_line(line.rstrip())

  def pictures(
    self, step: int, draw: Callable[[], dict[str, np.ndarray]]
  ) -> None:
    """Writes pictures of the first run at a step, in the background.

    `draw` returns them by name, uint8 [height, width, channels].
    """
    self.finish_pictures()
    self._painting = self._painter.submit(self._paint, step, draw)

  def _paint(
    self, step: int, draw: Callable[[], dict[str, np.ndarray]]
  ) -> list[epath.Path]:
    epoch = step // self._schedule.steps_per_epoch
    pictures = draw()
    writer, workdir, paths = self._writers[0], self._workdirs[0], []
    writer.write_images(step, pictures)
    for name, picture in pictures.items():
      path = f'{name}/epoch_{epoch:04d}.png'
      try:
        figures.save_png(picture, (writer.folder or workdir) / path)
        paths.append(workdir / path)
      except OSError as error:
        warn(
          f'warning: {workdir / path} cannot be written '
          f'({error.strerror or error}); training goes on.'
        )
    return paths

  def finish_pictures(self) -> None:
    """Waits until the last pictures are written."""
    if self._painting is not None:
      painting, self._painting = self._painting, None
      self._last_pictures = painting.result()

  def done(self, best_step: int | None) -> None:
    """Prints the time, and where the results of a single run are."""
    # None if only a missing validation was run.
    start = self._start_time or time.monotonic()
    say(
      f'Trained steps {self._first_step + 1:,} to '
      f'{self._schedule.total_steps:,} in {duration(time.monotonic() - start)}.'
    )
    if len(self._workdirs) == 1:
      say(f'  best checkpoint by val/loss: step {best_step}')
      for path in self._last_pictures:
        say(f'  {path}')
      say(f'To measure it: python evaluate.py --workdir={self._workdirs[0]}')


@contextlib.contextmanager
def track(label: str, total: int) -> Iterator[Callable[[int], None]]:
  """Prints the progress of a pass over images, and at its end its speed.

  Yields a function of the number of images done.
  """
  start = last_line = time.monotonic()
  if sys.stdout.isatty():
    _progress_line(f'{label}: compiling …')

  def update(done):
    nonlocal last_line
    now = time.monotonic()
    if sys.stdout.isatty() or now - last_line > _SECONDS_BETWEEN_LINES:
      last_line = now
      left = duration((now - start) / max(done, 1) * (total - done))
      _progress_line(f'{label}: {done:,} of {total:,} images, {left} left')

  yield update
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


def _span(values: Sequence[float], spec: str) -> str:
  """Such as 3.2 nats, and of several 3.2…4.8 nats."""
  spec, _, unit = spec.partition(' ')
  least, most = format(min(values), spec), format(max(values), spec)
  return f'{least if least == most else f"{least}…{most}"} {unit}'.rstrip()


def say(text: str, end: str = '\n') -> None:
  """Prints; a reader that has gone, or a full disk, ends no training."""
  with contextlib.suppress(OSError):
    print(text, end=end, flush=True)


def warn(text: str) -> None:
  """Prints a line on standard error."""
  start = '\r\033[K' if sys.stderr.isatty() else ''
  with contextlib.suppress(OSError):
    print(f'{start}{text}', file=sys.stderr, flush=True)


def _progress_line(text: str) -> None:
  """Prints a line that the next one overwrites, in a terminal."""
  if sys.stdout.isatty():
    width = shutil.get_terminal_size().columns - 1
    say(f'\r\033[K{text[:width]}', end='')
  else:
    say(text)


def _lasting_line(text: str) -> None:
  say(f'\r\033[K{text}' if sys.stdout.isatty() else text)
