"""The optimiser and its learning rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Adam, with a decaying learning rate and an L2 penalty in the gradient.

  As in the article the penalty is a part of the gradient, not decoupled from it
  as in AdamW. A call with the learning rate of the first epoch, which may be
  traced, gives the transformation.

  Attributes:
    steps_per_epoch: number of updates between two decays.
    decay_per_epoch: factor on the learning rate after each epoch.
    decay_epochs: the epochs before which it applies, if not all.
    weight_decay: factor on the parameters that is added to the gradient of the
      loss in nats per image.
    clip_norm: limit of the gradient's norm over all parameters, before the
      penalty is added (Pascanu et al. 2013); 0 for no limit.
    epsilon: Adam's ε.
  """

  steps_per_epoch: int = 1
  decay_per_epoch: float = 1.0
  decay_epochs: tuple[int, ...] = ()
  weight_decay: float = 0.0
  clip_norm: float = 0.0
  epsilon: float = 1e-8

  def __call__(self, learning_rate) -> optax.GradientTransformation:
    return optax.chain(
      # One link without a state, so that checkpoints always have one shape.
      optax.stateless(self._clip_and_decay),
      optax.adam(self.schedule(learning_rate), eps=self.epsilon),
    )

  def _clip_and_decay(self, grads, params):
    if self.clip_norm:
      clip = optax.clip_by_global_norm(self.clip_norm)
      grads, _ = clip.update(grads, clip.init(params))
    return jax.tree.map(lambda g, p: g + self.weight_decay * p, grads, params)

  def schedule(self, learning_rate) -> optax.Schedule:
    """`learning_rate · decay_per_epoch ** epoch`, constant within an epoch.

    With `decay_epochs`, their number so far is the exponent.
    """
    if self.decay_epochs:
      return optax.piecewise_constant_schedule(
        learning_rate,
        {
          epoch * self.steps_per_epoch: self.decay_per_epoch
          for epoch in self.decay_epochs
        },
      )
    return optax.exponential_decay(
      learning_rate,
      transition_steps=self.steps_per_epoch,
      decay_rate=self.decay_per_epoch,
      staircase=True,
    )


def advance_schedule(state, updated) -> optax.OptState:
  """The state after a step that is left out: only its schedules advance.

  Adam's moments and bias correction stay; the learning rate remains a function
  of the run's step.
  """
  clip, (adam, _) = state
  return clip, (adam, updated[1][1])


def moved_average(decay: float, average, params, step: jax.Array):
  """The exponential moving average of the parameters after a step.

  The decay rises as (1 + step) / (10 + step). Statistics are not averaged.
  """
  share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(
    lambda a, p: a + share.astype(p.dtype) * (p - a), average, params
  )


def from_config(config, steps_per_epoch: int) -> Optimizer:
  """The optimiser of `config.optimizer`, without its learning rate."""
  settings = config.optimizer
  return Optimizer(
    steps_per_epoch,
    settings.decay_per_epoch,
    tuple(settings.decay_epochs),
    settings.weight_decay,
    settings.clip_norm,
    settings.epsilon,
  )


def learning_rates(config, num_epochs: int) -> np.ndarray:
  """The learning rate of each epoch, [num_epochs]."""
  optimizer = from_config(config, steps_per_epoch=1)
  schedule = optimizer.schedule(config.optimizer.learning_rate)
  return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(num_epochs)))
