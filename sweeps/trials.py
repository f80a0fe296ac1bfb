"""What a sweep keeps in Optuna's trials, and how it reads that."""

import optuna
from optuna.trial import TrialState

from sweeps import variation
from sweeps.points import Range
from sweeps.points import Values
from sweeps.results import Result


def result(name: str, trial: optuna.trial.FrozenTrial) -> Result:
  """What is known of a point of this name by its trial."""
  is_over = trial.state not in (TrialState.RUNNING, TrialState.WAITING)
  attrs = trial.user_attrs if is_over else {}
  state = trial.state.name.lower()
  return Result(
    name,
    values(trial),
    'failed' if trial.state == TrialState.FAIL else state,
    **attrs.get('result', {}),
    error=attrs.get('error', ''),
  )


def is_void(trial: optuna.trial.FrozenTrial) -> bool:
  """Whether it failed without saying anything of its point."""
  attrs = trial.user_attrs
  return (
    trial.state == TrialState.FAIL and 'void' in attrs and 'error' not in attrs
  )


def suggest(
  trial: optuna.Trial, key: str, choices: list[object] | Range
) -> object:
  """A value of a setting that the sampler chooses, and the trial remembers."""
  if isinstance(choices, Range):
    suggest = (
      trial.suggest_int if isinstance(choices.low, int) else trial.suggest_float
    )
    return suggest(key, choices.low, choices.high, log=choices.log)
  texts = {plain(choice): choice for choice in choices}
  return texts[trial.suggest_categorical(key, list(texts))]


def plain(value: object) -> object:
  """As Optuna has it, which knows no tuples."""
  return variation.text(value) if isinstance(value, (tuple, list)) else value


def values(trial: optuna.trial.FrozenTrial) -> Values:
  """The settings of its point."""
  return {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in trial.user_attrs['values'].items()
  }
