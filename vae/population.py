"""Several runs in training at once, one on each device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
from typing import Any

import jax
import numpy as np

from vae import devices, initialisation, numerics, padding, splits, steps
from vae.checkpoints import Checkpoints
from vae.errors import UserError
from vae.trainer import Trainer

# Settings that may differ between members; all others are the same.
FREE_KEYS = (
  'objective.beta',
  'optimizer.learning_rate',
  'seed',
  'model.latent_dim',
)


class Population(Trainer):
  """Runs in one compiled program, one on each of the first local devices.

  Members share the model's shapes, the data and the batch size, and differ in
  `FREE_KEYS`. If a member's latent dimension is less than the largest, its
  parameters are padded with zeros, which get no gradient and stay 0, and z is
  masked: the padding has mean and log variance 0 and a KL of 0. Each member is
  the run that it would be by itself. Each has the whole of its batches, so that
  nothing is communicated.
  """

  def __init__(self, configs, data: splits.DataSet, latent_dim=None):
    """Makes the states before the first step; compiles nothing yet.

    Populations that pad to the same `latent_dim`, by default the largest there
    is, share a program.
    """
    self._configs, self._config, self._data = configs, configs[0], data
    self._topology = devices.Topology()
    self.num_runs = len(configs)
    # Members of one seed see the same images with the same noise.
    self._one_seed = len({c.seed for c in configs}) == 1
    self._programs = [
      steps.program_from_config(c, data.train.num_examples, axis_name=None)
      for c in configs
    ]
    if latent_dim is None:
      latent_dim = max(c.model.get('latent_dim', 0) for c in configs)
    wide = configs[0].copy_and_resolve_references()
    if 'latent_dim' in wide.model:
      wide.model.latent_dim = latent_dim
    self._program = steps.program_from_config(
      wide, data.train.num_examples, axis_name=None
    )
    self._model = self._program.model
    self._read_labels()
    settings = [steps.settings_from_config(c) for c in configs]
    self._settings = devices.shard(_stack(settings))
    self._train_key = self._keys(numerics.train_key)
    self._eval_key = self._keys(numerics.eval_key)
    self._train_steps, self._eval_steps = _over_members(
      self._program, self._one_seed, self.num_runs
    )
    states = [
      steps.create_state(program, c.seed)
      for program, c in zip(self._programs, configs, strict=True)
    ]
    self._first_states = states
    self._place(states)
    self.num_parameters = sum(map(steps.num_parameters, states))
    self.step, self.is_validated = 0, False

  def _place(self, states: Iterable[steps.TrainState]) -> None:
    target = steps.abstract_state(self._program)
    padded = []
    for state, own in zip(states, self._programs, strict=True):
      state = padding.pad(jax.device_get(state), target)
      shapes = steps.abstract_state(own).params
      others = padding.collection(own.model, self._program.model, shapes)
      padded.append(state.replace(collections=state.collections | others))
    self._state = devices.shard(_stack(padded))

  def _keys(self, key_of_seed: Callable[[int], jax.Array]) -> jax.Array:
    if self._one_seed:
      return key_of_seed(self._config.seed)
    keys = [jax.random.key_data(key_of_seed(c.seed)) for c in self._configs]
    return numerics.wrap(devices.shard(np.stack(keys)))

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
    else:
      self._place(
        initialisation.first_state(c, program.model, state, self._data.train)
        for c, program, state in zip(
          self._configs, self._programs, self._first_states, strict=True
        )
      )
    del self._first_states

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
      batches = {
        seed: _first(chunk.batches)
        for seed, chunk in zip(by_seed, chunks, strict=True)
      }
      together = batches[self._config.seed]
      if not self._one_seed:
        together = _stack([batches[c.seed] for c in self._configs])
      yield splits.Chunk(together, chunks[0].num_batches)

  def eval_chunks(self) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split; batches are [max_batches, batch, …]."""
    for chunk, start in super().eval_chunks():
      yield splits.Chunk(_first(chunk.batches), chunk.num_batches), start

  def by_run(self, metrics: steps.Metrics) -> dict[str, np.ndarray]:
    """Waits for results of `train` or `evaluate`; [num_runs, max_steps]."""
    return jax.device_get(metrics)

  def states(self, snapshot: steps.TrainState) -> list[steps.TrainState]:
    """The state of each run in a snapshot, as it would be by itself."""
    together = jax.device_get(snapshot)
    others = dict(together.collections)
    others.pop(padding.COLLECTION, None)
    together = together.replace(collections=others)

    def cut(member, program):
      return jax.tree.map(
        lambda a, own: a[member][tuple(map(slice, own.shape))],
        together,
        steps.abstract_state(program),
      )

    return [cut(*member) for member in enumerate(self._programs)]

  def draw(self, originals: np.ndarray, columns: int) -> None:
    """No pictures: a sweep shows its runs side by side."""


def _first(tree: Any) -> Any:
  """The part of the first device."""
  return jax.tree.map(lambda leaf: leaf[0], tree)


def _stack(members: Sequence[Any]) -> Any:
  """Arrays [num_runs, …] of a tree of each member."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


@functools.lru_cache(maxsize=8)
def _over_members(program, one_seed, num_runs):
  """Both loops of `vae.steps`, with a member on each of the first devices."""
  by_seed = None if one_seed else 0
  members = jax.local_devices()[:num_runs]
  pmap = functools.partial(jax.pmap, axis_name=devices.AXIS, devices=members)
  train_steps = pmap(
    functools.partial(steps.train_loop, program),
    # State, settings, key, stored images, batches, their number.
    in_axes=(0, 0, by_seed, None, by_seed, None),
    donate_argnums=0,
  )
  eval_steps = pmap(
    functools.partial(steps.eval_loop, program),
    # Variables, settings, key; all members see the same images.
    in_axes=(0, 0, by_seed, *[None] * 5),
  )
  return train_steps, eval_steps
