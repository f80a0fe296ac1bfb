"""FID and KID: how far a model's images are from real ones."""

from collections.abc import Callable
import functools

import jax
import numpy as np

from evaluation import feature_distances
from evaluation import inception
from evaluation import per_image
from evaluation.measurements import Measurements
from runs.progress import track
from vae import devices
from vae import figures
from vae import splits
from vae.loading import TrainedVAE

# Images that go through the Inception network at a time, on each device, if
# there are as many: what a batch lacks is computed for nothing.
_INCEPTION_BATCH_SIZE = 32


def add(
  results: Measurements,
  trained: TrainedVAE,
  split: splits.Split,
  inception_variables: dict,
  batch_size: int,
  seed: int,
) -> None:
  """Adds FID and KID of samples and of reconstructions.

  Args:
    results: to be added to.
    trained: the model.
    split: whose images are the real ones, and are reconstructed.
    inception_variables: of the network behind both.
    batch_size: of what the model makes.
    seed: of the samples, and of the subsets behind KID.
  """
  extract = _extract()
  variables = devices.replicate(inception_variables)
  num_devices = jax.local_device_count()
  per_device = -(-split.num_examples // num_devices)
  inception_batch_size = min(_INCEPTION_BATCH_SIZE, per_device) * num_devices

  def features(label, images):
    source = images if hasattr(images, 'batches') else splits.ArraySplit(images)
    with track(f'Inception features of {label}', split.num_examples) as tell:
      return per_image.over_split(
        lambda batch, start: extract(variables, batch),
        source,
        inception_batch_size,
        tell,
      )

  real = features('images', split)
  print('decoding samples and reconstructions …', flush=True)
  z = np.random.default_rng(seed).standard_normal(
    (split.num_examples, *trained.latent_shape)
  )
  # As uint8, batch by batch: the floats of a large split fill the memory.
  samples = np.concatenate(
    [
      figures.to_uint8(trained.decode(z[start : start + batch_size]))
      for start in range(0, len(z), batch_size)
    ]
  )
  reconstructions = np.concatenate(
    [
      figures.to_uint8(trained.reconstruct(batch))
      for batch in split.batches(np.arange(split.num_examples), batch_size)
    ]
  )
  for name, images in (
    ('samples', samples),
    ('reconstructions', reconstructions),
  ):
    found = features(name, images)
    about = f'of {len(found):,} {name} against the {len(real):,} images'
    results.number(
      f'fid_{name}',
      feature_distances.fid(real, found),
      'Fréchet distance',
      about,
    )
    kid, _ = feature_distances.kid(real, found, seed=seed)
    results.number(f'kid_{name}', kid, 'squared MMD', about)


@functools.cache
def _extract() -> Callable[..., jax.Array]:
  """The network's features, compiled once for all models."""
  return jax.pmap(inception.features, in_axes=(None, 0))
