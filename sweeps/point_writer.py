"""How a sweep sees how the run of a point is going."""

from runs import progress
from sweeps.study import Claim
from sweeps.study import Study


class PointWriter:
  """A run's writer; what it raises ends the run."""

  def __init__(self, writer: progress.Writer, study: Study, claim: Claim):
    """Takes the writer that is to have all, and what to ask and to tell."""
    self._writer, self._study, self._claim = writer, study, claim
    self.folder = writer.folder

  def rewind(self, step, validated):
    """See `reports.Writer`."""
    self._writer.rewind(step, validated)

  def flush(self):
    """See `reports.Writer`; a checkpoint is written next.

    Raises:
      PointLostError: as `write_scalars`.
    """
    self._study.check(self._claim)
    return self._writer.flush()

  def write_scalars(self, step, scalars):
    """See `reports.Writer`.

    Raises:
      PointLostError: if the point is another worker's by now.
      optuna.TrialPruned: if it is not worth going on.
    """
    self._study.check(self._claim)
    self._writer.write_scalars(step, scalars)
    if 'val/loss' in scalars:
      self._study.report(self._claim, scalars)

  def write_images(self, step, images):
    """See `reports.Writer`."""
    self._writer.write_images(step, images)

  def write_hparams(self, hparams):
    """See `reports.Writer`."""
    self._writer.write_hparams(hparams)
