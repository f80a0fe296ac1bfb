"""Sweeps that are compared: paired differences, and the page."""

from etils import epath
import numpy as np
import pytest

from runs import run_flags, workdirs
from sweeps import POINTS, report, side_by_side
from tests.browser import open_page
from tests.conftest import make_small_config
from tests.preloaded import run
from tests.test_sweep_report import grid, make

BETAS = [0.5, 1.0, 2.0]


@pytest.fixture
def write(tmp_path):
  """Writes rows as a sweep's table; returns its workdir."""

  def write(
    name, rows, split='validation', data=(40, 11), image_size=16, **settings
  ):
    folder = epath.Path(tmp_path / name)
    config = make_small_config('')
    config.seed, config.data.image_size = 0, image_size
    config.model.update(settings)
    for row in rows:
      workdir = folder / POINTS / row['point']
      workdir.mkdir(parents=True)
      workdirs.claim(config, workdir, dict(zip('ab', data, strict=True)))
    report.write_table(folder, make(rows), split)
    return folder

  return write


def read(*folders):
  return [side_by_side.Sweep.read(folder.name, folder) for folder in folders]


def test_pairs_have_the_same_settings_in_any_order(write):
  rows = grid(BETAS, dims=[8, 16], seeds=(0, 1))
  generator = np.random.default_rng(0)
  # Points differ far more than the sweeps do.
  gains = generator.normal(3, 0.5, len(rows))
  better = [
    row | {'elbo_optimal_sigma': row['elbo_optimal_sigma'] + gain}
    for row, gain in zip(rows, gains, strict=True)
  ]
  # Two points of the second sweep are not in the first, one the other way.
  lone = grid([9.0], dims=[8], seeds=(0, 1))
  first = write('first', rows[1:])
  second = write('second', [*generator.permutation(better), *lone])
  count, found = side_by_side.differences(read(first, second))
  assert count == len(rows) - 1
  (difference,) = [row[2] for row in found if row[0] == 'elbo_optimal_sigma']
  mean, error = map(float, difference.removeprefix('+').split(' ± '))
  assert mean == pytest.approx(gains[1:].mean(), abs=0.01)
  expected = gains[1:].std(ddof=1) / np.sqrt(len(gains) - 1)
  assert error == pytest.approx(expected, rel=0.05)
  (same,) = [row for row in found if row[0] == 'rate']
  assert same[2] == '0'


def test_a_setting_that_one_sweep_does_not_vary_is_that_of_its_config(write):
  # Each seed has another rate, and so has each dimension.
  many = write('many', grid(BETAS, dims=[4, 8, 16], seeds=(0, 1, 2)))
  rows = grid(BETAS, dims=[8], seeds=(0,))
  for row in rows:
    del row['seed'], row['model.latent_dim']
  few = write('few', rows, latent_dim=8)
  for sweeps in (few, many), (many, few):
    count, found = side_by_side.differences(read(*sweeps))
    (rate,) = [row[2] for row in found if row[0] == 'rate']
    assert count == len(BETAS) and float(rate) == 0


def test_page_and_table(write, tmp_path):
  first = write('first', grid(BETAS, dims=[8, 16]))
  second = write('second', grid(BETAS[1:], dims=[8, 16, 32]))
  flags = f'--workdir={first},{second}', f'--output={tmp_path / "out"}'
  code, out, err = run(*flags, script='compare.py')
  assert code == 0, err
  assert '4 points have the same varied settings in all sweeps.' in out
  page = open_page(tmp_path / 'out/comparison.html', width=500)
  assert not page['sideways'] and page['scroll_width'] <= 500
  assert len(page['pictures']) == 1 and all(page['pictures'])
  assert 'Means over the 4 points' in page['text']


def test_names_may_have_commas(tmp_path):
  point = tmp_path / 'points/beta=1,seed=0'
  point.mkdir(parents=True)
  for given, expected in (
    (f'{point}', [f'{point}']),
    (f'{point},{point},b', [f'{point}', f'{point}', 'b']),
    (f'a,{point}', ['a', f'{point}']),
    ('a,b', ['a', 'b']),
  ):
    assert run_flags.split_names(given) == expected


def test_mistakes_are_one_line(write, trained_run):
  sweep = write('sweep', grid(BETAS, dims=[8]))
  waiting = write(
    'waiting', [r | {'state': 'failed'} for r in grid(BETAS, [8])]
  )
  tested = write('tested', grid(BETAS, [8]), split='test')
  other = write('other', grid(BETAS, [8]), data=(40, 12))
  smaller = write('smaller', grid(BETAS, [8]), image_size=8)
  for flags, message in (
    ([f'--workdir={sweep},{trained_run}'], 'is not a sweep'),
    ([f'--workdir={sweep},{sweep}', '--seed=0'], '--seed applies to runs'),
    ([f'--workdir={sweep},{tested}'], 'measured on test images'),
    ([f'--workdir={sweep},{other}'], 'has other images'),
    ([f'--workdir={sweep},{smaller}'], 'config.data.image_size=8'),
    ([f'--workdir={sweep},{waiting}'], 'no complete point'),
  ):
    code, _, err = run(*flags, script='compare.py')
    assert code == 2 and err.count('\n') == 1 and message in err
