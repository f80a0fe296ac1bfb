"""What the tests share: a small config, and a small data set on disk."""

import os
import pathlib

# Many tests, and the processes that they start, compile the same programs.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(__file__).resolve().parent.parent / '.pytest_cache' / 'jax'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
# One that reads what another is still writing says so, and compiles it itself.
os.environ.setdefault(
  'PYTHONWARNINGS', 'ignore:Error reading persistent compilation cache'
)

from etils import epath
import numpy as np
import pytest

from configs import default
from data import cartoon_faces
import input_pipeline
from runs import metric_writer
from tests import bucket_server
from tests import preloaded
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The files that take longest: whoever runs files side by side, as `make test`
# does, begins with these, so as not to end with one of them alone.
LONGEST = (
  'test_sweep.py',
  'test_main.py',
  'test_training.py',
  'test_population.py',
  'test_numerics.py',
  'test_evaluate.py',
  'test_sweep_study.py',
  'test_sweep_report.py',
  'test_bucket_runs.py',
  'test_benchmarks.py',
  'test_tpu_compile.py',
)

# Train, validation and test images of the small data set.
SPLIT_SIZES = (40, 11, 5)


def pytest_collection_modifyitems(items):
  """Puts the longest files first, and leaves each in its order."""
  place = {name: index for index, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_sessionfinish():
  """Ends the processes that scripts were run from."""
  preloaded.stop()


def pytest_terminal_summary(terminalreporter):
  """Ends with a table of the faults that were tried, as Markdown."""
  rows = [
    value
    for report in terminalreporter.getreports('passed')
    for name, value in report.user_properties
    if name == 'faults' and report.when == 'call'
  ]
  if not rows:
    return
  terminalreporter.section('faults')
  terminalreporter.line('| fault | tried | survived | lost |')
  terminalreporter.line('| --- | ---: | ---: | --- |')
  for fault, tried, survived, lost in rows:
    terminalreporter.line(f'| {fault} | {tried} | {survived} | {lost} |')


def write_faces(folder, names, seed='tests'):
  """Writes a cartoon face as 178×218 JPEG for each name.

  Returns:
    What shows in each: attributes as CelebA names them, bool [num_names].
  """
  factors = cartoon_faces.sample_factors(seed, len(names))
  for name, row in zip(names, factors, strict=True):
    labels = dict(zip(cartoon_faces.FACTORS, map(int, row), strict=True))
    image = cartoon_faces.encode_jpeg(cartoon_faces.render(labels))
    (folder / name).write_bytes(image.getvalue())
  drawn = {
    name: np.array(values)[column]
    for (name, values), column in zip(
      cartoon_faces.FACTORS.items(), factors.T, strict=True
    )
  }
  return {
    'Bald': drawn['hair_style'] == 'none',
    'Eyeglasses': drawn['glasses'],
    'Mouth_Slightly_Open': drawn['mouth_open'] > 0,
    'Smiling': drawn['mouth_curve'] > 0,
  }


@pytest.fixture(scope='session')
def celeba_dir(tmp_path_factory):
  """A folder as the official archive unpacks, with few images."""
  folder = tmp_path_factory.mktemp('celeba')
  (folder / 'img_align_celeba').mkdir()
  numbers = np.repeat([0, 1, 2], SPLIT_SIZES)
  names = [f'{i:06d}.jpg' for i in range(1, len(numbers) + 1)]
  attributes = write_faces(folder / 'img_align_celeba', names)
  rows = [f'{n} {p}\n' for n, p in zip(names, numbers, strict=True)]
  (folder / 'list_eval_partition.txt').write_text(''.join(rows))
  signs = np.where(np.stack(list(attributes.values()), axis=-1), '1', '-1')
  rows = [f'{n} {" ".join(s)}\n' for n, s in zip(names, signs, strict=True)]
  head = f'{len(names)}\n{" ".join(attributes)}\n'
  (folder / 'list_attr_celeba.txt').write_text(head + ''.join(rows))
  return folder


def make_small_config(data_dir):
  """A valid config that trains in seconds."""
  config = default.get_config()
  config.seed = 7
  config.data.source = 'celeba'
  config.data.dir = str(data_dir)
  config.data.decoded_dir = ''
  config.data.image_size = 16
  config.model.hidden_channels = (4, 8)
  config.model.latent_dim = 3
  config.train.batch_size = 8
  config.train.num_epochs = 3
  config.train.steps_per_dispatch = 2
  config.train.log_every_steps = 2
  return config


@pytest.fixture
def small_config(celeba_dir):
  """See `make_small_config`."""
  return make_small_config(celeba_dir)


@pytest.fixture
def storage_server():
  """A Google Cloud Storage with an empty bucket named 'bucket'."""
  with bucket_server.serve() as server:
    yield server


@pytest.fixture(scope='session')
def trained_run(celeba_dir, tmp_path_factory):
  """The workdir of a small finished run, of two latent dimensions.

  Its readers leave it as it is, but for their own folders in it.
  """
  workdir = epath.Path(tmp_path_factory.mktemp('trained_run'))
  config = make_small_config(celeba_dir)
  config.model.latent_dim = 2
  config.model.sigma = 0.3
  data = input_pipeline.load(config)
  writer = metric_writer.MetricWriter(workdir)
  train.train_and_evaluate(config, workdir, data, writer)
  writer.close()
  return workdir


@pytest.fixture(scope='session')
def inception_file(tmp_path_factory):
  """An archive with a small network in the place of Inception."""
  from tests import test_fid

  path = tmp_path_factory.mktemp('inception') / 'inception.tgz'
  graph = test_fid.make_graph(side=21).SerializeToString()
  path.write_bytes(test_fid.pack(graph))
  return path
