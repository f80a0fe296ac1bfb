"""One run, whose batches are split over all devices of all processes."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import jax
import numpy as np

from vae import devices
from vae import figures
from vae import model as models
from vae import optimizers
from vae import randomness
from vae import splits
from vae import training
from vae.checkpoint_files import Restored
from vae.checkpoints import Checkpoints
from vae.trainer import Trainer


class SingleRun(Trainer):
  """A run in training; all devices together are sent one batch for a step."""

  num_runs = 1
  batches_per_step = 1

  def __init__(self, config, data: splits.DataSet):
    """Compiles nothing yet, and makes the state before the first step.

    Args:
      config: complete and valid.
      data: its train and validation splits are used.
    """
    self._config = config
    self._topology = devices.current()
    self.per_device_batch_size = (
      config.train.batch_size // self._topology.num_devices
    )
    self._model = models.from_config(config, axis_name=devices.AXIS)
    steps_per_epoch = data.train.num_examples // config.train.batch_size
    optimizer = optimizers.from_config(config, steps_per_epoch)
    super().__init__(
      data,
      training.settings_from_config(config, self._model),
      randomness.train_key(config.seed),
      randomness.eval_key(config.seed),
      training.make_train_steps(
        self._model,
        optimizer,
        config.train.flip,
        config.train.on_nonfinite == 'skip',
      ),
      training.make_eval_steps(self._model),
    )
    self._state = training.create_state(self._model, optimizer, config.seed)
    self.num_parameters = training.num_parameters(self._state)

  def restore(self, saved: Sequence[Checkpoints]) -> None:
    """Goes on from the last checkpoint, if there is one.

    The first process reads it, and hands it on to the others, whose disks may
    not have it.
    """
    (saved,) = saved
    restored = None
    if self._topology.process_index == 0:
      restored = saved.restore_last(self._state)
    if restored is None:
      restored = Restored(self._state, {})
    state, is_validated = devices.as_first_process(
      (jax.device_get(restored.state), np.array(bool(restored.metrics)))
    )
    self._state = devices.replicate(state)
    self.step, self.is_validated = int(state.step), bool(is_validated)

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

  def eval_chunks(self, max_batches: int) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split; as `splits.eval_chunks`."""
    return splits.eval_chunks(
      self._data.validation,
      self._config.eval.batch_size,
      max_batches,
      self._topology,
    )

  def by_run(self, metrics: training.Metrics) -> dict[str, np.ndarray]:
    """Waits for what `train` or `evaluate` returned, [1, max_steps]."""
    return {k: v[None] for k, v in jax.device_get(metrics).items()}

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
    key = randomness.sample_key(self._config.seed)
    samples = figures.samples(self._model, variables, key, columns**2)
    reconstructions = figures.reconstructions(self._model, variables, originals)

    def draw():
      pairs = figures.side_by_side(originals, reconstructions)
      return {
        'samples': figures.image_grid(samples, columns),
        'reconstructions': figures.image_grid(pairs, columns),
      }

    return draw
