"""What the loop trains: a run, or several together."""

import abc
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import jax
import numpy as np

from vae import splits
from vae import training
from vae.checkpoints import Checkpoints


class Trainer(abc.ABC):
  """A state in training, and how batches go through it.

  What the devices are sent and return is laid out as a subclass has it.

  Attributes:
    num_runs: that are trained.
    batches_per_step: how many the devices are sent for a step.
    per_device_batch_size: images of a batch that a device has at a time.
    num_parameters: of all models together.
    step: how many updates were dispatched.
    is_validated: whether the state that was restored had been validated.
  """

  num_runs: int
  batches_per_step: int
  per_device_batch_size: int
  num_parameters: int

  def __init__(
    self,
    data: splits.DataSet,
    settings: training.Settings,
    train_key: jax.Array,
    eval_key: jax.Array,
    train_steps: Callable[..., tuple[training.TrainState, training.Metrics]],
    eval_steps: Callable[..., training.Metrics],
  ):
    """Takes the data, the compiled functions, and what these are given."""
    self._data, self._settings = data, settings
    self._train_key, self._eval_key = train_key, eval_key
    self._train_steps, self._eval_steps = train_steps, eval_steps
    self._state: training.TrainState | None = None
    self.step, self.is_validated = 0, False

  @abc.abstractmethod
  def restore(self, saved: Sequence[Checkpoints]) -> None:
    """Goes on from the last checkpoint of each run, if there are any."""

  @abc.abstractmethod
  def train_chunks(
    self, epoch: int, first_step: int, max_steps: int
  ) -> Iterator[splits.Chunk]:
    """What is left of an epoch, several steps at a time."""

  @abc.abstractmethod
  def eval_chunks(self, max_batches: int) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split, and where in it each chunk begins."""

  @abc.abstractmethod
  def by_run(self, metrics: training.Metrics) -> dict[str, np.ndarray]:
    """Waits for what `train` or `evaluate` returned, [num_runs, max_steps]."""

  @abc.abstractmethod
  def states(self, snapshot: training.TrainState) -> list[training.TrainState]:
    """Each run's state in a snapshot, as a checkpoint takes it."""

  @abc.abstractmethod
  def draw(
    self, originals: np.ndarray, columns: int
  ) -> Callable[[], dict[str, np.ndarray]] | None:
    """Sets pictures going; None where none are drawn."""

  def train(self, chunk: splits.Chunk) -> training.Metrics:
    """Sets the steps of a chunk going.

    Returns:
      Metrics of each, [..., max_steps], still being computed.
    """
    self._state, metrics = self._train_steps(
      self._state,
      self._settings,
      self._train_key,
      splits.stored_images(self._data.train),
      chunk.batches,
      chunk.num_batches,
    )
    self.step += chunk.num_batches
    return metrics

  def evaluate(self, chunk: splits.Chunk, start: int) -> training.Metrics:
    """Sets the evaluation of a chunk of the validation split going.

    Returns:
      Sums of the metrics over each batch, [..., max_batches], still being
      computed.
    """
    return self._eval_steps(
      self._state.variables,
      self._settings,
      self._eval_key,
      splits.stored_images(self._data.validation),
      chunk.batches,
      chunk.num_batches,
      start,
      self._data.validation.num_examples,
    )

  def snapshot(self) -> training.TrainState:
    """A copy of the state on the devices, that outlives the next steps."""
    return training.snapshot(self._state)
