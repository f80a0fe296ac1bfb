"""The first state: random, of another run, or made of the training images."""

import dataclasses
import time

from flax import traverse_util
import jax
import numpy as np

from vae import loading, registry, splits, steps
from vae.errors import UserError

# Images whose statistics give the first parameters.
_NUM_IMAGES = 2048


def first_state(
  config, model, state: steps.TrainState, split: splits.Split
) -> steps.TrainState:
  """The state before the first step, from a random one.

  Args:
    config: with `init_from` the arrays of that run are taken, and else those
      that the model's `initial_variables` makes of images, if its
      `initialisation` is not random.
    model: of the config.
    state: the random one.
    split: the training images.

  Raises:
    UserError: if there is no run to start from, or it does not fit.
  """
  if config.init_from:
    return _start_from(config, state)
  if getattr(model, 'initialisation', 'random') == 'random':
    return state
  start, count = time.monotonic(), min(_NUM_IMAGES, split.num_examples)
  chosen = np.random.default_rng(config.seed).choice(
    split.num_examples, count, replace=False
  )
  images = next(split.batches(np.sort(chosen), count)).astype(np.float32) / 255
  variables, num_used = model.initial_variables(
    state.variables, images, config.objective.get('beta', 1.0)
  )
  seconds = time.monotonic() - start
  print(
    f'Initialised by {model.initialisation} of {count:,} images: {num_used} of '
    f'{config.model.latent_dim} latent dimensions are used ({seconds:.1f}s).',
    flush=True,
  )
  params = variables.pop('params')
  collections = {**state.collections, **variables}
  if steps.AVERAGED in collections:
    collections[steps.AVERAGED] = params
  return dataclasses.replace(state, params=params, collections=collections)


def _start_from(config, state: steps.TrainState) -> steps.TrainState:
  """A first state with the arrays of `config.init_from` that fit.

  It is a run, whose best checkpoint counts. Arrays of the same name and shape
  are taken; a line says which are not. Raises UserError if the workdir holds no
  run, none of its arrays fits, or the model must be the same and is not.
  """
  workdir = config.init_from
  trained = loading.load(workdir)
  if config.objective.name == 'prior_only':
    _check_same_model(config, trained)
  own, found = (
    traverse_util.flatten_dict(jax.device_get(tree))
    for tree in (
      {'params': state.params, **state.collections},
      trained.variables,
    )
  )
  taken = {
    path: array
    for path, array in found.items()
    if path in own and own[path].shape == array.shape
  }
  if not taken:
    raise UserError(
      f'config.init_from is {workdir}, but none of its arrays fits this model.'
    )
  for path in list(taken):  # The average starts at the parameters.
    averaged = steps.AVERAGED, *path[1:]
    if path[0] == 'params' and averaged in own:
      taken[averaged] = taken[path]
  new = {'/'.join(path[:2]) for path in own if path not in taken}
  left = {'/'.join(path[:2]) for path in found if path not in taken}
  print(
    f'From step {trained.step:,} of {workdir}: {len(taken)} of {len(own)} '
    f'arrays. Newly initialised: {", ".join(sorted(new)) or "none"}. Not used: '
    f'{", ".join(sorted(left)) or "none"}.',
    flush=True,
  )
  arrays = {
    path: taken.get(path, array).astype(array.dtype)
    for path, array in own.items()
  }
  collections = traverse_util.unflatten_dict(arrays)
  params = collections.pop('params')
  return dataclasses.replace(state, params=params, collections=collections)


def _check_same_model(config, trained: loading.TrainedVAE) -> None:
  """Raises UserError unless two models are the same, but for their priors."""
  settings = registry.settings(config.model)
  settings['data.label'] = config.data.label
  others = registry.fields(type(trained.model))
  others = {name: default for name, (_, default) in others.items()}
  others |= registry.settings(trained.config.model)
  others['data.label'] = trained.config.data.get('label', '')
  changed = [
    f'{name} was {others[name]} and is now {settings[name]}'
    for name in settings
    if name not in ('latent_prior', 'prior_components')
    and settings[name] != others.get(name)
  ]
  if changed:
    raise UserError(
      f'config.init_from is {config.init_from}, and the objective prior_only '
      f'leaves its model as it is: {"; ".join(changed)}.'
    )
