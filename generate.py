"""Makes pictures with a trained model.

  python generate.py sample --workdir=logs/celeba --num_images=64
  python generate.py reconstruct --workdir=logs/celeba --images=a.jpg,b.jpg
  python generate.py interpolate --workdir=logs/celeba --images=a.jpg,b.jpg
  python generate.py traverse --workdir=logs/celeba
  python generate.py manifold --workdir=logs/mnist
  python generate.py decode --workdir=logs/mnist --z=0.3,-1.2

The pictures go to WORKDIR/generated/COMMAND_STEP, with the flags that are not
the default ones: another call has another folder, and the same call makes its
pictures again.
"""

from typing import Any

from absl import flags
from etils import epath
import numpy as np

from data import image_files
from evaluation import measure, plots, posterior, reconstruction
import input_pipeline
from runs import command_line, run_flags
from vae import conditioning, figures, splits
from vae.errors import UserError
from vae.loading import TrainedVAE

flags.adopt_module_key_flags(run_flags)
flags.adopt_module_key_flags(command_line)
_NUM_IMAGES = flags.DEFINE_integer(
  'num_images', 64, 'sample: how many; reconstruct: how many of the split.', 1
)
_PRIOR = flags.DEFINE_enum(
  'prior',
  'model',
  ['model', 'mixture'],
  "sample: the model's own prior, or a mixture fitted to q(z).",
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 1.0, 'sample: factor on the deviation of the prior N(0, I).', 0
)
_IMAGES = flags.DEFINE_list(
  'images', [], 'Image files; of traverse one, to start from.'
)
_CROP_SIZE = flags.DEFINE_integer(
  'crop_size',
  None,
  'Side of the central square that is cut out of the image files, as '
  'config.data.crop_size is for the training; by default the largest.',
  1,
)
_STEPS = flags.DEFINE_integer(
  'steps', 11, 'interpolate, traverse: images in a row.', 2
)
_DIMENSIONS = flags.DEFINE_integer(
  'dimensions', 10, 'traverse: how many dimensions.', 1
)
_SIDE = flags.DEFINE_integer('side', 20, 'manifold: images along a side.', 2)
_Z = flags.DEFINE_list(
  'z', None, 'decode: the numbers of a latent, all of them.'
)
_LABEL = flags.DEFINE_string(
  'label', None, 'manifold: label that gives the colours; else the first.'
)
_CLASS = flags.DEFINE_integer(
  'class',
  None,
  'Class that a conditional model is given; else samples take the classes in '
  'turn, images of the split have theirs (a row of interpolate that of its '
  'first image), and other pictures are of class 0.',
  0,
)

# Pairs of the split's images to interpolate between, without --images.
_NUM_PAIRS = 4
_REACH = 3.0  # Of traversals, in standard deviations of the prior N(0, I).
_FRAME_DURATION = 80  # Milliseconds.


def main(command: str) -> None:
  """Makes the pictures of a command."""
  trained = run_flags.restore()
  num_classes = conditioning.num_classes(trained.model)
  if _CLASS.value is not None and _CLASS.value >= num_classes:
    raise UserError(
      f'--class={_CLASS.value}: the model has {num_classes} classes.'
    )
  # In the name, so that no call overwrites another's pictures.
  changed = [flag for flag in _NAMED if flag.value != flag.default]
  name = [command, str(trained.step), *map(run_flags.in_name, changed)]
  folder = run_flags.output('generated', '_'.join(name))
  for file in COMMANDS[command](trained, folder):
    print(f'  {folder / file}')


def sample(trained: TrainedVAE, folder: epath.Path) -> list[str]:
  """Draws z, decodes it; a grid, and each image as a file."""
  seed, count = run_flags.SEED.value, _NUM_IMAGES.value
  if _PRIOR.value == 'model':
    try:
      images = trained.sample(
        count, seed, _TEMPERATURE.value, _labels(trained, count)
      )
    except ValueError as error:
      raise UserError(f'--{error}') from error
  else:
    codes = measure.encode(trained, _split(trained, 'train'))
    latents = codes['mean']
    if trained.config.objective.get('sample_posterior', True):
      if not {'logvar', 'certain'} & codes.keys():
        raise UserError(
          '--prior=mixture needs a model whose q(z|x) is a diagonal Gaussian.'
        )
      latents = posterior.draw(codes, seed)
    print('fitting the mixture …', flush=True)
    mixture = posterior.fit_mixture(latents, seed)
    z = mixture.sample(count)[0]
    labels = _labels(trained, count)
    if labels is None:
      labels = conditioning.in_turn(trained.model, count)
    images = _decode(trained, z, labels)
  _save_each(images, folder)
  return _save_grid(images, int(np.ceil(np.sqrt(count))), folder, '0000.png')


def reconstruct(trained: TrainedVAE, folder: epath.Path) -> list[str]:
  """Originals beside their reconstructions, and each of these as a file."""
  images, labels = _images(trained, _NUM_IMAGES.value)
  reconstructions = trained.reconstruct(images, labels=labels)
  _save_each(reconstructions, folder)
  pairs = figures.side_by_side(images, reconstructions)
  # An even number of columns keeps each pair together.
  columns = 2 * int(np.ceil(np.sqrt(len(images) / 2)))
  return _save_grid(pairs, columns, folder, '0000.png')


def interpolate(trained: TrainedVAE, folder: epath.Path) -> list[str]:
  """From each image to the next: a row by each of `figures.PATHS`."""
  images, labels = _images(trained, 2 * _NUM_PAIRS)
  if len(images) < 2:
    raise UserError('interpolate needs two images; name them with --images.')
  encoded = trained.encode(images, labels)
  mean = reconstruction.codes(encoded, trained.prior)['mean']
  first = range(0, len(mean) - 1, 1 if _IMAGES.value else 2)
  rows = [
    figures.interpolate(mean[i], mean[i + 1], _STEPS.value, path)
    for i in first
    for path in figures.PATHS
  ]
  if labels is not None:  # A row has the class of its first image.
    labels = np.repeat(labels[first], len(figures.PATHS) * _STEPS.value)
  images = _decode(trained, np.concatenate(rows), labels)
  return _save_grid(images, _STEPS.value, folder)


def traverse(trained: TrainedVAE, folder: epath.Path) -> list[str]:
  """A row for each of the most informative dimensions, and an animation."""
  if len(_IMAGES.value) > 1:
    raise UserError('traverse walks from one image; --images names several.')
  center = np.ravel(trained.prior.mean)
  if _IMAGES.value:
    center = np.ravel(trained.encode(*_images(trained, 1)).mean)
  codes = measure.encode(trained, _split(trained, run_flags.SPLIT.value))
  carried, unit = posterior.mean_variance(codes['mean']), 'variance'
  if 'kl' in codes and trained.config.objective.get('sample_posterior', True):
    carried, unit = codes['kl'].mean(axis=0), 'nats'
  dimensions = posterior.most_informative(carried)[: _DIMENSIONS.value]
  listed = ', '.join(f'{d} ({carried[d]:.2f} {unit})' for d in dimensions)
  print(f'from the top: {listed}')
  values = figures.prior_values(trained.prior, _REACH, _STEPS.value)
  z = figures.traverse(center, dimensions, values)
  z = z.reshape(-1, len(center))
  images = _decode(trained, z, _labels(trained, len(z), 0))

  # All dimensions move at once, each in its own image, there and back.
  there = images.reshape(len(dimensions), _STEPS.value, *images.shape[1:])
  frames = [
    figures.image_grid(there[:, step], columns=min(5, len(dimensions)))
    for step in (*range(_STEPS.value), *range(_STEPS.value - 2, 0, -1))
  ]
  animation = figures.gif(frames, _FRAME_DURATION)
  (folder / 'traversals.gif').write_bytes(animation)
  return _save_grid(images, _STEPS.value, folder, 'traversals.gif')


def manifold(trained: TrainedVAE, folder: epath.Path) -> list[str]:
  """The decoded plane, and the posterior means in it."""
  latent_dim = int(np.prod(trained.latent_shape))
  if latent_dim != 2:
    raise UserError(
      f'manifold needs a model with 2 latent dimensions; this one has '
      f'{latent_dim}. traverse works with any.'
    )
  split = _split(trained, run_flags.SPLIT.value)
  labels = split.labels()
  if _LABEL.value and (labels is None or _LABEL.value not in labels.names):
    known = ', '.join(labels.names) if labels else 'none'
    raise UserError(f'--label={_LABEL.value}: the labels are: {known}.')
  codes = measure.encode(trained, split)
  colors, names = np.zeros(len(codes['mean']), int), ['']
  if labels is not None:
    column = labels.names.index(_LABEL.value) if _LABEL.value else 0
    colors = labels.values[codes['positions'], column]
    names = labels.class_names(labels.names[column])
  figure = plots.latent_scatter(codes['mean'], colors, names)
  (folder / 'means.png').write_bytes(plots.png(figure))
  z = figures.manifold(trained.prior, _SIDE.value)
  images = _decode(trained, z, _labels(trained, len(z), 0))
  return _save_grid(images, _SIDE.value, folder, 'means.png')


def decode(trained: TrainedVAE, folder: epath.Path) -> list[str]:
  """The image of one latent, as explore.py's commands name it."""
  size = int(np.prod(trained.latent_shape))
  try:
    z = np.array([float(value) for value in _Z.value or ()], np.float32)
  except ValueError as error:
    raise UserError(f'--z: {error}.') from error
  if len(z) != size or not np.all(np.isfinite(z)):
    raise UserError(
      f'--z has {len(z)} numbers; the model needs {size}, all finite.'
    )
  images = _decode(trained, z, _labels(trained, 1, 0))
  _save_each(images, folder)
  return ['0000.png']


# Flags that pictures depend on, besides the checkpoint.
_NAMED = (
  *(_NUM_IMAGES, _PRIOR, _TEMPERATURE, run_flags.SEED),
  *(_STEPS, _DIMENSIONS, _SIDE, _LABEL, _CLASS, _Z),
  *(run_flags.SPLIT, run_flags.DATA_DIR, _IMAGES, _CROP_SIZE),
)
COMMANDS = {
  f.__name__: f
  for f in (sample, reconstruct, interpolate, traverse, manifold, decode)
}


def _images(trained: TrainedVAE, count: int) -> splits.Examples:
  """The images that the user named, or else the first `count` of the split."""
  if _IMAGES.value:
    shape, size = trained.model.image_shape, _CROP_SIZE.value
    files = [image_files.load(path, shape, size) for path in _IMAGES.value]
    if conditioning.num_classes(trained.model) and _CLASS.value is None:
      raise UserError('--images: the model sees classes; name one by --class.')
    return splits.Examples(np.stack(files), _labels(trained, len(files)))
  split = _split(trained, run_flags.SPLIT.value)
  positions = np.arange(min(count, split.num_examples))
  examples = next(
    conditioning.batches(trained.config, split, positions, len(positions))
  )
  if _CLASS.value is None:
    return examples
  return examples._replace(labels=_labels(trained, len(positions)))


def _labels(
  trained: TrainedVAE, count: int, default: int | None = None
) -> np.ndarray | None:
  """The class that the user or else `default` gives, [count]."""
  num_classes = conditioning.num_classes(trained.model)
  value = default if _CLASS.value is None else _CLASS.value
  if not num_classes or value is None:
    return None
  return np.full(count, value)


def _split(trained: TrainedVAE, name: str) -> splits.Split:
  # Few images of a split are needed, not all in memory.
  trained.config.data.cache = 'none'
  data = input_pipeline.load(trained.config)
  run_flags.check_data(trained.config, data)
  return getattr(data, name)


def _decode(trained: TrainedVAE, z: np.ndarray, labels: Any) -> np.ndarray:
  """Images of latents [n, latent_dim], with all axes of z in one."""
  return trained.decode(z.reshape(-1, *trained.latent_shape), labels)


def _save_each(images: np.ndarray, folder: epath.Path) -> None:
  for index, image in enumerate(figures.to_uint8(images)):
    figures.save_png(image, folder / f'{index:04d}.png')


def _save_grid(
  images: np.ndarray, columns: int, folder: epath.Path, *others: str
) -> list[str]:
  """Writes the grid; returns the names of all files to print."""
  figures.save_png(figures.image_grid(images, columns), folder / 'grid.png')
  return ['grid.png', *others]


if __name__ == '__main__':
  command_line.run(main, tuple(COMMANDS))
