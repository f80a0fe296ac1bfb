"""Checkpoints of a run: the last one, and the best by validation loss.

Orbax writes them asynchronously and atomically: a step's folder has its final
name only when all of it is on disk.
"""

from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vae.errors import UserError
from vae.training import TrainState

DIRECTORY = 'checkpoints'
METRIC = 'val/loss'


class Checkpoints:
  """The checkpoints in `workdir/checkpoints`; a context manager.

  On leaving the context, what is being written is written to its end.
  """

  def __init__(self, workdir: epath.PathLike, keep_best: int = 2):
    """Opens the folder, and clears away what a killed process left half done.

    Args:
      workdir: of the run.
      keep_best: how many to keep by validation loss, besides the last.
    """
    self._directory = epath.Path(workdir).resolve() / DIRECTORY
    policy = preservation_policy.AnyPreservationPolicy(
      [
        preservation_policy.LatestN(n=1),
        preservation_policy.BestN(
          get_metric_fn=lambda metrics: metrics[METRIC],
          reverse=True,
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    )
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics[METRIC],
        best_mode='min',
        preservation_policy=policy,
        cleanup_tmp_directories=True,
      ),
    )

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

  def save(
    self, step: int, state: TrainState, metrics: dict[str, float] | None = None
  ) -> None:
    """Starts to write a checkpoint; returns once `state` may be donated.

    Args:
      step: the state's.
      state: to be saved.
      metrics: of a validation of this very state; without them a checkpoint
        is kept only until the next.
    """
    self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

  def restore(self, state: TrainState, step: int | None = None) -> TrainState:
    """The state saved at `step`, by default the last.

    Args:
      state: says shapes, dtypes and on which devices the result is to lie.
      step: which checkpoint.

    Raises:
      UserError: if there is none, or its shapes are not those of `state`.
    """
    step = self.latest_step() if step is None else step
    if step is None:
      raise UserError(f'{self._directory} holds no complete checkpoint.')
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
      return self._manager.restore(step, args=ocp.args.StandardRestore(target))
    except (ValueError, KeyError, OSError) as error:
      reason = str(error).strip().split('\n')[0]
      raise UserError(
        f'checkpoint {self._directory / str(step)} cannot be restored: {reason}'
      ) from error
