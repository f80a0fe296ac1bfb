"""Several runs in one compiled program, one on each device.

Members share the model's shapes, the data and the batch size, and differ in
`FREE_KEYS`. If a member's latent dimension is less than the largest, its
parameters are padded with zeros, and z is masked: the padding has mean and log
variance 0, a KL of 0 and z = 0, and its weights get no gradient. All stay 0,
and each member is the run that it would be by itself.

Each member has the whole of its batches, so that nothing is communicated.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from vae import devices, randomness, splits, steps
from vae.checkpoints import Checkpoints
from vae.devices import Topology
from vae.errors import UserError
from vae.loading import TrainedVAE
from vae.steps import TrainState
from vae.trainer import Trainer

# Settings that may differ between members; all others are the same.
FREE_KEYS = (
  'objective.beta',
  'optimizer.learning_rate',
  'seed',
  'model.latent_dim',
)


class Population(Trainer):
  """Runs in training together, at most one for each local device."""

  def __init__(
    self,
    configs: Sequence,
    data: splits.DataSet,
    latent_dim: int | None = None,
  ):
    """Makes the states before the first step; compiles nothing yet.

    Populations that pad to the same `latent_dim`, by default the largest there
    is, share a program.
    """
    self._configs, self._config, self._data = configs, configs[0], data
    # Each member has the whole of its batches.
    self._topology = Topology()
    self.num_runs = len(configs)
    # Members of one seed see the same images with the same noise.
    self._one_seed = len({c.seed for c in configs}) == 1
    self._programs = [
      steps.program_from_config(c, data.train.num_examples, axis_name=None)
      for c in configs
    ]
    if latent_dim is None:
      latent_dim = max(c.model.get('latent_dim', 0) for c in configs)
    self._program = dataclasses.replace(
      self._programs[0], model=_widened(self._programs[0].model, latent_dim)
    )
    settings = [steps.settings_from_config(c) for c in configs]
    self._settings = devices.shard(_stack(settings))
    self._train_key = self._keys(randomness.train_key)
    self._eval_key = self._keys(randomness.eval_key)
    by_member = None if self._one_seed else 0
    # State, settings, key, stored images, batches, their number.
    in_axes = (0, 0, by_member, None, by_member, None)
    self._train_steps = _over_members(
      steps.train_loop, self._program, in_axes, self.num_runs
    )
    # Variables, settings, key; all members see the same images.
    eval_axes = (0, 0, by_member, *[None] * 5)
    self._eval_steps = _over_members(
      steps.eval_loop, self._program, eval_axes, self.num_runs
    )
    states = [
      steps.create_state(program, c.seed)
      for program, c in zip(self._programs, configs, strict=True)
    ]
    self._place(states)
    self.num_parameters = sum(map(steps.num_parameters, states))
    self.step, self.is_validated = 0, False

  def _place(self, states: Sequence[TrainState]) -> None:
    target = steps.abstract_state(self._program)
    padded = []
    for state, own in zip(states, self._programs, strict=True):
      state = _pad(jax.device_get(state), target)
      mask = _mask(own.model, self._program.model)
      padded.append(state.replace(collections=state.collections | mask))
    self._state = devices.shard(_stack(padded))

  def _keys(self, key_of_seed: Callable[[int], jax.Array]) -> jax.Array:
    if self._one_seed:
      return key_of_seed(self._config.seed)
    keys = [jax.random.key_data(key_of_seed(c.seed)) for c in self._configs]
    return randomness.wrap(devices.shard(np.stack(keys)))

  def restore(self, saved: Sequence[Checkpoints]) -> None:
    """See `Trainer.restore`."""
    found = [
      checkpoints.restore_last(steps.abstract_state(program))
      for checkpoints, program in zip(saved, self._programs, strict=True)
    ]
    restored = [r for r in found if r is not None]
    at = {0 if r is None else int(r.state.step) for r in found}
    if len(at) > 1:
      raise UserError(
        'the last checkpoints are of different steps: '
        f'{", ".join(map(str, sorted(at)))}.'
      )
    (self.step,) = at
    if self.step:
      self._place([r.state for r in restored])
      self.is_validated = all(r.metrics for r in restored)

  def train_chunks(
    self, epoch: int, first_step: int, max_steps: int | None = None
  ) -> Iterator[splits.Chunk]:
    """The rest of an epoch, in chunks of batches [max_steps, batch, …].

    Members of different seeds have their own, [num_runs, max_steps, batch, …].
    """
    by_seed = {
      c.seed: self._train_chunks(c.seed, epoch, first_step, max_steps)
      for c in self._configs
    }
    for chunks in zip(*by_seed.values(), strict=True):
      batches = {s: c.batches[0] for s, c in zip(by_seed, chunks, strict=True)}
      together = batches[self._config.seed]
      if not self._one_seed:
        together = np.stack([batches[c.seed] for c in self._configs])
      yield splits.Chunk(together, chunks[0].num_batches)

  def eval_chunks(self) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split; batches are [max_batches, batch, …]."""
    for chunk, start in super().eval_chunks():
      yield splits.Chunk(chunk.batches[0], chunk.num_batches), start

  def by_run(self, metrics: steps.Metrics) -> dict[str, np.ndarray]:
    """Waits for results of `train` or `evaluate`; [num_runs, max_steps]."""
    return jax.device_get(metrics)

  def states(self, snapshot: TrainState) -> list[TrainState]:
    """The state of each run in a snapshot, as it would be by itself."""
    together = jax.device_get(snapshot)
    collections = dict(together.collections)
    collections.pop('padding', None)
    together = together.replace(collections=collections)

    def cut(member, program):
      return jax.tree.map(
        lambda a, own: a[member][tuple(map(slice, own.shape))],
        together,
        steps.abstract_state(program),
      )

    return [cut(*member) for member in enumerate(self._programs)]

  def draw(self, originals: np.ndarray, columns: int) -> None:
    """No pictures: a sweep shows its runs side by side."""


def pad_trained(trained: TrainedVAE, latent_dim: int) -> TrainedVAE:
  """The same model with more latent dimensions, which carry nothing.

  Models that are padded to the same size share the programs that measure them.
  """
  model = _widened(trained.model, latent_dim)
  wide = steps.abstract_state(steps.Program(model)).variables
  variables = _pad(jax.device_get(trained.variables), wide)
  variables |= _mask(trained.model, model)
  return TrainedVAE(trained.config, model, variables, trained.step)


def _widened(model: nn.Module, latent_dim: int) -> nn.Module:
  """The model with more latent dimensions, if it has a number of them."""
  if not hasattr(model, 'latent_dim'):
    return model
  return model.clone(latent_dim=latent_dim)


def _mask(narrow: nn.Module, wide: nn.Module) -> dict[str, Any]:
  """The collection that masks the padding of z, even if there is none.

  So populations of any latent dimensions share a program.
  """
  if not hasattr(narrow, 'latent_dim'):
    return {}
  mask = np.arange(wide.latent_dim) < narrow.latent_dim
  return {'padding': {'mask': mask.astype(np.float32)}}


def _stack(members: Sequence[Any]) -> Any:
  """Arrays [num_runs, …] of a tree of each member."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def _pad(tree: Any, target: Any) -> Any:
  """Zeros behind the arrays of a tree, up to the shapes of `target`."""

  def pad(array, wanted):
    if array.shape == wanted.shape:
      return array
    missing = np.subtract(wanted.shape, array.shape)
    return np.pad(array, [(0, more) for more in missing])

  return jax.tree.map(pad, tree, target)


@functools.lru_cache(maxsize=16)
def _over_members(function, program, in_axes, num_runs):
  """A step of `vae.steps`, with a member on each of the first devices."""
  is_training = function is steps.train_loop
  return jax.pmap(
    functools.partial(function, program),
    axis_name=devices.AXIS,
    in_axes=in_axes,
    devices=jax.local_devices()[:num_runs],
    donate_argnums=(0,) if is_training else (),
  )
