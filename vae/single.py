"""One run, whose batches are split over all devices of all processes."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import jax
import numpy as np

from vae import devices
from vae import figures
from vae import model as models
from vae import splits
from vae import training
from vae.checkpoints import Checkpoints


class SingleRun:
  """A run in training: its state, and how a batch goes through it.

  Attributes:
    num_runs: 1.
    batches_per_step: 1, that all devices together are sent.
    step: how many updates were dispatched.
    num_parameters: of the model.
  """

  num_runs = 1
  batches_per_step = 1

  def __init__(self, config, data: splits.DataSet):
    """Compiles nothing yet, and makes the state before the first step.

    Args:
      config: complete and valid.
      data: its train and validation splits are used.
    """
    self._config, self._data = config, data
    self._topology = devices.current()
    self._model = models.from_config(config, axis_name=devices.AXIS)
    steps_per_epoch = data.train.num_examples // config.train.batch_size
    optimizer = training.optimizer_from_config(config, steps_per_epoch)
    self._settings = training.settings_from_config(config, self._model)
    self._train_steps = training.make_train_steps(
      self._model, optimizer, config.train.flip
    )
    self._eval_steps = training.make_eval_steps(self._model)
    self._state = training.create_state(self._model, optimizer, config.seed)
    self.step = 0
    self.num_parameters = training.num_parameters(self._state)

  def restore(self, saved: Sequence[Checkpoints]) -> None:
    """Goes on from the last checkpoint, if there is one."""
    (saved,) = saved
    if saved.latest_step() is not None:
      self._state = saved.restore(self._state)
      self.step = int(self._state.step)

  def train_chunks(
    self, epoch: int, first_step: int, max_steps: int
  ) -> Iterator[splits.Chunk]:
    """What is left of an epoch; as `splits.train_chunks`."""
    return splits.train_chunks(
      self._data.train,
      self._config.seed,
      epoch,
      first_step,
      self._config.train.batch_size,
      max_steps,
      self._topology,
    )

  def train(self, chunk: splits.Chunk) -> training.Metrics:
    """Sets the steps of a chunk going.

    Returns:
      Metrics of each, [max_steps], still being computed.
    """
    self._state, metrics = self._train_steps(
      self._state,
      self._settings,
      training.train_key(self._config.seed),
      splits.stored_images(self._data.train),
      chunk.batches,
      chunk.num_batches,
    )
    self.step += chunk.num_batches
    return metrics

  def eval_chunks(self, max_batches: int) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split; as `splits.eval_chunks`."""
    return splits.eval_chunks(
      self._data.validation,
      self._config.eval.batch_size,
      max_batches,
      self._topology,
    )

  def evaluate(self, chunk: splits.Chunk, start: int) -> training.Metrics:
    """Sets the evaluation of a chunk of the validation split going.

    Returns:
      Sums of the metrics over each batch, [max_batches], still being computed.
    """
    return self._eval_steps(
      self._state.variables,
      self._settings,
      training.eval_key(self._config.seed),
      splits.stored_images(self._data.validation),
      chunk.batches,
      chunk.num_batches,
      start,
      self._data.validation.num_examples,
    )

  def by_run(self, metrics: training.Metrics) -> dict[str, np.ndarray]:
    """Waits for what `train` or `evaluate` returned, [1, max_steps]."""
    return {k: v[None] for k, v in jax.device_get(metrics).items()}

  def snapshot(self) -> training.TrainState:
    """A copy of the state on the devices, that outlives the next steps."""
    return training.snapshot(self._state)

  def states(self, snapshot: training.TrainState) -> list[training.TrainState]:
    """The run's state in a snapshot, as a checkpoint takes it."""
    return [snapshot]

  def draw(
    self, originals: np.ndarray, columns: int
  ) -> Callable[[], dict[str, np.ndarray]]:
    """Sets samples and reconstructions going.

    Args:
      originals: to be reconstructed, uint8 [n, height, width, channels].
      columns: of the pictures, in images; there are as many rows of samples.

    Returns:
      A function that waits for them, and returns grids of the samples, and of
      the originals beside their reconstructions. The seed fixes the samples' z,
      so that epochs can be compared.
    """
    variables = devices.on_first(self._state.variables)
    key = training.sample_key(self._config.seed)
    samples = figures.samples(self._model, variables, key, columns**2)
    reconstructions = figures.reconstructions(self._model, variables, originals)

    def draw():
      pairs = figures.side_by_side(originals, reconstructions)
      return {
        'samples': figures.image_grid(samples, columns),
        'reconstructions': figures.image_grid(pairs, columns),
      }

    return draw
