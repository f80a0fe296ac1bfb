"""Several runs in one compiled program: members of a population.

Members share the model's shapes, the data and the batch size. β, the learning
rate and the seed are theirs, and the latent dimension is: where it is less
than the largest, the parameters are padded with zeros, and no noise is drawn
for the dimensions that are padding. Then these have mean and log variance 0, a
KL of 0 and z = 0, the decoder's weights for them get no gradient, and neither
do the encoder's: all stay 0, and each member is the run that it would be by
itself.

Members are laid over the devices first, each with the whole of its batches, so
that nothing is communicated, and within a device vectorised or one after the
other.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import functools
from typing import Any

import jax
from jax import lax
import numpy as np

from vae import devices
from vae import model as models
from vae import optimizers
from vae import randomness
from vae import splits
from vae import training
from vae.checkpoints import Checkpoints
from vae.devices import Topology
from vae.errors import UserError
from vae.model import VAE
from vae.trained import TrainedVAE
from vae.trainer import Trainer
from vae.training import TrainState

# What may differ between members; all else is the same.
FREE_KEYS = (
  'objective.beta',
  'optimizer.learning_rate',
  'seed',
  'model.latent_dim',
)

# All members are at the same step, so that they share what depends on it.
_STATE_AXES = TrainState(step=None, params=0, batch_stats=0, opt_state=0)


class Population(Trainer):
  """Runs in training together; `vae.single.SingleRun` is one alone.

  For a step the devices are sent one batch where all runs have one seed, else
  one for each run.
  """

  def __init__(
    self,
    configs: Sequence,
    data: splits.DataSet,
    latent_dim: int | None = None,
  ):
    """Compiles nothing yet, and makes the states before the first step.

    Args:
      configs: complete and valid, the same but for `FREE_KEYS`.
      data: its train and validation splits are used.
      latent_dim: to pad to, by default the largest there is; populations of
        one size that pad to the same share a program.
    """
    self._configs, self._config = list(configs), configs[0]
    self.num_runs = len(configs)
    self._layout = layout(len(configs), jax.local_device_count())
    self._models = [models.from_config(c) for c in configs]
    latent_dims = [model.latent_dim for model in self._models]
    self._model = self._models[0].clone(
      latent_dim=latent_dim or max(latent_dims)
    )
    config = self._config
    steps_per_epoch = data.train.num_examples // config.train.batch_size
    self._optimizer = optimizers.from_config(config, steps_per_epoch)
    # Members of one seed see the same images with the same noise.
    self._one_seed = len({c.seed for c in configs}) == 1
    self.batches_per_step = 1 if self._one_seed else self.num_runs
    self.per_device_batch_size = config.train.batch_size
    program = (self._model, self._one_seed, self._layout[0])
    settings = map(self._settings_of, configs, self._models)
    super().__init__(
      data,
      devices.shard(self._stack(list(settings))),
      self._keys(randomness.train_key),
      self._keys(randomness.eval_key),
      _make_train_steps(
        *program,
        self._optimizer,
        config.train.flip,
        config.train.on_nonfinite == 'skip',
      ),
      _make_eval_steps(*program),
    )
    self._shapes = [
      training.abstract_state(model, self._optimizer) for model in self._models
    ]
    # Compiled once for each latent dimension, and on all processors.
    with futures.ThreadPoolExecutor() as pool:
      states = list(
        pool.map(
          lambda model, c: training.create_state(
            model, self._optimizer, c.seed
          ),
          self._models,
          configs,
        )
      )
    self._place(states)
    self.num_parameters = sum(map(training.num_parameters, states))

  def _settings_of(self, config, model: VAE) -> training.Settings:
    settings = training.settings_from_config(config, model)
    # Also where no dimension is padding, for populations that share a program.
    mask = np.arange(self._model.latent_dim) < model.latent_dim
    return settings.replace(latent_mask=mask.astype(np.float32))

  def _place(self, states: Sequence[TrainState]) -> None:
    target = training.abstract_state(self._model, self._optimizer)
    padded = [_pad(jax.device_get(state), target) for state in states]
    # The step is the same for all: it has no axis of members.
    step = devices.replicate(padded[0].step, self._layout[0])
    members = [state.replace(step=None) for state in padded]
    self._state = devices.shard(self._stack(members)).replace(step=step)

  def _stack(self, members: Sequence[Any]) -> Any:
    """Arrays [num_devices, per_device, …] of a tree of each member."""
    num_devices, per_device = self._layout
    # The last stands in for those that are missing.
    missing = num_devices * per_device - len(members)
    members = [*members, *[members[-1]] * missing]
    return jax.tree.map(
      lambda *leaves: np.stack(leaves).reshape(
        num_devices, per_device, *np.shape(leaves[0])
      ),
      *members,
    )

  def _keys(self, key_of_seed: Callable[[int], jax.Array]) -> jax.Array:
    if self._one_seed:
      return key_of_seed(self._config.seed)
    keys = self._stack(
      [jax.random.key_data(key_of_seed(c.seed)) for c in self._configs]
    )
    return randomness.wrap(devices.shard(keys))

  def restore(self, saved: Sequence[Checkpoints]) -> None:
    """Goes on from the last checkpoints, which must be of the same step.

    Raises:
      UserError: if they are not.
    """
    restored = [
      checkpoints.restore_last(shapes)
      for checkpoints, shapes in zip(saved, self._shapes, strict=True)
    ]
    steps = {0 if r is None else int(r.state.step) for r in restored}
    if len(steps) > 1:
      raise UserError(
        'the last checkpoints are of different steps: '
        f'{", ".join(map(str, sorted(steps)))}.'
      )
    (self.step,) = steps
    if not self.step:
      return
    self._place([r.state for r in restored])
    self.is_validated = all(r.metrics for r in restored)

  def train_chunks(
    self, epoch: int, first_step: int, max_steps: int
  ) -> Iterator[splits.Chunk]:
    """What is left of an epoch.

    Returns:
      An iterator over chunks of batches [max_steps, batch, …] that all members
      share; [num_devices, per_device, max_steps, batch, …] where their seeds
      differ.
    """
    by_seed = {}
    for config in self._configs:
      by_seed[config.seed] = splits.train_chunks(
        self._data.train,
        config.seed,
        epoch,
        first_step,
        config.train.batch_size,
        max_steps,
        Topology(),
      )
    for chunks in zip(*by_seed.values(), strict=True):
      batches = {
        seed: chunk.batches[0]
        for seed, chunk in zip(by_seed, chunks, strict=True)
      }
      if self._one_seed:
        (together,) = batches.values()
      else:
        together = self._stack([batches[c.seed] for c in self._configs])
      yield splits.Chunk(together, chunks[0].num_batches)

  def eval_chunks(self, max_batches: int) -> Iterator[tuple[splits.Chunk, int]]:
    """The validation split; batches are [max_batches, batch, …]."""
    for chunk, start in splits.eval_chunks(
      self._data.validation,
      self._config.eval.batch_size,
      max_batches,
      Topology(),
    ):
      yield splits.Chunk(chunk.batches[0], chunk.num_batches), start

  def by_run(self, metrics: training.Metrics) -> dict[str, np.ndarray]:
    """Waits for what `train` or `evaluate` returned, [num_runs, max_steps]."""
    return {
      name: values.reshape(-1, values.shape[-1])[: self.num_runs]
      for name, values in jax.device_get(metrics).items()
    }

  def states(self, snapshot: TrainState) -> list[TrainState]:
    """The states in a snapshot, each as its run would have it by itself."""
    together = jax.device_get(snapshot)
    flat = jax.tree.map(
      lambda a: a.reshape(-1, *a.shape[2:]), together.replace(step=None)
    )
    return [
      _cut(
        jax.tree.map(lambda a, i=i: a[i], flat).replace(step=together.step),
        shapes,
      )
      for i, shapes in enumerate(self._shapes)
    ]

  def draw(self, originals: np.ndarray, columns: int) -> None:
    """No pictures: what sets so many runs going shows them side by side."""


def pad_trained(trained: TrainedVAE, latent_dim: int) -> TrainedVAE:
  """The same model with more latent dimensions, that carry nothing.

  Their KL is 0 and the decoder ignores them. Models that are padded to the
  same size share the programs that measure them.
  """
  model = trained.model.clone(latent_dim=latent_dim)
  target = training.abstract_state(model, optimizers.Optimizer())
  variables = _pad(jax.device_get(trained.variables), target.variables)
  return TrainedVAE(trained.config, model, variables, trained.step)


def layout(num_members: int, num_devices: int) -> tuple[int, int]:
  """How many devices to use, and how many members each is to have."""
  per_device = -(-num_members // num_devices)
  return -(-num_members // per_device), per_device


@functools.lru_cache(maxsize=8)
def _make_train_steps(model, one_seed, num_devices, optimizer, *options):
  by_member = None if one_seed else 0
  return _over_members(
    functools.partial(training.train_loop, model, optimizer, *options),
    # state, settings, key, stored, batches, num_steps
    (_STATE_AXES, 0, by_member, None, by_member, None),
    (_STATE_AXES, 0),
    num_devices,
    donate_argnums=0,
  )


@functools.lru_cache(maxsize=8)
def _make_eval_steps(model, one_seed, num_devices):
  by_member = None if one_seed else 0
  return _over_members(
    functools.partial(training.eval_loop, model),
    # variables, settings, key, stored, batches, num_steps, start, num_examples
    (0, 0, by_member, None, None, None, None, None),
    0,
    num_devices,
  )


def _over_members(function, in_axes, out_axes, num_devices, **options):
  """One program for all devices, and within each, for all its members."""
  together = jax.vmap if _at_once() else _one_by_one
  return jax.pmap(
    together(function, in_axes, out_axes),
    axis_name=devices.AXIS,
    in_axes=in_axes,
    out_axes=out_axes,
    devices=jax.local_devices()[:num_devices],
    **options,
  )


def _at_once() -> bool:
  """Whether a device computes all its members at the same time.

  A GPU does. A CPU has no fast path for products of many small matrices, nor
  cores to spare, and a TPU would take half as long again and twice the memory,
  by XLA's estimate (benchmarks/README.md); there one member follows the other.
  """
  return jax.default_backend() == 'gpu'


def _one_by_one(function, in_axes, out_axes):
  """`jax.vmap` as a loop."""

  def members(*args):
    leaves, tree = jax.tree.flatten(args)
    mapped = _broadcast_axes(in_axes, args)

    def member(own):
      own = iter(own)
      return function(
        *tree.unflatten(
          next(own) if is_mapped else leaf
          for leaf, is_mapped in zip(leaves, mapped, strict=True)
        )
      )

    own = [
      leaf for leaf, is_mapped in zip(leaves, mapped, strict=True) if is_mapped
    ]
    results = lax.map(member, own)
    together, tree = jax.tree.flatten(results)
    mapped = _broadcast_axes(out_axes, results)
    return tree.unflatten(
      leaf if is_mapped else leaf[0]
      for leaf, is_mapped in zip(together, mapped, strict=True)
    )

  return members


def _broadcast_axes(axes: Any, tree: Any) -> list[bool]:
  """Whether each leaf of a tree has an axis of members."""
  is_none = lambda a: a is None
  return jax.tree.leaves(
    jax.tree.map(
      lambda axis, part: jax.tree.map(lambda _: axis == 0, part),
      axes,
      tree,
      is_leaf=is_none,
    )
  )


def _pad(tree: Any, target: Any) -> Any:
  """Zeros behind the arrays of a tree, up to the shapes of `target`."""

  def pad(array, wanted):
    if array.shape == wanted.shape:
      return array
    missing = np.subtract(wanted.shape, array.shape)
    return np.pad(array, [(0, more) for more in missing])

  return jax.tree.map(pad, tree, target)


def _cut(tree: Any, target: Any) -> Any:
  """The inverse of `_pad`."""
  return jax.tree.map(
    lambda a, t: a[tuple(slice(size) for size in t.shape)], tree, target
  )
