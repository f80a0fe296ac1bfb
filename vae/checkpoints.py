"""Checkpoints of a run: the last one, and the best by validation loss.

Orbax writes them asynchronously and atomically: a step's folder has its final
name only when all of it is on disk.
"""

import math

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vae import devices
from vae.errors import UserError
from vae.training import TrainState

DIRECTORY = 'checkpoints'
METRIC = 'val/loss'


def _loss(metrics: dict[str, float]) -> float:
  """What checkpoints are ranked by; none, or no number, is the worst."""
  loss = metrics.get(METRIC, math.inf)
  return loss if math.isfinite(loss) else math.inf


def exist(workdir: epath.Path) -> bool:
  """Whether a workdir holds a complete checkpoint."""
  return latest_step(workdir) is not None


def latest_step(workdir: epath.Path) -> int | None:
  """The step of a workdir's last complete checkpoint, None without any."""
  directory = workdir / DIRECTORY
  if not directory.exists():
    return None
  names = [path.name for path in directory.iterdir()]
  return max((int(name) for name in names if name.isdigit()), default=None)


def open_to_read(workdir: epath.PathLike) -> 'Checkpoints':
  """The checkpoints of a run that may still be training; changes nothing.

  Raises:
    UserError: if there are none.
  """
  if not exist(epath.Path(workdir)):
    raise UserError(
      f'{epath.Path(workdir) / DIRECTORY} holds no complete checkpoint; the '
      'run writes its first when it is validated.'
    )
  return Checkpoints(workdir, read_only=True)


class Checkpoints:
  """The checkpoints in `workdir/checkpoints`; a context manager.

  On leaving the context, what is being written is written to its end.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    keep_best: int = 2,
    read_only: bool = False,
  ):
    """Opens the folder, and clears away what a killed process left half done.

    Args:
      workdir: of the run.
      keep_best: how many to keep by validation loss, besides the last.
      read_only: leaves all as it is; use `open_to_read`.
    """
    self._directory = epath.Path(workdir).resolve() / DIRECTORY
    policy = preservation_policy.AnyPreservationPolicy(
      [
        preservation_policy.LatestN(n=1),
        preservation_policy.BestN(
          get_metric_fn=_loss,
          reverse=True,
          n=keep_best,
        ),
      ]
    )
    try:
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          best_fn=_loss,
          best_mode='min',
          preservation_policy=policy,
          # Orbax's own `read_only` says so in a warning each time.
          create=not read_only,
          cleanup_tmp_directories=not read_only,
        ),
      )
    except ValueError as error:
      raise UserError(
        f'{self._directory}: the metrics of a checkpoint are damaged '
        f'({_first_line(error)}); delete its folder to use the others.'
      ) from error

  def __enter__(self):
    return self

  def __exit__(self, *unused_args):
    self._manager.close()

  def latest_step(self) -> int | None:
    """The step of the last checkpoint, or None where there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step of the checkpoint of least validation loss, or None."""
    return self._manager.best_step()

  def all_steps(self) -> list[int]:
    """The steps of all the checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def find(self, checkpoint: str | int) -> int:
    """The step that `best`, `last` or a number means.

    Raises:
      UserError: if there is no such checkpoint.
    """
    if checkpoint == 'best':
      # A run that has not been validated yet has no best.
      return self.best_step() or self.latest_step()
    if checkpoint == 'last':
      return self.latest_step()
    steps = self.all_steps()
    if not str(checkpoint).isdigit() or int(checkpoint) not in steps:
      raise UserError(
        f'{self._directory} has no checkpoint {checkpoint}; there are best, '
        f'last, {", ".join(map(str, steps))}.'
      )
    return int(checkpoint)

  def save(
    self, step: int, state: TrainState, metrics: dict[str, float] | None = None
  ) -> None:
    """Starts to write a checkpoint; returns once `state` may be donated.

    Args:
      step: the state's.
      state: to be saved.
      metrics: of a validation of this very state; a checkpoint without them
        gives way to any that has them.
    """
    if jax.process_count() > 1:
      # pmap returns arrays of this process's devices; Orbax wants to be told
      # that all processes hold the same.
      state = jax.tree.map(
        ocp.utils.fully_replicated_host_local_array_to_global_array, state
      )
    self._manager.save(
      step, args=ocp.args.StandardSave(state), metrics=metrics or {}
    )

  def restore(self, state: TrainState, step: int | None = None) -> TrainState:
    """The state saved at `step`, by default the last.

    Args:
      state: says shapes and dtypes. On how many devices the checkpoint was
        written does not matter; the result is on all that there are now.
      step: which checkpoint.

    Raises:
      UserError: if there is none, or it is damaged, or its shapes are not
        those of `state`.
    """
    step = self.latest_step() if step is None else step
    if step is None:
      raise UserError(f'{self._directory} holds no complete checkpoint.')
    target = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), state)
    try:
      restored = self._manager.restore(
        step, args=ocp.args.StandardRestore(target)
      )
      for (path, wanted), found in zip(
        jax.tree.leaves_with_path(target),
        jax.tree.leaves(restored),
        strict=True,
      ):
        if wanted.shape != found.shape:
          raise ValueError(
            f'{jax.tree_util.keystr(path)} has the shape {found.shape}, and '
            f'the config asks for {wanted.shape}.'
          )
    except (ValueError, KeyError, OSError) as error:
      others = [str(other) for other in self.all_steps() if other != step]
      raise UserError(
        f'checkpoint {self._directory / str(step)} cannot be restored: '
        f'{_first_line(error)} Others: {", ".join(others) or "none"}.'
      ) from error
    return devices.replicate(restored)


def _first_line(error: Exception) -> str:
  """What an error says first; TensorStore goes on with all its settings."""
  line = str(error).strip().split('\n')[0]
  return line if len(line) < 200 else line[:200] + ' …'
