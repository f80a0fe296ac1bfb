"""CelebA in a folder: its lists of splits and attributes."""

import re
import shutil

import numpy as np
import pytest

import data
from tests.conftest import make_small_config, SPLIT_SIZES
from vae.errors import UserError

SPLITS = ('train', 'validation', 'test')


@pytest.fixture
def folder(celeba_dir, tmp_path):
  return shutil.copytree(celeba_dir, tmp_path / 'celeba')


def find(folder):
  return data.find(make_small_config(folder).data)


def attributes(folder):
  """Attributes of the fixture's list, int [num_images, num_attributes]."""
  lines = (folder / 'list_attr_celeba.txt').read_text().splitlines()
  rows = [[int(sign) for sign in line.split()[1:]] for line in lines[2:]]
  return (np.array(rows) + 1) // 2


def as_csv(text):
  """Kaggle's form of the official list of attributes."""
  _, names, *rows = text.splitlines()
  return '\n'.join([f'image_id {names}', *rows]).replace(' ', ',') + '\n'


def partition_as_csv(text):
  return 'image_id,partition\r\n' + text.replace(' ', ',').replace('\n', '\r\n')


def move(path, target, change=lambda text: text):
  target.parent.mkdir(exist_ok=True, parents=True)
  target.write_bytes(change(path.read_text()).encode())
  if target != path:
    path.unlink()


@pytest.mark.parametrize(
  ('images', 'partition', 'attributes_list'),
  [
    ('img_align_celeba', 'list_eval_partition.txt', 'list_attr_celeba.txt'),
    (
      'img_align_celeba',
      'Eval/list_eval_partition.txt',
      'Anno/list_attr_celeba.txt',
    ),
    (
      'img_align_celeba/img_align_celeba',
      'list_eval_partition.csv',
      'list_attr_celeba.csv',
    ),
  ],
)
def test_official_and_kaggle_layouts_are_the_same_data(
  folder, celeba_dir, images, partition, attributes_list
):
  expected = attributes(folder)
  (folder / 'img_align_celeba').rename(folder / 'x')
  (folder / images).parent.mkdir(exist_ok=True)
  (folder / 'x').rename(folder / images)
  csv = partition.endswith('csv')
  # Excel marks its files.
  change = lambda text: '\ufeff' + partition_as_csv(text)
  move(
    folder / 'list_eval_partition.txt',
    folder / partition,
    *([change] if csv else []),
  )
  move(
    folder / 'list_attr_celeba.txt',
    folder / attributes_list,
    *([as_csv] if csv else []),
  )
  found, first, start = find(folder), find(celeba_dir), 0
  for name, size in zip(SPLITS, SPLIT_SIZES, strict=True):
    assert found[name].num_examples == size
    everything = np.arange(size)
    assert found[name].names_digest(everything) == first[name].names_digest(
      everything
    )
    assert found[name].content(0) == first[name].content(0)
    labels = found[name].labels()
    assert labels.names == (
      'Bald',
      'Eyeglasses',
      'Mouth_Slightly_Open',
      'Smiling',
    )
    np.testing.assert_array_equal(labels.values, expected[start : start + size])
    start += size


def test_without_a_list_there_are_no_labels(folder):
  (folder / 'list_attr_celeba.txt').unlink()
  assert find(folder)['train'].labels() is None


def test_files_that_no_list_names_are_left_out(folder, capsys):
  for name in ('._000001.jpg', 'x.jpg'):
    (folder / 'img_align_celeba' / name).write_bytes(b'')
  assert find(folder)['train'].num_examples == SPLIT_SIZES[0]
  assert (
    'files that list_eval_partition.txt does not name: 1 (x.jpg)'
    in capsys.readouterr().out
  )


def remove_images(folder):
  for number in (3, 5, 7, 11, 13):
    (folder / 'img_align_celeba' / f'{number:06d}.jpg').unlink()


def remove_list(folder):
  (folder / 'list_eval_partition.txt').unlink()


def first_line(line):
  def change(folder):
    path = folder / 'list_eval_partition.txt'
    path.write_bytes(line + b'\n' + path.read_bytes())

  return change


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (remove_images, '5 files that are not in .*: 000003.jpg, .* and 2 more'),
    (remove_list, 'no list_eval_partition.*data.source=folder'),
    (first_line(b'000001.jpg 3'), "line 1: '000001.jpg 3'"),
    (first_line(b'000001.jpg'), "line 1: '000001.jpg'"),
    (first_line(b'../../secret.jpg 0'), "line 1: '../../secret.jpg 0'"),
    (first_line(b'000001.jpg 0'), "line 2: '000001.jpg 0'.* in no line before"),
    (first_line(b'\xff\xfe\x00'), 'cannot be read .*utf-8'),
  ],
)
def test_damaged_list_of_splits(folder, change, match):
  change(folder)
  with pytest.raises(UserError, match=match) as caught:
    find(folder)
  assert str(caught.value).isprintable()


def change_line(number, line):
  def change(text):
    lines = text.splitlines()
    lines[number - 1] = line
    return '\n'.join(lines)

  return change


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (change_line(2, '000001.jpg -1'), 'line 3: .* each of 2 attributes'),
    (change_line(4, '000002.jpg 1 1 -1'), 'line 4: .* each of 4 attributes'),
    (change_line(5, '000003.jpg 1 1 -1 x'), 'line 5: '),
    (change_line(6, ''), 'lacks .* of 1 images: 000004.jpg'),
    (lambda text: text[:400], 'line'),
    (lambda text: '', 'lacks .* of 40 images'),
    (as_csv, 'line 3'),
  ],
)
def test_damaged_list_of_attributes(folder, change, match):
  path = folder / 'list_attr_celeba.txt'
  path.write_text(change(path.read_text()))
  train = find(folder)['train']  # Training does not ask for them.
  with pytest.raises(UserError, match=f'{re.escape(str(path))}.*{match}'):
    train.labels()


def test_folder_without_celeba(tmp_path):
  (tmp_path / 'a.jpg').write_bytes(b'')
  with pytest.raises(UserError, match='holds other files') as caught:
    find(tmp_path)
  assert 'kaggle datasets download' in str(caught.value)
  assert '\n' not in str(caught.value)
