import hashlib
import io
import os
import shutil

import numpy as np
from PIL import Image
import pytest

from configs import celeba
from configs import faces
from data import image_files
from data import sources
import input_pipeline
from vae.errors import UserError

SPLITS = ('train', 'validation', 'test')


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


def find(folder):
  """The images' paths by split."""
  encoded = sources.find('folder', str(folder))
  return {
    split: {
      os.path.relpath(images.name(index), folder)
      for index in range(images.num_examples)
    }
    for split, images in encoded.items()
  }


def find_classes(folder):
  """The class of each image, by name, and the list of all."""
  found, known = {}, []
  for images in sources.find('folder', str(folder)).values():
    labels = images.labels()
    assert labels.names == ('class',)
    known.append(labels.classes['class'])
    for index, [value] in enumerate(labels.values):
      path = os.path.relpath(images.name(index), folder)
      found[path] = labels.class_names('class')[value]
  assert known[0] == known[1] == known[2]
  return found, known[0]


def tenth(name):
  """By the hash's hexadecimal digits."""
  return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) * 10 // 16**12


def by_hash(names):
  split = {0: 'validation', 1: 'test'}
  found = {name: split.get(tenth(name), 'train') for name in names}
  return {s: {n for n in names if found[n] == s} for s in SPLITS}


# Which images are in which split.


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


@pytest.mark.parametrize('missing', [('validation', 'test'), ('validation',)])
def test_small_folders_move_no_image_without_need(tmp_path, missing):
  folder = tmp_path / 'train' if len(missing) == 1 else tmp_path
  if len(missing) == 1:
    write_images(tmp_path, ['test/0.png'])
  names = []
  for number in range(40):
    name = os.path.relpath(folder / f'{number}.png', tmp_path)
    names.append(name)
    write_images(tmp_path, [name])
    if len(names) <= len(missing):
      with pytest.raises(UserError, match=f'at least {len(missing) + 1}'):
        find(tmp_path)
      continue
    found = find(tmp_path)
    wanted = by_hash(names)
    if 'test' not in missing:
      wanted['train'] |= wanted['test']
      wanted['test'] = {'test/0.png'}
    assert set.union(*found.values()) == set.union(*wanted.values())
    assert sum(map(len, found.values())) == len(set.union(*wanted.values()))
    assert all(found.values())
    moved = sum(len(found[split] - wanted[split]) for split in SPLITS)
    assert moved == sum(not wanted[split] for split in SPLITS)


@pytest.mark.parametrize(
  'folders',
  [
    ('train', 'val', 'test'),
    ('Training', 'Validation', 'Testing'),
    ('TRAIN', 'dev', 'Test'),
    ('train', 'valid', 'testing'),
  ],
)
def test_folders_called_as_splits_are_these(tmp_path, capsys, folders):
  names = [numbered(20, folder + '/{}.png') for folder in folders]
  write_images(tmp_path, sum(names, []))
  assert find(tmp_path) == dict(zip(SPLITS, map(set, names), strict=True))
  said = capsys.readouterr().out
  assert said.count('\n') == 1
  for split, folder in zip(SPLITS, folders, strict=True):
    assert f'{split} is {folder}/' in said


def test_missing_validation_split_is_cut_from_training(tmp_path, capsys):
  train = numbered(100, 'train/{}.png')
  test = numbered(30, 'test/{}.png')
  write_images(tmp_path, train + test)
  found = find(tmp_path)
  assert found['test'] == set(test)
  assert found['validation'] == by_hash(train)['validation']
  assert found['train'] == set(train) - found['validation']
  said = capsys.readouterr().out
  assert 'validation is a tenth of train/, by the hashes of the names' in said


def test_missing_test_split_is_cut_from_training(tmp_path, capsys):
  train = numbered(100, 'train/{}.png')
  val = numbered(30, 'val/{}.png')
  write_images(tmp_path, train + val)
  found = find(tmp_path)
  assert found['validation'] == set(val)
  assert found['test'] and found['test'] | found['train'] == set(train)
  assert 'test is a tenth of train/' in capsys.readouterr().out


def test_train_alone_is_cut_as_a_folder(tmp_path):
  names = numbered(100, 'train/{}/0.png')
  write_images(tmp_path, names)
  (tmp_path / 'val').mkdir()
  (tmp_path / 'annotations.csv').write_text('')
  assert find(tmp_path) == by_hash(names)


def test_images_beside_the_splits_are_left_out_and_counted(tmp_path, capsys):
  names = [numbered(20, split + '/{}.png') for split in ('train', 'val')]
  test = numbered(20, 'test/{}.png')
  beside = ['curve.png', *numbered(7, 'docs/{}.png')]
  write_images(tmp_path, sum(names, test + beside))
  assert find(tmp_path)['test'] == set(test)
  assert (
    'images beside the folders of the splits: 8 (docs 7, in no folder 1)'
    in capsys.readouterr().out
  )


def test_a_class_may_be_called_train(tmp_path, capsys):
  names = [numbered(9, c + '/{}.png') for c in ('car', 'plane', 'train')]
  write_images(tmp_path, sum(names, []))
  classes, known = find_classes(tmp_path)
  assert known == ['car', 'plane', 'train'] and len(classes) == 27
  assert 'train/ is a class, as car/ is beside it' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('folders', 'said'),
  [
    (('test',), 'test/ and no train/'),
    (('images', 'Val'), 'Val/ and no train/'),
    (('train', 'val', 'dev'), 'dev/ and val/, and both are the validation'),
    (
      ('mnist/train', 'mnist/test'),
      'mnist/test/ and mnist/train/.*dir=.*mnist',
    ),
    (('cat/train', 'cat/val', 'dog/train'), 'cat/train/ and cat/val/'),
  ],
)
def test_folders_that_do_not_say_what_to_train_on(tmp_path, folders, said):
  write_images(tmp_path, sum((numbered(9, f + '/{}.png') for f in folders), []))
  with pytest.raises(UserError, match=f'^{tmp_path} holds.*{said}') as caught:
    find(tmp_path)
  assert '\n' not in str(caught.value)


# Classes.


def test_classes_are_below_the_splits_and_the_same_in_all(tmp_path):
  train = [n for d in range(10) for n in numbered(20, f'train/{d}/{{}}.png')]
  # The test split lacks some, and its first.
  test = [n for d in (3, 5, 9) for n in numbered(4, f'test/{d}/{{}}.png')]
  write_images(tmp_path, train + test)
  classes, known = find_classes(tmp_path)
  assert known == [str(digit) for digit in range(10)]
  assert classes == {name: name.split('/')[1] for name in train + test}
  labels = sources.find('folder', str(tmp_path))['test'].labels()
  assert set(labels.values[:, 0]) == {3, 5, 9}


@pytest.mark.parametrize('stray', ['test/stray.png', 'train/stray.png'])
def test_images_without_a_class_are_told(tmp_path, capsys, stray):
  names = [n for c in 'ab' for n in numbered(20, f'train/{c}/{{}}.png')]
  write_images(tmp_path, [*names, 'test/a/0.png', stray])
  encoded = sources.find('folder', str(tmp_path))
  assert all(images.labels() is None for images in encoded.values())
  said = capsys.readouterr().out
  assert (
    f'no classes: 1 of 42 images are in no sub-folder, such as {stray}'
    in (said)
  )


# Links.


def test_links_to_folders_are_followed(tmp_path):
  for name in 'abc':
    write_images(tmp_path / 'store' / name, numbered(10))
  data = tmp_path / 'data'
  write_images(data, numbered(10, 'd/{}.png'))
  for name in 'abc':
    (data / name).symlink_to(f'../store/{name}')
  classes, known = find_classes(data)
  assert known == ['a', 'b', 'c', 'd'] and len(classes) == 40
  # The folder itself may be one.
  (tmp_path / 'link').symlink_to('data')
  assert find(tmp_path / 'link') == find(data)


def test_links_in_circles_end(tmp_path):
  write_images(tmp_path, numbered(10, 'a/{}.png') + numbered(10, 'b/{}.png'))
  (tmp_path / 'a' / 'root').symlink_to('..')
  (tmp_path / 'a' / 'self').symlink_to('.')
  (tmp_path / 'b' / 'a').symlink_to('../a')
  (tmp_path / 'a' / 'b').symlink_to('../b')
  # A link's name may come before its folder's.
  (tmp_path / 'Again').symlink_to('b')
  classes, known = find_classes(tmp_path)
  assert known == ['a', 'b'] and len(classes) == 20


def test_one_folder_may_be_two_splits_by_a_link(tmp_path):
  write_images(tmp_path / 'store', numbered(10))
  write_images(tmp_path, numbered(10, 'val/{}.png'))
  (tmp_path / 'train').symlink_to('store')
  (tmp_path / 'test').symlink_to('val')
  found = find(tmp_path)
  assert found['train'] == set(numbered(10, 'train/{}.png'))
  assert found['test'] == set(numbered(10, 'test/{}.png'))
  assert found['validation'] == set(numbered(10, 'val/{}.png'))


def test_image_is_in_one_split_whatever_links_to_it(tmp_path, capsys):
  # Without val/ or test/ beside it train/ is a class.
  write_images(
    tmp_path, numbered(20, 'train/{}.png') + numbered(20, 'car/{}.png')
  )
  (tmp_path / 'car' / 'link').symlink_to('../train')
  (tmp_path / 'van').symlink_to('car')
  found = find(tmp_path)
  files = [(tmp_path / n).resolve() for part in found.values() for n in part]
  assert len(files) == len(set(files)) == 40
  assert 'links to folders that are listed: 2' in capsys.readouterr().out


# What is no data.


HIDDEN = (
  '._0.png',
  '.thumbnails/0.png',
  '.ipynb_checkpoints/1-checkpoint.png',
  '__MACOSX/a/._1.png',
  'a/@eaDir/0.png/SYNOPHOTO_THUMB.png',
  'a/.b/0.png',
)


def test_hidden_and_system_files_are_no_data(tmp_path, capsys):
  # The folder itself may be hidden.
  folder = tmp_path / '.cache'
  names = [*numbered(30, 'a/{}.png'), *numbered(30, 'b/{}.png')]
  write_images(folder, names)
  first, classes = find(folder), find_classes(folder)
  capsys.readouterr()
  write_images(folder, HIDDEN)
  assert find(folder) == first
  assert 'hidden files and folders: 6' in capsys.readouterr().out
  assert find_classes(folder) == classes
  assert classes[1] == ['a', 'b']


def test_celebas_list_rules(celeba_dir, tmp_path, capsys):
  folder = shutil.copytree(celeba_dir, tmp_path / 'celeba')
  expected = sources.find('celeba', str(celeba_dir))
  write_images(folder / 'img_align_celeba', ['._000001.jpg', 'x.jpg'])
  capsys.readouterr()
  found = sources.find('celeba', str(folder))
  said = capsys.readouterr().out
  for split in SPLITS:
    assert found[split].num_examples == expected[split].num_examples
  assert 'files that list_eval_partition.txt does not name: 1 (x.jpg)' in said


def test_suffixes_are_pillows():
  known = Image.registered_extensions()
  formats = ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF')
  assert set(image_files.SUFFIXES) == {
    suffix for suffix, format in known.items() if format in formats
  }


@pytest.mark.parametrize(
  ('suffix', 'format'),
  [('tif', 'TIFF'), ('TIFF', 'TIFF'), ('Jfif', 'JPEG'), ('jpe', 'JPEG')],
)
def test_other_suffixes_are_read(tmp_path, small_config, suffix, format):
  for number in range(12):
    image = Image.new('RGB', (20, 20), (20 * number, 0, 0))
    image.save(tmp_path / f'{number}.{suffix}', format, quality=100)
  small_config.data.source = 'folder'
  small_config.data.dir = str(tmp_path)
  small_config.train.batch_size = 1
  data = input_pipeline.load(small_config)
  reds = []
  for split in (data.train, data.validation, data.test):
    [images] = split.batches(np.arange(split.num_examples), 12)
    reds += images[:, 5, 5, 0].tolist()
  np.testing.assert_allclose(sorted(reds), np.arange(12) * 20, atol=2)


def test_what_is_no_image_is_counted_in_a_line(tmp_path, capsys):
  write_images(tmp_path, numbered(40))
  others = ('a.txt', 'b.TXT', 'c.csv', 'd.heic', 'e.npy', 'f.zip', 'README')
  for name in others:
    (tmp_path / name).write_text('')
  (tmp_path / 'gone').symlink_to('nowhere')
  find(tmp_path)
  said = capsys.readouterr().out
  assert said == (
    f'left out of {tmp_path}: files that are no images: 8 (.txt 2, .csv 1, '
    '.heic 1, .npy 1, .zip 1, others 2)\n'
  )
  for name in others[1:6]:
    (tmp_path / name).unlink()
  find(tmp_path)
  assert capsys.readouterr().out == (
    f'left out of {tmp_path}: files that are no images: 3 (.txt 1, broken link '
    '1, without suffix 1)\n'
  )


# Which part of them.


def wide_image(folder, count=12):
  """Red on the left, blue on the right, and green in the middle third."""
  pixels = np.zeros((300, 900, 3), np.uint8)
  pixels[:, :300, 0] = pixels[:, 300:600, 1] = pixels[:, 600:, 2] = 255
  # A white frame of the largest square, far from its middle 148×148.
  pixels[:8, 300:600] = pixels[-8:, 300:600] = 255
  for number in range(count):
    Image.fromarray(pixels).save(folder / f'{number}.png')
  return pixels[:, 300:600]


@pytest.mark.parametrize('module', [faces, celeba])
def test_largest_square_of_a_folders_images_by_default(tmp_path, module):
  square = wide_image(tmp_path)
  config = module.get_config()
  config.data.source = 'folder'
  config.data.dir = str(tmp_path)
  config.data.cache = 'none'
  config.train.batch_size = 1
  [image] = next(input_pipeline.load(config).train.batches(np.arange(1), 1))
  expected = Image.fromarray(square).resize((64, 64), Image.BILINEAR)
  difference = np.abs(image.astype(int) - np.asarray(expected))
  assert difference.max() <= 3
  config.data.crop_size = 148
  [image] = next(input_pipeline.load(config).train.batches(np.arange(1), 1))
  np.testing.assert_array_equal(image, np.full((64, 64, 3), (0, 255, 0)))
