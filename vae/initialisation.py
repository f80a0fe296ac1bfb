"""The first state: random, of another run, or made of the training images."""

import dataclasses
import time

import numpy as np

from vae import loading, splits, steps

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
    UserError: as `loading.start_from`.
  """
  if config.init_from:
    return loading.start_from(config, state)
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
