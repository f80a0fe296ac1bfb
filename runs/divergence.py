"""Runs whose loss, gradient or parameters are not finite."""

import jax
import ml_collections
import numpy as np

from vae import steps
from vae.checkpoints import Checkpoints
from vae.errors import UserError

# Steps in a row that may be skipped.
_MAX_SKIPPED = 100


class Divergence:
  """The runs that have diverged; `errors` has the error of each, else None."""

  def __init__(self, num_runs: int):
    self.errors: list[UserError | None] = [None] * num_runs
    # The first step of each such run that is not finite, and the steps in a row
    # that each run skipped.
    self._since = [0] * num_runs
    self._skipped = np.zeros(num_runs, int)

  def running(self) -> list[int]:
    """The runs that have not diverged."""
    return [run for run, error in enumerate(self.errors) if error is None]

  def check_steps(
    self, first_step: int, metrics: dict[str, np.ndarray]
  ) -> list[int]:
    """Checks the metrics [num_runs, num_steps] of the steps after a first one.

    Returns:
      The runs with a finite step, before any at which they diverged.
    """
    losses, norms = metrics['loss'], metrics['grad_norm']
    finite = np.isfinite(losses) & np.isfinite(norms)
    max_skipped = _MAX_SKIPPED if 'skipped' in metrics else 1
    good = []
    for run in self.running():
      end = finite.shape[1]
      for index in range(end):
        self._skipped[run] = 0 if finite[run, index] else self._skipped[run] + 1
        if self._skipped[run] == max_skipped:
          end, step = index, first_step + index + 1
          reason = f'loss is {losses[run, index]}'
          reason += f' and grad_norm is {norms[run, index]}'
          if max_skipped > 1:
            reason += f', and {max_skipped} steps in a row were skipped'
          self._end(run, step, reason, since=step + 1 - max_skipped)
          break
      if np.any(finite[run, :end]):
        good.append(run)
    return good

  def check_states(self, states: list[steps.TrainState], step: int) -> None:
    """Checks the states of all runs after their last step."""
    for run in self.running():
      if not is_finite(states[run]):
        reason = 'its update made parameters that are not finite'
        self._end(run, step, reason, since=step + 1)

  def _end(self, run: int, step: int, reason: str, since: int) -> None:
    self.errors[run] = UserError(f'diverged at step {step:,}: {reason}.')
    self._since[run] = since

  def errors_with_advice(
    self, saved: list[Checkpoints], config: ml_collections.ConfigDict
  ) -> list[UserError | None]:
    """The errors, with the checkpoints of the runs and what to try."""
    advice = (
      'The same command would end there again: try a lower '
      'config.optimizer.learning_rate, or a limit to the gradient, '
      'config.optimizer.clip_norm'
    )
    if config.train.on_nonfinite != 'skip':
      advice += ', or leave such steps out with config.train.on_nonfinite=skip'
    errors: list[UserError | None] = []
    for run, error in enumerate(self.errors):
      if error is not None:
        folder, left = saved[run].directory, 'There is no good checkpoint yet.'
        all_steps = saved[run].all_steps()
        # That of the step before, if the run was stopped there, led to this.
        good = [step for step in all_steps if step < self._since[run] - 1]
        if good:
          left = f'The last good checkpoint is {folder / str(good[-1])}.'
        for step in all_steps[len(good) :]:
          left += f' Delete {folder / str(step)}, which led to this.'
        error = UserError(f'{error} {left} {advice}.')
      errors.append(error)
    return errors


def is_finite(state: steps.TrainState) -> bool:
  """Whether all numbers of a state's model are; waits for the devices."""
  variables = jax.device_get(jax.tree.leaves(state.variables))
  return all(np.all(np.isfinite(array)) for array in variables)
