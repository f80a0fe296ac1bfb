"""What a person sees of a run in the terminal."""

import sys
import time


class Progress:
  """A line that is overwritten in a terminal, or a few lines in a log.

  The clock starts with the first dispatch, when compilation is over, and
  stands still for the speed, not for the time left, while something else than
  training goes on.
  """

  def __init__(self, step: int, total_steps: int, images_per_step: int):
    """Starts at `step` of `total_steps`, each of so many images."""
    self._total_steps = total_steps
    self._images_per_step = images_per_step
    self._first_step = step
    self._start = None
    self._marked_step = step
    self._marked_time = None
    self._in_terminal = sys.stdout.isatty()

  def dispatched(self) -> None:
    """To be told after each dispatch; the first starts the clock."""
    if self._start is None:
      self._start = self._marked_time = time.monotonic()

  def skip(self, seconds: float) -> None:
    """Leaves out `seconds` that were not spent on training."""
    self._marked_time += seconds

  def images_per_second(self, step: int) -> float:
    """Training speed since this was last asked for; `step` must be done."""
    now = time.monotonic()
    seconds = max(now - self._marked_time, 1e-9)
    speed = (step - self._marked_step) * self._images_per_step / seconds
    self._marked_step, self._marked_time = step, now
    return speed

  def show(self, step: int, text: str) -> None:
    """Shows where the run stands and when it will be done."""
    per_step = (time.monotonic() - self._start) / (step - self._first_step)
    left = _duration((self._total_steps - step) * per_step)
    line = f'step {step}/{self._total_steps}  {text}  {left} left'
    if self._in_terminal:
      print(f'\r\033[K{line}', end='', flush=True)
    else:
      print(line, flush=True)

  def line(self, text: str) -> None:
    """A line that stays."""
    print(f'\r\033[K{text}' if self._in_terminal else text, flush=True)


def _duration(seconds: float) -> str:
  """Such as 12s, 3m05s or 2h07m."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02}s'
  return f'{seconds // 3600}h{seconds % 3600 // 60:02}m'
