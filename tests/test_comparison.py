"""`compare.py`: paired differences, and the page as a browser shows it."""

import re
import shutil

import numpy as np
import pytest

from evaluation import comparison
from tests.browser import open_page
from tests.preloaded import run


def runs_of(*values):
  return [
    comparison.Run(f'run {i}', None, None, v, None)
    for i, v in enumerate(values)
  ]


def test_difference_of_pairs_is_sharper_than_that_of_means():
  generator = np.random.default_rng(0)
  difficulty = generator.normal(0, 100, 400)
  first = {'elbo': -difficulty}
  second = {'elbo': -difficulty + 2 + generator.normal(0, 1, 400)}
  ((name, mean, difference, unit, better),) = comparison.differences(
    runs_of(first, second)
  )
  assert (name, unit, better) == ('elbo', 'nats per image', 'higher')
  value, error = map(float, difference.split(' ± '))
  assert value == pytest.approx(2, abs=0.2)
  # 1 / √400, where the mean itself has 100 / √400.
  assert error == pytest.approx(0.05, rel=0.15)
  assert float(mean.split(' ± ')[1]) == pytest.approx(5, rel=0.15)


def test_what_a_run_lacks_is_not_compared():
  both = {'mse_of_mean': np.ones(3)}
  rows = comparison.differences(runs_of({**both, 'elbo': np.ones(3)}, both))
  assert [row[0] for row in rows] == ['mse_of_mean']


@pytest.mark.slow
def test_a_run_and_itself_differ_by_nothing(trained_run, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(trained_run, other)
  flags = [f'--workdir={trained_run},{other}', f'--output={tmp_path / "out"}']
  code, out, err = run(*flags, '--split=validation', script='compare.py')
  assert code == 0, err
  rows = re.findall(
    r'^\s*(elbo|mse_of_mean|psnr|ssim)\s.*?(?:± \S+)\s+(\S+)', out, re.M
  )
  names = 'elbo', 'mse_of_mean', 'psnr', 'ssim'
  assert dict(rows) == dict.fromkeys(names, '0')
  page = open_page(tmp_path / 'out/comparison.html', width=1200)
  assert 'On the same 11 validation images' in page['text']
  # Reconstructions, samples, curves.
  assert len(page['pictures']) == 3 and all(page['pictures'])
  assert not open_page(tmp_path / 'out/comparison.html', width=500)['sideways']


def test_other_images_are_a_mistake(trained_run, tmp_path, celeba_dir):
  smaller, other = tmp_path / 'celeba', tmp_path / 'other'
  shutil.copytree(celeba_dir, smaller)
  partition = smaller / 'list_eval_partition.txt'
  lines = partition.read_text().splitlines()
  partition.write_text('\n'.join(lines[:-1]) + '\n')
  shutil.copytree(trained_run, other)
  config = (other / 'config.json').read_text()
  (other / 'config.json').write_text(
    config.replace(str(celeba_dir), str(smaller))
  )
  code, _, err = run(f'--workdir={trained_run},{other}', script='compare.py')
  assert code == 2 and err.count('\n') == 1
  assert 'images 4 instead of 5' in err
  code, _, err = run(f'--workdir={trained_run}', script='compare.py')
  assert code == 2 and 'at least two runs' in err
