"""Makes pictures with a trained model.

  python generate.py sample --workdir=logs/celeba --num_images=64
  python generate.py reconstruct --workdir=logs/celeba --images=a.jpg,b.jpg
  python generate.py interpolate --workdir=logs/celeba --images=a.jpg,b.jpg
  python generate.py traverse --workdir=logs/celeba
  python generate.py manifold --workdir=logs/mnist

sample draws z from the prior, or from a mixture of Gaussians fitted to the
aggregate posterior (--prior=mixture), and decodes it. reconstruct and
interpolate take image files, or else images of a split. traverse walks along
the most informative dimensions, as a grid and an animated GIF. manifold draws
the plane of a model with two latent dimensions. The pictures go to
WORKDIR/generated/COMMAND_STEP, with the flags that are not the default ones;
so another call has another folder, and the same call makes its pictures anew.
"""

from absl import flags
from etils import epath
import numpy as np

from data import image_files
from evaluation import aggregate_posterior
from evaluation import plots
from evaluation import posterior
from runs import command_line
from runs import run_flags
from vae import figures
from vae import splits
from vae import walks
from vae.errors import shown
from vae.errors import UserError
from vae.loading import TrainedVAE

flags.adopt_module_key_flags(run_flags)
flags.adopt_module_key_flags(command_line)
_NUM_IMAGES = flags.DEFINE_integer(
  'num_images',
  64,
  'sample: how many; reconstruct: how many of the split.',
  lower_bound=1,
)
_PRIOR = flags.DEFINE_enum(
  'prior', 'normal', ['normal', 'mixture'], 'sample: where z comes from.'
)
_COMPONENTS = flags.DEFINE_integer(
  'components',
  None,
  'sample: Gaussians of the mixture; by default as many as suit it best.',
  lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature',
  1.0,
  "sample: factor on the normal prior's standard deviation.",
  lower_bound=0.0,
)
_IMAGES = flags.DEFINE_list(
  'images',
  [],
  'reconstruct, interpolate: image files. traverse: one, to walk from instead '
  'of z = 0.',
)
_CROP_SIZE = flags.DEFINE_integer(
  'crop_size',
  None,
  'Side of the central square that is cut out of the image files, as '
  'config.data.crop_size is for the training; by default the largest.',
  lower_bound=1,
)
_STEPS = flags.DEFINE_integer(
  'steps', 11, 'interpolate, traverse: images in a row.', lower_bound=2
)
_DIMENSIONS = flags.DEFINE_integer(
  'dimensions', 10, 'traverse: how many dimensions.', lower_bound=1
)
_REACH = flags.DEFINE_float(
  'reach',
  3.0,
  'traverse: how far to go, in standard deviations of the prior.',
  lower_bound=0.0,
)
_SIDE = flags.DEFINE_integer(
  'side', 20, 'manifold: images along a side.', lower_bound=2
)
_LABEL = flags.DEFINE_string(
  'label', None, 'manifold: which label gives the colours; else the first.'
)

# Of each command: the flags that its pictures depend on, besides the run's.
_OF_IMAGES = (run_flags.SPLIT, run_flags.DATA_DIR, _IMAGES, _CROP_SIZE)
COMMANDS = {
  'sample': (
    _NUM_IMAGES,
    _PRIOR,
    _COMPONENTS,
    _TEMPERATURE,
    run_flags.SEED,
    run_flags.DATA_DIR,
  ),
  'reconstruct': (_NUM_IMAGES, *_OF_IMAGES),
  'interpolate': (_STEPS, *_OF_IMAGES),
  'traverse': (_STEPS, _DIMENSIONS, _REACH, *_OF_IMAGES),
  'manifold': (_SIDE, _LABEL, run_flags.SPLIT, run_flags.DATA_DIR),
}

# Images whose posteriors say which dimensions are informative, and what the
# aggregate posterior is.
_MAX_ENCODED = 10_000

# Pairs of a split that are interpolated between where no images are named.
_NUM_PAIRS = 4

# Milliseconds of each frame of an animation.
_FRAME_DURATION = 80


def main(command: str) -> None:
  """Checks the flags, and makes the pictures of a command."""
  trained = run_flags.restore()
  if command == 'manifold' and trained.model.latent_dim != 2:
    raise UserError(
      f'manifold needs a model with 2 latent dimensions; this one has '
      f'{trained.model.latent_dim}. traverse works with any.'
    )
  folder = run_flags.output('generated', _folder_name(command, trained.step))
  make = {
    'sample': sample,
    'reconstruct': reconstruct,
    'interpolate': interpolate,
    'traverse': traverse,
    'manifold': manifold,
  }[command]
  for path in make(trained, folder):
    print(f'  {path}')


def _folder_name(command: str, step: int) -> str:
  """Another for other settings, so that no call overwrites another's."""
  changed = [flag for flag in COMMANDS[command] if flag.value != flag.default]
  return '_'.join([command, str(step), *map(run_flags.in_name, changed)])


def sample(trained: TrainedVAE, folder: epath.Path) -> list[epath.Path]:
  """Draws z, decodes it; a grid, and each image as a file."""
  seed, count = run_flags.SEED.value, _NUM_IMAGES.value
  if _PRIOR.value == 'normal':
    images = trained.sample(count, seed, _TEMPERATURE.value)
  else:
    mean, logvar = _encode_split(trained, 'train')
    latents = mean
    if trained.config.objective.sample_posterior:
      latents = aggregate_posterior.draw(mean, logvar, seed)
    if (_COMPONENTS.value or 1) > len(latents):
      raise UserError(
        f'--components={_COMPONENTS.value}: there are only {len(latents)} '
        'images to fit them to.'
      )
    print('fitting the mixture …', flush=True)
    mixture = aggregate_posterior.fit_mixture(latents, seed, _COMPONENTS.value)
    images = trained.decode(mixture.sample(count)[0])
  return _save_each(images, folder, columns=int(np.ceil(np.sqrt(count))))


def reconstruct(trained: TrainedVAE, folder: epath.Path) -> list[epath.Path]:
  """Originals beside their reconstructions, and each of these as a file."""
  images = _images(trained, _NUM_IMAGES.value)
  reconstructions = trained.reconstruct(images)
  pairs = figures.side_by_side(images, reconstructions)
  # An even number of columns keeps each pair together.
  columns = 2 * int(np.ceil(np.sqrt(len(images) / 2)))
  _save_each(reconstructions, folder, columns)
  return [_save_grid(pairs, columns, folder), folder / '0000.png']


def interpolate(trained: TrainedVAE, folder: epath.Path) -> list[epath.Path]:
  """From each image to the next: a row by each of `walks.PATHS`."""
  images = _images(trained, 2 * _NUM_PAIRS)
  if len(images) < 2:
    raise UserError('interpolate needs two images; name them with --images.')
  mean = trained.encode(images).mean
  starts = range(0, len(mean) - 1, 1 if _IMAGES.value else 2)
  rows = [
    walks.interpolate(mean[i], mean[i + 1], _STEPS.value, path)
    for i in starts
    for path in walks.PATHS
  ]
  decoded = trained.decode(np.concatenate(rows))
  return [_save_grid(decoded, _STEPS.value, folder)]


def traverse(trained: TrainedVAE, folder: epath.Path) -> list[epath.Path]:
  """A row for each of the most informative dimensions, and an animation."""
  center = np.zeros(trained.model.latent_dim)
  if len(_IMAGES.value) > 1:
    raise UserError('traverse walks from one image; --images names several.')
  if _IMAGES.value:
    center = trained.encode(_images(trained, 1)).mean[0]
  mean, logvar = _encode_split(trained, run_flags.SPLIT.value)
  if trained.config.objective.sample_posterior:
    carried, unit = posterior.kl(mean, logvar).mean(axis=0), 'nats'
  else:  # A plain autoencoder has no KL.
    carried, unit = posterior.mean_variance(mean), 'variance'
  dimensions = posterior.most_informative(carried)[: _DIMENSIONS.value]
  listed = ', '.join(f'{d} ({carried[d]:.2f} {unit})' for d in dimensions)
  print(f'from the top: {listed}')
  paths = walks.traverse(center, dimensions, _REACH.value, _STEPS.value)
  images = trained.decode(paths.reshape(-1, len(center)))
  grid = _save_grid(images, _STEPS.value, folder)

  # All dimensions move at once, each in its own image, there and back.
  there = images.reshape(len(dimensions), _STEPS.value, *images.shape[1:])
  columns = min(5, len(dimensions))
  frames = [
    figures.image_grid(there[:, step], columns)
    for step in (*range(_STEPS.value), *range(_STEPS.value - 2, 0, -1))
  ]
  animation = folder / 'traversals.gif'
  figures.save_gif(frames, animation, _FRAME_DURATION)
  return [grid, animation]


def manifold(trained: TrainedVAE, folder: epath.Path) -> list[epath.Path]:
  """The decoded plane, and where the posterior means lie in it."""
  split = _split(trained, run_flags.SPLIT.value)
  labels = split.labels()
  if _LABEL.value and (labels is None or _LABEL.value not in labels.names):
    known = ', '.join(labels.names) if labels else 'none'
    raise UserError(f'--label={_LABEL.value}: the labels are: {known}.')
  mean, _ = _encode(trained, split)
  colors, names = np.zeros(len(mean), int), ['']
  if labels is not None:
    column = labels.names.index(_LABEL.value) if _LABEL.value else 0
    colors = labels.values[_positions(split), column]
    names = labels.class_names(labels.names[column])
  images = trained.decode(walks.manifold(_SIDE.value))
  grid = _save_grid(images, _SIDE.value, folder)
  scatter = folder / 'means.png'
  unnamed = plots.latent_scatter(mean, colors, names, scatter)
  for index, name in unnamed.items():
    print(f'note: class {index} is {shown(name)}, for which there is no font.')
  return [grid, scatter]


def _images(trained: TrainedVAE, count: int) -> np.ndarray:
  """The images that the user named, or else the first `count` of the split."""
  if _IMAGES.value:
    shape = trained.model.image_shape
    return np.stack(
      [
        image_files.load(path, shape, _CROP_SIZE.value)
        for path in _IMAGES.value
      ]
    )
  split = _split(trained, run_flags.SPLIT.value)
  positions = np.arange(min(count, split.num_examples))
  return next(split.batches(positions, len(positions)))


def _split(trained: TrainedVAE, name: str) -> splits.Split:
  import input_pipeline  # TensorFlow takes seconds, and is not always needed.

  # Some images of a split are wanted, not all in memory.
  trained.config.data.cache = 'none'
  data = input_pipeline.load(trained.config)
  run_flags.check_data(data)
  return getattr(data, name)


def _positions(split: splits.Split) -> np.ndarray:
  return splits.spread(split.num_examples, _MAX_ENCODED)


def _encode(
  trained: TrainedVAE, split: splits.Split
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and logvar of at most `_MAX_ENCODED` images, evenly spread."""
  batches = split.batches(_positions(split), 256)
  means, logvars = zip(*map(trained.encode, batches), strict=True)
  return np.concatenate(means), np.concatenate(logvars)


def _encode_split(
  trained: TrainedVAE, name: str
) -> tuple[np.ndarray, np.ndarray]:
  return _encode(trained, _split(trained, name))


def _save_each(
  images: np.ndarray, folder: epath.Path, columns: int
) -> list[epath.Path]:
  for index, image in enumerate(figures.to_uint8(images)):
    figures.save_png(image, folder / f'{index:04d}.png')
  following = folder / f'{len(images):04d}.png'
  if following.exists():  # In a folder that --output names.
    print(f'note: {following} and those after it are of an earlier call.')
  return [_save_grid(images, columns, folder), folder / '0000.png']


def _save_grid(
  images: np.ndarray, columns: int, folder: epath.Path
) -> epath.Path:
  path = folder / 'grid.png'
  figures.save_png(figures.image_grid(images, columns), path)
  return path


if __name__ == '__main__':
  command_line.run(main, tuple(COMMANDS))
