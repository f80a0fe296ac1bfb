"""Fixtures of many tests: a small config, a small data set, a trained run.

TensorFlow is imported by the fixtures that need it, as most tests do not.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import tarfile
from unittest import mock

# Optimising the programs of tests takes longer than running them; the fixture
# `users_programs` is for those that need what users run.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
# Tests, and the processes that they start, compile the same programs.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(__file__).resolve().parent.parent / '.pytest_cache' / 'jax'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
# A process warns if it reads a program that another one is still writing.
os.environ.setdefault(
  'PYTHONWARNINGS', 'ignore:Error reading persistent compilation cache'
)

from etils import epath
import numpy as np
import pytest

from configs import default
from runs import progress
from tests import bucket_server
import train
from vae import paths, splits

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The files that take longest. Workers that share the files, as in `make test`,
# begin with them, so that none of them is left for the end.
LONGEST = (
  'test_family.py',
  'test_doc_commands.py',
  'test_benchmarks.py',
  'test_bucket_runs.py',
  'test_sweep.py',
  'test_main.py',
  'test_docs.py',
  'test_models.py',
  'test_devices.py',
  'test_export.py',
  'test_pca.py',
  'test_tpu_compile.py',
  'test_steps.py',
  'test_explorer_page.py',
  'test_estimators.py',
  'test_population.py',
  'test_trackers.py',
  'test_numerics.py',
  'test_sweep_worker.py',
)

# Train, validation and test images of the small data set.
SPLIT_SIZES = (40, 11, 5)


def pytest_collection_modifyitems(items):
  """Puts the longest files first, and leaves each in its order."""
  place = {name: index for index, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Gives each file to one worker, and test_family.py in parts."""
  from xdist.scheduler import LoadFileScheduling

  from tests import test_family

  class Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid):
      return super()._split_scope(nodeid) + test_family.part_of(nodeid)

  return Scheduling(config, log)


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
    Attributes of each, as CelebA names them, bool [num_names].
  """
  from data import cartoon_faces

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
  """A folder as the official archive unpacks to, with few images."""
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


@pytest.fixture(scope='module')
def users_programs():
  """Processes that the module's tests start optimise programs as for users."""
  with mock.patch.dict(os.environ, {'XLA_FLAGS': ''}):
    yield


@pytest.fixture(scope='session')
def onnxruntime_web(request):
  """The folder dist of onnxruntime-web, fetched by npm once."""
  if shutil.which('npm') is None:
    pytest.skip('npm is not installed')
  folder = pathlib.Path(request.config.cache.mkdir('onnxruntime-web'))
  if not list(folder.glob('*.tgz')):
    command = ['npm', 'pack', 'onnxruntime-web@1.30.0', '--silent']
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
  (archive,) = folder.glob('*.tgz')
  dist = folder / 'package' / 'dist'
  if not dist.exists():
    with tarfile.open(archive) as file:
      file.extractall(folder, filter='data')
  return dist


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


def everything(split):
  """All images of a split, in order."""
  batches = split.batches(np.arange(split.num_examples), 16)
  return np.concatenate(list(batches))


class Rows(progress.Writer):
  """A writer that keeps the rows, without the speed, and takes them back."""

  def __init__(self, rows=()):
    self.rows = list(rows)

  def rewind(self, step, validated):
    self.rows = [
      row
      for row in self.rows
      if (row['step'], 'val/loss' in row) <= (step, validated)
    ]

  def write_scalars(self, step, scalars):
    scalars = {k: v for k, v in scalars.items() if k != 'images_per_second'}
    self.rows.append({'step': step, **scalars})


def make_data(image_shape=(16, 16, 3)):
  """Random images, as many of each split as the small data set has."""
  generator = np.random.default_rng(0)
  pixels = generator.integers(0, 256, (sum(SPLIT_SIZES), *image_shape))
  parts = np.split(pixels.astype(np.uint8), np.cumsum(SPLIT_SIZES)[:-1])
  return splits.DataSet(
    *(
      splits.ArraySplit(
        part, splits.Labels(('parity',), np.arange(len(part))[:, None] % 2)
      )
      for part in parts
    )
  )


@pytest.fixture(scope='session')
def trained_run(celeba_dir, tmp_path_factory):
  """The workdir of a small finished run, of two latent dimensions.

  Tests leave it as it is, but for folders of their own in it.
  """
  import input_pipeline
  from runs import metric_writer

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


@pytest.fixture(scope='module')
def running():
  """A bucket server that all clients of this process are sent to."""
  with (
    contextlib.closing(bucket_server.Server()) as server,
    mock.patch.dict(os.environ, server.environment()),
  ):
    yield server


@pytest.fixture
def remote(running, tmp_path):
  """A folder in the bucket that no other test has; its name is a pattern."""
  return paths.expand(f'gs://bucket/{tmp_path.name}/lr=[0.1]?*/run')


@pytest.fixture(params=['disk', 'bucket'])
def workdir(request, tmp_path):
  """A folder of each kind."""
  if request.param == 'disk':
    return paths.expand(tmp_path)
  return request.getfixturevalue('remote')
