"""A folder of images: its splits, classes and left-out files."""

import hashlib
import io
import os
import shutil

import ml_collections
import numpy as np
from PIL import Image
import pytest

import data
from data import SPLITS
from vae.errors import UserError


def write_images(folder, names):
  """Writes one PNG under each name."""
  file = io.BytesIO()
  Image.new('RGB', (4, 4)).save(file, 'PNG')
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())


def numbered(count, form='{}.png'):
  return [form.format(number) for number in range(count)]


def encoded(folder):
  config = ml_collections.ConfigDict({'source': 'folder', 'dir': str(folder)})
  return data.find(config)


def find(folder):
  """The images' paths by split."""
  return {
    split: {
      os.path.relpath(images.name(index), folder)
      for index in range(images.num_examples)
    }
    for split, images in encoded(folder).items()
  }


def find_classes(folder):
  """The class of each image by name."""
  found = {}
  for images in encoded(folder).values():
    labels = images.labels()
    assert labels.names == ('class',)
    for index, [value] in enumerate(labels.values):
      path = os.path.relpath(images.name(index), folder)
      found[path] = labels.class_names('class')[value]
  return found


def by_hash(names):
  """Splits by the hexadecimal digits of the names' hashes."""
  found = {split: set() for split in SPLITS}
  for name in names:
    tenth = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) * 10
    split = {0: 'validation', 1: 'test'}.get(tenth // 16**12, 'train')
    found[split].add(name)
  return found


def test_split_of_an_image_depends_on_its_name_alone(tmp_path):
  names = [*numbered(300), *numbered(200, 'a/b/{}.jpg')]
  write_images(tmp_path / 'data', names)
  first = find(tmp_path / 'data')
  assert first == by_hash(names)
  # Of 500, within four standard deviations.
  assert all(23 < len(first[split]) < 77 for split in ('validation', 'test'))
  shutil.copytree(tmp_path / 'data', tmp_path / 'elsewhere')
  assert find(tmp_path / 'elsewhere') == first
  more = numbered(60, 'new_{}.png')
  write_images(tmp_path / 'data', more)
  second = find(tmp_path / 'data')
  assert {s: second[s] - set(more) for s in SPLITS} == first


def test_small_folders_move_no_image_without_need(tmp_path):
  for count in range(1, 41):
    names = numbered(count)
    write_images(tmp_path, names)
    if count < 3:
      with pytest.raises(UserError, match='3 splits need at least 3'):
        find(tmp_path)
      continue
    found, wanted = find(tmp_path), by_hash(names)
    assert sum(map(len, found.values())) == count and all(found.values())
    moved = sum(len(found[split] - wanted[split]) for split in SPLITS)
    assert moved == sum(not wanted[split] for split in SPLITS)


@pytest.mark.parametrize(
  'folders', [('train', 'val', 'test'), ('Training', 'dev', 'TESTING')]
)
def test_folders_called_as_splits_are_these(tmp_path, capsys, folders):
  names = [numbered(20, folder + '/{}.png') for folder in folders]
  write_images(tmp_path, sum(names, ['curve.png', 'docs/0.png']))
  assert find(tmp_path) == dict(zip(SPLITS, map(set, names), strict=True))
  out = capsys.readouterr().out
  for split, folder in zip(SPLITS, folders, strict=True):
    assert f'{split}: 20 images of {folder}/' in out
  assert (
    '2 files that are hidden, no images, or in no split (curve.png, ' in out
  )


@pytest.mark.parametrize('missing', ['validation', 'test'])
def test_missing_split_is_cut_from_training(tmp_path, capsys, missing):
  [other] = {'validation', 'test'} - {missing}
  train = numbered(100, 'train/{}.png')
  write_images(tmp_path, train + numbered(30, f'{other}/{{}}.png'))
  found = find(tmp_path)
  assert found[other] == set(numbered(30, f'{other}/{{}}.png'))
  # A single missing split has the lowest tenth.
  assert found[missing] == by_hash(train)['validation']
  assert found['train'] == set(train) - found[missing]
  assert f'{missing}: 9 images chosen by the hash' in capsys.readouterr().out


def test_a_class_may_be_called_train(tmp_path, capsys):
  names = [numbered(9, c + '/{}.png') for c in ('car', 'plane', 'train')]
  write_images(tmp_path, sum(names, []))
  classes = find_classes(tmp_path)
  assert set(classes.values()) == {'car', 'plane', 'train'}
  assert 'train/ is a class' in capsys.readouterr().out
  write_images(tmp_path / 'alone', numbered(100, 'train/{}/0.png'))
  assert find(tmp_path / 'alone') == by_hash(numbered(100, 'train/{}/0.png'))


@pytest.mark.parametrize(
  ('folders', 'match'),
  [
    (('images', 'Val'), 'holds Val; there must be one folder for train'),
    (('train', 'val', 'dev'), 'holds dev, train, val; there .* at most one'),
    (('mnist/train', 'mnist/test'), 'mnist holds test, train, .*dir=.*mnist'),
  ],
)
def test_folders_that_do_not_tell_the_training_images(tmp_path, folders, match):
  write_images(tmp_path, sum((numbered(9, f + '/{}.png') for f in folders), []))
  with pytest.raises(UserError, match=match) as caught:
    find(tmp_path)
  assert '\n' not in str(caught.value)


def test_classes_are_below_the_splits_and_the_same_in_all(tmp_path):
  train = [n for d in range(10) for n in numbered(20, f'train/{d}/{{}}.png')]
  # The test split lacks some, and its first.
  test = [n for d in (3, 5, 9) for n in numbered(4, f'test/{d}/{{}}.png')]
  write_images(tmp_path, train + test)
  expected = {name: name.split('/')[1] for name in train + test}
  assert find_classes(tmp_path) == expected


def test_an_image_without_a_class_leaves_no_classes(tmp_path, capsys):
  names = [n for c in 'ab' for n in numbered(20, f'train/{c}/{{}}.png')]
  write_images(tmp_path, [*names, 'test/a/0.png', 'test/stray.png'])
  assert all(images.labels() is None for images in encoded(tmp_path).values())
  assert (
    'no classes: 1 of 42 images are in no sub-folder, such as test/stray.png'
    in capsys.readouterr().out
  )


def test_links_to_folders_are_followed_once(tmp_path):
  for name in 'abc':
    write_images(tmp_path / 'store' / name, numbered(10))
  top = tmp_path / 'data'
  write_images(top, numbered(10, 'd/{}.png'))
  for name in 'abc':
    (top / name).symlink_to(f'../store/{name}')
  # In circles, and again under a name that comes before the real one.
  (top / 'd' / 'root').symlink_to('..')
  (top / 'Again').symlink_to('d')
  classes = find_classes(top)
  assert set(classes.values()) == set('abcd') and len(classes) == 40
  (tmp_path / 'link').symlink_to('data')
  assert find(tmp_path / 'link') == find(top)


def test_other_files_are_left_out_and_counted(tmp_path, capsys):
  folder = tmp_path / '.cache'  # The folder itself may be hidden.
  names = [*numbered(30, 'a/{}.png'), *numbered(30, 'b/{}.png')]
  write_images(folder, names)
  first = find(folder)
  capsys.readouterr()
  hidden = ['._0.png', '.thumbnails/0.png', '__MACOSX/1.png', 'a/@eaDir/0.png']
  write_images(folder, hidden)
  for name in ('a.txt', 'b.TXT', 'README'):
    (folder / name).write_text('')
  assert find(folder) == first
  out = capsys.readouterr().out
  assert f'left out of {folder}: 7 files' in out and 'and 4 more' in out
  assert set(find_classes(folder).values()) == {'a', 'b'}


@pytest.mark.parametrize('name', ['cf[1]', 'two\nlines', b'\xff\xfe'])
def test_folders_and_files_may_have_any_name(tmp_path, name):
  folder = tmp_path / os.fsdecode(name)
  write_images(folder, [f'{i}{os.fsdecode(name)}.png' for i in range(9)])
  images = encoded(folder)['train']
  pairs = images.read(np.arange(images.num_examples), lambda content: content)
  assert all(c.startswith(b'\x89PNG') for _, c in pairs.as_numpy_iterator())
  assert len(list(pairs)) == images.num_examples


def test_folder_that_is_not_there(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='gone; there is no such folder'):
    find(tmp_path / 'gone')

  # Root may list everything, so the system's refusal is played.
  def refuse(path):
    raise PermissionError(13, 'Permission denied', path)

  write_images(tmp_path, numbered(9))
  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(UserError, match='cannot be read .Permission denied'):
    find(tmp_path)
