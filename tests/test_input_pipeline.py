"""Decoding, caching and corrupt images of any source."""

import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from data import image_files
import input_pipeline
from runs import processes
from tests.conftest import (
  everything,
  make_small_config,
  SPLIT_SIZES,
  write_faces,
)
from vae import devices, splits
from vae.errors import UserError


@pytest.fixture
def own_config(celeba_dir, tmp_path):
  """A config with a copy of the images, kept decoded."""
  folder = shutil.copytree(celeba_dir, tmp_path / 'celeba')
  config = make_small_config(folder)
  config.data.decoded_dir = str(tmp_path / 'new' / 'decoded')
  return config


def image_path(config, number):
  folder = pathlib.Path(config.data.dir, 'img_align_celeba')
  return folder / f'{number:06d}.jpg'


def truncate(config, number):
  path = image_path(config, number)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fails(config, match):
  with pytest.raises(UserError, match=match) as caught:
    everything(input_pipeline.load(config).train)
  assert str(caught.value).isprintable()
  return str(caught.value)


def test_cache_changes_nothing(small_config):
  order = np.random.default_rng(0).permutation(40)[:37]
  results = []
  for cache in ('none', 'host', 'device', 'auto'):
    small_config.data.cache = cache
    split = input_pipeline.load(small_config).train
    if cache == 'device':
      stored = splits.unpack_tiles(splits.stored_images(split), (16, 16, 3))
      np.testing.assert_array_equal(stored, everything(split))
    batches = list(split.batches(order, 8))
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5]
    results.append(np.concatenate(batches))
  for result in results:
    np.testing.assert_array_equal(result, everything(split)[order])


@pytest.mark.parametrize('kind', ['fixed', 'threshold'])
def test_binary_images_are_the_same_wherever_they_are_kept(small_config, kind):
  small_config.data.channels = 1
  grey = everything(input_pipeline.load(small_config).train)
  small_config.data.binarize = kind
  order = np.random.default_rng(0).permutation(40)
  found = []
  for cache in ('none', 'host'):
    small_config.data.cache = cache
    split = input_pipeline.load(small_config).train
    found.append(np.concatenate(list(split.batches(order, 7))))
  np.testing.assert_array_equal(*found)
  assert set(np.unique(found[0])) == {0, 255}
  if kind == 'threshold':
    np.testing.assert_array_equal(found[0] == 255, grey[order] >= 128)
  else:  # Of each grey value its share is white.
    error = 0.5 / np.sqrt(grey.size)
    white = np.mean(found[0] == 255)
    assert abs(white - grey.mean() / 255) < 4 * error
    assert np.all(found[0][grey[order] == 255] == 255)


def test_images_are_decoded_when_the_data_is_loaded(small_config, capsys):
  images = input_pipeline.load(small_config)
  assert re.fullmatch(
    'train: decoding 40 images …\n'
    r'train: 40 decoded images in \S+s, 0 MB\n'
    'validation: decoding 11 images …\n'
    r'validation: 11 decoded images in \S+s, 0 MB\n',
    capsys.readouterr().out,
  )
  everything(images.train), everything(images.validation)
  assert not capsys.readouterr().out
  everything(images.test)
  assert 'test: decoding 5 images' in capsys.readouterr().out
  small_config.data.cache = 'none'
  everything(input_pipeline.load(small_config).train)
  assert not capsys.readouterr().out


def test_auto_caches_what_fits(small_config, monkeypatch):
  on_host = sum(SPLIT_SIZES) * 16 * 16 * 3
  # There an image of 768 bytes takes a tile.
  on_device = sum(SPLIT_SIZES) * 1024

  free = {}
  monkeypatch.setattr(processes, 'free_memory', lambda: free['host'])
  monkeypatch.setattr(devices, 'free_memory', lambda: free['device'])
  for host, device, cache in (
    (2 * on_host, None, 'none'),
    (2 * on_host, 10 * on_device, 'none'),
    (2 * on_host + 2, None, 'host'),
    (2 * on_host + 2, 2 * on_device, 'host'),
    (2 * on_host + 2, 2 * on_device + 2, 'device'),
  ):
    free.update(host=host, device=device)
    found = input_pipeline._choose_cache('auto', sum(SPLIT_SIZES), (16, 16, 3))
    assert found == cache
  free.update(host=on_host - 1, device=on_device - 1)
  for cache in ('host', 'device'):
    small_config.data.cache = cache
    fails(small_config, f'cache is {cache}, but .* use none or auto')


def test_the_second_run_decodes_nothing(own_config, monkeypatch, capsys):
  truncate(own_config, 4)
  own_config.data.skip_corrupt = True
  first = input_pipeline.load(own_config)
  monkeypatch.setattr(image_files.Crop, 'decode', None)
  for cache in ('host', 'device'):
    own_config.data.cache = cache
    second = input_pipeline.load(own_config)
    for name in ('train', 'validation'):
      ours, theirs = everything(getattr(first, name)), getattr(second, name)
      np.testing.assert_array_equal(ours, everything(theirs))
  assert 'train: 39 decoded images' in capsys.readouterr().out


def replace_image(config):
  shutil.copy(image_path(config, 41), image_path(config, 2))


def cut_kept_files(config):
  kept = list(pathlib.Path(config.data.decoded_dir).glob('*.npy'))
  assert len(kept) == 2
  for path in kept:
    path.write_bytes(path.read_bytes()[:-100])


def crop_otherwise(config):
  config.data.crop_size = 100


@pytest.mark.parametrize(
  'change', [replace_image, cut_kept_files, crop_otherwise]
)
def test_images_on_disk_are_used_only_if_they_are_right(own_config, change):
  input_pipeline.load(own_config)
  change(own_config)
  second = everything(input_pipeline.load(own_config).train)
  own_config.data.cache = 'none'
  streamed = everything(input_pipeline.load(own_config).train)
  np.testing.assert_array_equal(second, streamed)


def test_a_flipped_bit_anywhere_on_disk_is_seen(tmp_path):
  path = tmp_path / 'a.npy'
  array = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
  input_pipeline.keep_array(path, array)
  content = bytearray(path.read_bytes())
  np.testing.assert_array_equal(input_pipeline.read_array(path), array)
  for place in range(len(content)):
    content[place] ^= 1 << place % 8
    path.write_bytes(content)
    found = input_pipeline.read_array(path)
    content[place] ^= 1 << place % 8
    # The blanks in the head may be others.
    assert found is None or np.array_equal(found, array)
    assert found is None or place < len(content) - array.nbytes - 4


def test_a_full_disk_is_one_line(own_config, monkeypatch, capsys):
  def save(file, array, allow_pickle):
    file.write(b'the first bytes')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'save', save)
  images = input_pipeline.load(own_config, decode=('train',))
  assert len(everything(images.train)) == 40
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and 'config.data.decoded_dir' in err
  assert not list(pathlib.Path(own_config.data.decoded_dir).glob('*'))


def test_corrupt_images_are_named(own_config):
  image_path(own_config, 9).write_bytes(b'not a JPEG')
  truncate(own_config, 4)
  message = fails(own_config, 'cannot be decoded .the first: .*truncated')
  assert '000004.jpg' in message and '000009.jpg' in message
  assert '000005.jpg' not in message and 'skip_corrupt=True' in message


def test_an_image_that_vanishes_while_training_is_named(own_config):
  own_config.data.cache = 'none'
  split = input_pipeline.load(own_config).train
  image_path(own_config, 7).unlink()
  batches = split.batches(np.arange(40), 4)
  next(batches)
  with pytest.raises(UserError, match='000007.jpg cannot .*No such file'):
    next(batches)


@pytest.mark.parametrize('cache', ['none', 'host'])
def test_corrupt_images_are_skipped_and_counted(
  own_config, celeba_dir, cache, capsys
):
  whole = input_pipeline.load(make_small_config(celeba_dir))
  own_config.data.cache = cache
  own_config.data.skip_corrupt = True
  image_path(own_config, 4).write_bytes(b'')
  truncate(own_config, 40)
  found = input_pipeline.load(own_config)
  identity, first = found.identity(), whole.identity()
  assert identity['train'] == 38
  assert identity['train_names'] != first['train_names']
  assert identity['validation_names'] == first['validation_names']
  kept = np.delete(np.arange(40), [3, 39])
  for read in everything, lambda split: split.labels().values:
    np.testing.assert_array_equal(read(found.train), read(whole.train)[kept])
  assert 'train: skipped 2 of 40 images' in capsys.readouterr().err


def test_empty_splits_and_large_batches_are_refused(own_config):
  own_config.train.batch_size = 48
  fails(own_config, 'batch_size is 48, but the train split has only 40')
  own_config.data.skip_corrupt = True
  own_config.train.batch_size = 40
  for number in range(41, 52):
    image_path(own_config, number).write_bytes(b'')
  fails(own_config, 'the validation split of .* has no images')
  image_path(own_config, 1).write_bytes(b'')
  shutil.copy(image_path(own_config, 2), image_path(own_config, 41))
  fails(own_config, 'the train split has only 39')


def test_identity_is_of_names_and_their_order(tmp_path, small_config):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  write_faces(tmp_path / 'a' / 'b', [f'{i}.jpg' for i in range(50)])
  small_config.data.source = 'folder'
  small_config.train.batch_size = 1

  def identity(folder='a', cache='none'):
    small_config.data.dir = f'{tmp_path}/{folder}'
    small_config.data.cache = cache
    return input_pipeline.load(small_config).identity()

  first = identity()
  assert first['train'] + first['validation'] < 50
  # Wherever they lie, and whenever they were written.
  shutil.copytree(tmp_path / 'a', tmp_path / 'c', copy_function=shutil.copy)
  assert identity('c') == first == identity('a', 'host')
  for number in range(5):  # In whatever split.
    path = tmp_path / 'a' / 'b' / f'{number}.jpg'
    os.rename(path, f'{path}.png')
    assert identity() != first
    os.rename(f'{path}.png', path)
  assert identity() == first
