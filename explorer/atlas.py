"""A run's images in its latent space: codes, map, holes, directions."""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors

from evaluation import measure, posterior
from explorer import latents
from vae import conditioning, discrete, numerics, splits
from vae.loading import TrainedVAE

# Draws of the prior and of q(z) for the map of holes and the sliders' bands.
_NUM_DRAWS = 20_000

# Images that are encoded at a time.
_BATCH_SIZE = 256

# Classes of a label, each of which has a direction.
_MAX_CLASSES = 6


@dataclasses.dataclass(frozen=True)
class Atlas:
  """The images of the training split in the latent space.

  Attributes:
    codes: `measure.encode` of them.
    plane: of the scatter.
    points: their means in it, [n, 2].
    bands: mean and ends of q(z) in each dimension, [latent_dim, 3].
    holes: the map of holes; None if the prior takes too long to sample.
    num_images: of the split; at most 10,000 of them are encoded.
    labels: values [n] and class names, by the label's name.
    directions: steps along labels of two classes, and to each class of labels
      whose few classes have names.
    neighbours: index of the means.
    images: of some indices, uint8 [n, height, width, channels].
  """

  codes: dict[str, np.ndarray]
  plane: latents.Plane
  points: np.ndarray
  bands: np.ndarray
  holes: latents.HoleMap | None
  num_images: int
  labels: dict[str, tuple[np.ndarray, list[str]]]
  directions: dict[str, np.ndarray]
  neighbours: NearestNeighbors
  images: Callable[[list[int]], np.ndarray]

  def describe(self) -> dict[str, Any]:
    """Points, labels, directions and the map of holes, for JSON."""
    return {
      'points': np.round(self.points, 4),
      'variance': self.plane.variance,
      'num_images': self.num_images,
      'labels': {
        name: {'values': values, 'names': names}
        for name, (values, names) in self.labels.items()
      },
      'directions': self.directions,
      'holes': self.holes and vars(self.holes),
    }


def survey(trained: TrainedVAE, split: splits.Split) -> Atlas:
  """Encodes the images of a split, and computes the rest."""
  codes = of_posterior(trained, measure.encode(trained, split))
  means, positions = codes['mean'], codes['positions']
  draws = _draw(trained, split, codes)
  plane, holes = latents.Plane.of(means), None
  prior = trained.prior
  # As in the evaluation: an autoregressive prior draws one code at a time.
  if not (isinstance(prior, discrete.CodePrior) and prior.network):
    of_prior = trained.sample_latents(_NUM_DRAWS).reshape(_NUM_DRAWS, -1)
    holes = latents.HoleMap.of(plane.project(of_prior), plane.project(draws))
  found = split.labels()
  labels = {}
  for name in found.names if found else ():
    column = found.values[positions, found.names.index(name)]
    labels[name] = column, found.class_names(name)
  ways = {}
  for name, (values, names) in labels.items():
    if len(names) == 2:
      ways[name] = latents.direction(means, values)
    elif name in found.classes and len(names) <= _MAX_CLASSES:
      for index, of_class in enumerate(names):
        way = latents.direction(means, values == index)
        ways[f'{name}: {of_class}'] = way

  def images(indices):
    return next(split.batches(positions[indices], len(indices)))

  return Atlas(
    codes,
    plane,
    plane.project(means),
    latents.bands(draws),
    holes,
    split.num_examples,
    labels,
    {name: way for name, way in ways.items() if way is not None},
    NearestNeighbors().fit(means),
    images,
  )


def of_posterior(trained, codes: dict[str, Any]) -> dict[str, Any]:
  """Codes without the variance that an autoencoder without sampling lacks."""
  if trained.config.objective.get('sample_posterior', True):
    return codes
  return {k: v for k, v in codes.items() if k not in ('logvar', 'kl')}


def _draw(
  trained: TrainedVAE, split: splits.Split, codes: dict[str, np.ndarray]
) -> np.ndarray:
  """Draws from q(z), [n, latent_dim]."""
  if not trained.config.objective.get('sample_posterior', True):
    return codes['mean']
  if {'logvar', 'certain'} & codes.keys():
    spread = np.arange(_NUM_DRAWS) % len(codes['mean'])
    names = codes.keys() & {'mean', 'logvar', 'certain'}
    return posterior.draw({name: codes[name][spread] for name in names}, 0)
  # Of a posterior with a full covariance, or a flow.
  draws, done = [], 0
  of_each = -(-_NUM_DRAWS // len(codes['mean']))
  for examples in conditioning.batches(
    trained.config, split, codes['positions'], _BATCH_SIZE
  ):
    encoded = trained.encode(*examples)
    at = np.arange(done, done + len(examples.images))
    keys = numerics.example_keys(numerics.measure_key(0), at)
    draws.append(np.asarray(encoded.sample(keys, of_each)))
    done += len(at)
  return np.concatenate(draws, axis=1).reshape(of_each * done, -1)
