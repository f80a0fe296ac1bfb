"""What is told of a run while it trains, and of any long pass: progress."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import contextlib
import math
import shutil
import sys
import threading
import time
from typing import Protocol

from etils import epath
import numpy as np

from vae import figures

# Of `track`, where the output is no terminal.
_SECONDS_BETWEEN_LINES = 10

# After which `track` says that its first batch is being compiled.
_SECONDS_IN_SILENCE = 2


class Writer(Protocol):
  """Takes the metrics; `metric_writer.MetricWriter` is one.

  Attributes:
    folder: a local folder that is copied into the workdir, which gets the
      pictures; None if they go to the workdir itself.
  """

  folder: epath.Path | None

  def rewind(self, step: int, validated: bool) -> None:
    """Forgets what was written beyond `step`.

    Args:
      step: where the run goes on.
      validated: whether the metrics of that step's validation are kept, too.
    """

  def flush(self) -> Callable[[], None]:
    """Returns a function that waits until the numbers are saved."""

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    """Takes numbers by name."""

  def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
    """Takes uint8 pictures [height, width, channels] by name."""

  def write_hparams(self, hparams: dict[str, object]) -> None:
    """Takes the settings of the run."""


class NullWriter:
  """Takes metrics and does nothing with them."""

  folder = None

  def rewind(self, step, validated):
    """See `Writer`."""

  def flush(self):
    """See `Writer`."""
    return lambda: None

  def write_scalars(self, step, scalars):
    """See `Writer`."""

  def write_images(self, step, images):
    """See `Writer`."""

  def write_hparams(self, hparams):
    """See `Writer`."""

  def close(self):
    """Nothing to wait for."""


class Report:
  """Tells of a run, to a writer, in the workdir and in the terminal.

  Or of several that are trained together. Its clock starts with the first
  dispatch, when compilation is over. For the speed, though not for the time
  left, it stands still during validation.
  """

  def __init__(
    self,
    runs: Sequence[tuple[Writer, epath.Path]],
    *,
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    batch_size: int,
    log_every_steps: int,
    learning_rates: Sequence[np.ndarray],
    untold: Sequence[Mapping[str, list[float]]] = (),
  ):
    """Starts at `step`.

    Args:
      runs: of each the writer of its metrics and pictures, and its workdir,
        which gets the pictures, as PNG, in a folder for each kind.
      step: where the runs start, or go on.
      total_steps: where they end.
      steps_per_epoch: to say in which epoch a step is.
      batch_size: global, to say how many images a step is.
      log_every_steps: metrics are told at multiples of this within an epoch,
        and at its end.
      learning_rates: of each run, of each epoch.
      untold: of each run, metrics of the last steps before `step`, as the
        method `untold` gave them to a checkpoint.
    """
    self._writers = [writer for writer, _ in runs]
    self._workdirs = [workdir for _, workdir in runs]
    self._total_steps = total_steps
    self._steps_per_epoch = steps_per_epoch
    self._batch_size = batch_size
    self._log_every_steps = log_every_steps
    self._learning_rates = learning_rates
    self._first_step = self._step = self._last_step = step
    self._start_time = self._last_time = None
    # Rows of metrics by run, [num_runs, num_metrics], of each step.
    self._names, self._untold = (), []
    if untold and untold[0]:
      self._names = tuple(untold[0])
      by_run = [[one[name] for name in self._names] for one in untold]
      self._untold = list(np.array(by_run, np.float64).transpose(2, 0, 1))
    # Those that are told of, and whether one had to leave a step out.
    self._told, self._has_skipped = list(range(len(runs))), False
    # Compressing pictures takes longer than many a dispatch.
    self._painter = futures.ThreadPoolExecutor(1, 'pictures')
    self._painting = None
    self._last_pictures = []

  def dispatching(self) -> None:
    """To be called before each dispatch; the first compiles."""
    if self._start_time is None:
      say('Compiling …')

  def dispatched(self) -> None:
    """To be called after each dispatch; the first starts the clock."""
    if self._start_time is None:
      self._start_time = self._last_time = time.monotonic()

  def training(self, metrics: dict[str, np.ndarray]) -> None:
    """Tells the means of the metrics since the last time.

    Args:
      metrics: of the steps that were made since the last call, [num_runs,
        num_steps].
    """
    self._match_untold(tuple(metrics))
    rows = []
    for values in np.stack(list(metrics.values()), axis=-1).swapaxes(0, 1):
      self._step += 1
      self._untold.append(values)
      if self.is_told(self._step):
        # In double precision, one by one, so that how the steps were cut into
        # dispatches changes nothing.
        steps = np.array(self._untold, np.float64)
        rows.append(
          (self._step, [self._means(run) for run in steps.swapaxes(0, 1)])
        )
        self._untold = []
    self._tell_of_skipping(metrics)
    if not rows:
      return
    now = time.monotonic()
    images = (self._step - self._last_step) * self._batch_size
    speed = images / max(now - self._last_time, 1e-9)
    self._last_step, self._last_time = self._step, now
    for step, means in rows:
      epoch = step / self._steps_per_epoch
      for run in self._told:
        rate = float(
          self._learning_rates[run][(step - 1) // self._steps_per_epoch]
        )
        facts = {'learning_rate': rate, 'images_per_second': speed}
        scalars = {f'train/{name}': value for name, value in means[run].items()}
        self._writers[run].write_scalars(
          step, {'epoch': epoch, **scalars, **facts}
        )
    if not self._told:
      return

    per_step = (now - self._start_time) / (self._step - self._first_step)
    left = duration((self._total_steps - self._step) * per_step)
    losses = [means[run].get('loss', math.nan) for run in self._told]
    _progress_line(
      f'step {step:,}/{self._total_steps:,}  epoch {epoch:.2f}  '
      f'loss {_span(losses, ",.1f")} nats  '
      f'{speed * len(self._told):,.0f} images/s  {left} left'
    )

  def _match_untold(self, names: tuple[str, ...]) -> None:
    """Has the untold rows, which may be another program's, in this order."""
    if names == self._names:
      return
    columns = {name: index for index, name in enumerate(self._names)}
    self._untold = [
      np.stack(
        [
          row[:, columns[name]] if name in columns else np.zeros(len(row))
          for name in names
        ],
        axis=-1,
      )
      for row in self._untold
    ]
    self._names = names

  def _means(self, steps: np.ndarray) -> dict[str, float]:
    """Of a run's steps, [num_steps, num_metrics], that were not skipped."""
    if 'skipped' not in self._names:
      return dict(zip(self._names, steps.mean(axis=0).tolist(), strict=True))
    skipped = steps[:, self._names.index('skipped')] > 0
    means = {'skipped_steps': int(skipped.sum())}
    if not skipped.all():
      values = steps[~skipped].mean(axis=0).tolist()
      means = dict(zip(self._names, values, strict=True)) | means
      del means['skipped']
    return means

  def _tell_of_skipping(self, metrics: Mapping[str, np.ndarray]) -> None:
    if not self._has_skipped and np.any(metrics.get('skipped', 0)):
      self._has_skipped = True
      _, index = np.argwhere(metrics['skipped'])[0]
      step = self._step - metrics['skipped'].shape[1] + index + 1
      warn(
        f'note: step {step:,} was skipped, as its loss or gradient is not '
        'finite; train/skipped_steps counts such steps.'
      )

  def untold(self, run: int) -> dict[str, list[float]]:
    """A run's metrics that no row tells of yet, by name, of each step."""
    return {
      name: [float(row[run, index]) for row in self._untold]
      for index, name in enumerate(self._names)
      if self._untold
    }

  def flush(self, run: int) -> Callable[[], None]:
    """Returns a function that waits until a run's metrics are saved.

    They have to be before a checkpoint that counts on them.
    """
    return self._writers[run].flush()

  def drop(self, run: int) -> None:
    """Tells no more of a run."""
    self._told.remove(run)

  def is_told(self, step: int) -> bool:
    """Whether the metrics up to a step are told, and none is left over."""
    within_epoch = step % self._steps_per_epoch
    return within_epoch % self._log_every_steps == 0

  def validation(self, step: int, metrics: dict[str, list[float]]) -> None:
    """Tells the metrics of the validation split, of the states at `step`.

    Args:
      step: of the states.
      metrics: by name, one for each run.
    """
    self._last_time = time.monotonic()
    epoch = step // self._steps_per_epoch
    metrics = {
      name: [values[run] for run in self._told]
      for name, values in metrics.items()
    }
    for index, run in enumerate(self._told):
      scalars = {
        f'val/{name}': values[index] for name, values in metrics.items()
      }
      self._writers[run].write_scalars(step, {'epoch': epoch, **scalars})
    if not self._told:
      return
    if not np.all(np.isfinite(metrics['loss'])):
      warn(
        f'warning: the validation loss at step {step:,} is not finite; its '
        'checkpoint counts as the worst.'
      )
    _lasting_line(
      f'epoch {epoch}/{self._total_steps // self._steps_per_epoch}  '
      f'val: loss {_span(metrics["loss"], ",.1f")}  distortion '
      f'{_span(metrics["distortion"], ",.1f")}  kl '
      f'{_span(metrics["kl"], ".2f")} nats  mse {_span(metrics["mse"], ".5f")}'
    )

  def pictures(
    self, step: int, draw: Callable[[], dict[str, np.ndarray]]
  ) -> None:
    """Shows pictures of the first run, in the background.

    Args:
      step: of the state that they show.
      draw: returns them by name, uint8 [height, width, channels].
    """
    self.finish_pictures()
    self._painting = self._painter.submit(self._paint, step, draw)

  def _paint(
    self, step: int, draw: Callable[[], dict[str, np.ndarray]]
  ) -> list[epath.Path]:
    epoch = step // self._steps_per_epoch
    pictures = draw()
    self._writers[0].write_images(step, pictures)
    paths, workdir = [], self._workdirs[0]
    for name, picture in pictures.items():
      path = f'{name}/epoch_{epoch:04d}.png'
      try:
        folder = self._writers[0].folder or workdir
        figures.save_png(picture, folder / path)
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
    """Tells that training is over, and where its results are.

    Args:
      best_step: of the first run.
    """
    self.finish_pictures()
    # None where there was but a validation to be made good.
    start = self._start_time or time.monotonic()
    seconds = time.monotonic() - start
    say(
      f'Trained steps {self._first_step + 1:,} to {self._total_steps:,} in '
      f'{duration(seconds)}.'
    )
    if len(self._workdirs) > 1:
      return
    say(f'  best checkpoint by val/loss: step {best_step}')
    for path in self._last_pictures:
      say(f'  {path}')
    say(f'To measure it: python evaluate.py --workdir={self._workdirs[0]}')


@contextlib.contextmanager
def track(label: str, total: int) -> Iterator[Callable[[int], None]]:
  """Tells how far a pass over images is, and at its end how fast it was.

  Args:
    label: what is being done.
    total: number of images.

  Yields:
    To be called with the number of images done.
  """
  start = last_told = time.monotonic()
  compiling = threading.Timer(
    _SECONDS_IN_SILENCE, _progress_line, (f'{label}: compiling …',)
  )
  compiling.daemon = True

  def tell(done):
    nonlocal last_told
    compiling.cancel()
    now = time.monotonic()
    # What is not a terminal keeps every line.
    if sys.stdout.isatty() or now - last_told > _SECONDS_BETWEEN_LINES:
      last_told = now
      left = duration((now - start) / max(done, 1) * (total - done))
      _progress_line(f'{label}: {done:,} of {total:,} images, {left} left')

  compiling.start()
  try:
    yield tell
  finally:
    compiling.cancel()
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
  """Such as 3.2, and of several 3.2…4.8."""
  least, most = format(min(values), spec), format(max(values), spec)
  return least if least == most else f'{least}…{most}'


def say(text: str, end: str = '\n') -> None:
  """Prints; what goes on does not end where nobody can read it.

  The reader may have gone, or the disk that holds the log be full.
  """
  with contextlib.suppress(OSError):
    print(text, end=end, flush=True)


def warn(text: str) -> None:
  """Says on standard error what needs the user's eye."""
  start = '\r\033[K' if sys.stderr.isatty() else ''
  with contextlib.suppress(OSError):
    print(f'{start}{text}', file=sys.stderr, flush=True)


def _progress_line(text: str) -> None:
  """In a terminal the next line will overwrite it."""
  if sys.stdout.isatty():
    width = shutil.get_terminal_size().columns - 1
    say(f'\r\033[K{text[:width]}', end='')
  else:
    say(text)


def _lasting_line(text: str) -> None:
  say(f'\r\033[K{text}' if sys.stdout.isatty() else text)
