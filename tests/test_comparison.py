"""`compare.py`: paired differences, and the page as a browser shows it."""

import re
import shutil

import numpy as np
import pytest
from scipy import stats

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


def test_elbo_at_the_optimal_sigma_is_that_of_the_best_gaussian():
  rate, squares = np.array([3.0, 5.0, 4.0]), np.array([1.0, 2.0, 6.0])
  values = {'rate': rate, 'squared_error': squares, 'mse': squares / 4}
  values['distortion'] = np.zeros(3)
  found = comparison.of_images(values, draws_z=True, dimensions=4)
  # Errors of 4 numbers, as -log N(x; 0, σ²) of one that has all of the error.
  sigmas = np.linspace(0.1, 3, 3000)
  errors = np.sqrt(squares)[:, None]
  log_prob = stats.norm.logpdf(errors, scale=sigmas)
  log_prob += 3 * stats.norm.logpdf(0, scale=sigmas)
  best = log_prob.mean(axis=0).argmax()
  np.testing.assert_allclose(
    found['elbo_optimal_sigma'], log_prob[:, best] - rate, rtol=1e-3
  )


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
  names = 'elbo', 'elbo_optimal_sigma', 'mse_of_mean', 'psnr', 'ssim'
  pattern = rf'^\s*({"|".join(names)})\s.*?(?:± \S+)\s+(\S+)'
  rows = re.findall(pattern, out, re.M)
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
