"""CelebA in a folder: its lists of splits and attributes."""

import os
import re
import shutil

import numpy as np
import pytest

import data
from data import SPLITS
from tests.conftest import make_small_config, SPLIT_SIZES
from vae.errors import UserError

PARTITION, ATTRIBUTES = 'list_eval_partition.txt', 'list_attr_celeba.txt'


@pytest.fixture
def folder(celeba_dir, tmp_path):
  return shutil.copytree(celeba_dir, tmp_path / 'celeba')


def find(folder):
  return data.find(make_small_config(folder).data)


def as_csv(text, head=''):
  """Kaggle's form of a list; Excel marks its files."""
  return '\ufeff' + head + re.sub(' +', ',', text).replace('\n', '\r\n')


def make_official(folder):
  for name, place in ((PARTITION, 'Eval'), (ATTRIBUTES, 'Anno')):
    (folder / place).mkdir()
    (folder / name).rename(folder / place / name)
  (folder / 'Img').mkdir()
  (folder / 'img_align_celeba').rename(folder / 'Img' / 'img_align_celeba')


def make_kaggle(folder):
  (folder / 'img_align_celeba').rename(folder / 'x')
  (folder / 'img_align_celeba').mkdir()
  (folder / 'x').rename(folder / 'img_align_celeba' / 'img_align_celeba')
  partition, attributes = folder / PARTITION, folder / ATTRIBUTES
  _, rows = attributes.read_text().split('\n', maxsplit=1)
  for path, text, head in (
    (partition, partition.read_text(), 'image_id,partition\r\n'),
    (attributes, rows, 'image_id,'),
  ):
    path.unlink()
    path.with_suffix('.csv').write_bytes(as_csv(text, head).encode())


@pytest.mark.parametrize('change', [make_official, make_kaggle])
def test_official_and_kaggle_layouts_are_the_same_data(
  folder, celeba_dir, change
):
  rows = (folder / ATTRIBUTES).read_text().splitlines()[2:]
  expected = np.array([row.split()[1:] for row in rows], int) > 0
  change(folder)
  found, first, start = find(folder), find(celeba_dir), 0
  for name, size in zip(SPLITS, SPLIT_SIZES, strict=True):
    assert found[name].num_examples == size
    ours, theirs = (s[name].names_digest(range(size)) for s in (found, first))
    assert ours == theirs
    assert found[name].content(0) == first[name].content(0)
    labels = found[name].labels()
    names = ('Bald', 'Eyeglasses', 'Mouth_Slightly_Open', 'Smiling')
    assert labels.names == names
    np.testing.assert_array_equal(labels.values, expected[start : start + size])
    start += size


def test_without_a_list_there_are_no_labels(folder):
  (folder / ATTRIBUTES).unlink()
  assert find(folder)['train'].labels() is None


def remove_images(folder):
  for number in (3, 5, 7, 11, 13):
    (folder / 'img_align_celeba' / f'{number:06d}.jpg').unlink()


def first_line(line):
  def change(folder):
    path = folder / PARTITION
    path.write_bytes(line + b'\n' + path.read_bytes())

  return change


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (remove_images, '5 files that are not in .*: 000003.jpg, .* and 2 more'),
    (
      lambda folder: (folder / PARTITION).unlink(),
      'no list_eval_partition.*data.source=folder',
    ),
    (first_line(b'new.jpg 3'), 'each file once, .*: new.jpg'),
    (first_line(b'../secret.jpg 0'), '1 files that are not in .*secret.jpg'),
    (first_line(b'000001.jpg 0'), 'each file once, .*: 000001.jpg'),
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
    (change_line(4, '000002.jpg 1 1 1 1 1'), 'cannot be read .*line 4'),
    (change_line(5, '000003.jpg 1 1 -1 x'), 'of 1 images: 000003.jpg'),
    (change_line(6, ''), 'of 1 images: 000004.jpg'),
    (lambda text: text[:400], 'lacks the attributes of 2. images'),
    (as_csv, 'names no attributes'),
  ],
)
def test_damaged_list_of_attributes(folder, change, match):
  path = folder / ATTRIBUTES
  path.write_text(change(path.read_text()))
  train = find(folder)['train']  # Training does not ask for them.
  with pytest.raises(UserError, match=f'{re.escape(str(path))}.*{match}'):
    train.labels()


def test_nothing_is_downloaded_into_a_folder_of_other_images(tmp_path):
  (tmp_path / 'cat').mkdir()
  (tmp_path / 'cat' / 'a.jpg').write_bytes(b'')
  with pytest.raises(UserError, match='add --config.data.source=f') as caught:
    find(tmp_path)
  assert os.listdir(tmp_path) == ['cat']
  assert 'kaggle datasets download' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_files_that_the_list_does_not_name_are_left_out(folder, capsys):
  for name in ('._000001.jpg', 'x.jpg'):
    (folder / 'img_align_celeba' / name).write_bytes(b'')
  assert find(folder)['train'].num_examples == SPLIT_SIZES[0]
  out = capsys.readouterr().out
  assert '1 files that list_eval_partition.txt does not name (x.jpg)' in out
