"""Charts, page and table of a sweep."""

import base64
import itertools
import math

from etils import epath
from matplotlib.colors import to_rgb
from matplotlib.text import Text
import numpy as np
import pandas as pd
from PIL import Image
import pytest

from evaluation import plots
from sweeps import charts, report
from sweeps.points import Results
from tests.browser import open_page

BETAS = [0.25, 0.5, 1.0, 2.0, 4.0, 16.0]
DIMS = [8, 16, 32, 64]
UNITS = {
  'rate': 'nats',
  'distortion': 'nats',
  'elbo_optimal_sigma': 'nats',
  'active_units': 'dimensions',
}


def point(values, noise=0.0):
  """A measured point: the larger β, the less rate and the more distortion."""
  beta = values.get('objective.beta', 1.0)
  kl = 9 / beta / np.arange(1, values.get('model.latent_dim', 32) + 1)
  rate = kl.sum() + noise
  distortion = 50 * np.log(beta) + 2 * abs(noise) - 1200
  return {
    'point': ','.join(f'{key}={value}' for key, value in values.items()),
    'state': 'complete',
    'error': '',
    **values,
    'rate': rate,
    'distortion': distortion,
    'elbo_optimal_sigma': 11_500 - rate - distortion,
    'active_units': (kl > 0.5).sum(),
    # Not in order, as training leaves them.
    'kl': np.roll(kl, 3).tolist(),
    'active': np.roll(kl > 0.5, 3).tolist(),
  }


def make(rows):
  keys = [key for key in rows[0] if '.' in key or key == 'seed']
  return Results.of(rows, keys, UNITS)


def grid(betas=BETAS, dims=DIMS, seeds=(0,)):
  return [
    point({'objective.beta': b, 'model.latent_dim': d, 'seed': s}, 2.0 * s)
    for b, d, s in itertools.product(betas, dims, seeds)
  ]


def search(count):
  generator = np.random.default_rng(0)
  return [
    point(
      {
        'objective.beta': float(np.exp(generator.uniform(-2, 3))),
        'model.latent_dim': int(generator.choice(DIMS)),
        'optimizer.learning_rate': float(np.exp(generator.uniform(-9, -4))),
      },
      generator.exponential(20),
    )
    for _ in range(count)
  ]


def without(row, state, error=''):
  measured = {*UNITS, 'kl', 'active'}
  kept = {key: value for key, value in row.items() if key not in measured}
  return kept | {'state': state, 'error': error}


def texts(figure):
  return [text.get_text() for text in figure.findobj(Text)]


def test_a_grid_is_a_curve_for_each_latent_dim_in_the_order_of_beta():
  results = make(grid(seeds=(0, 1)))
  axes = charts.rate_distortion(results).axes[0]
  curves = [bars.lines[0] for bars in axes.containers]
  labels = [f'latent_dim {dim}' for dim in DIMS]
  assert [bars.get_label() for bars in axes.containers] == labels
  for dim, curve in zip(DIMS, curves, strict=True):
    # Means of two seeds, of which the second is off by 2 and 4 nats.
    expected = [
      point({'objective.beta': b, 'model.latent_dim': dim}) for b in BETAS
    ]
    rates = [row['rate'] + 1 for row in expected]
    np.testing.assert_allclose(curve.get_xdata().astype(float), rates)
    distortions = [row['distortion'] + 2 for row in expected]
    np.testing.assert_allclose(curve.get_ydata().astype(float), distortions)
  # Standard deviations: half of √2 times the difference, to both sides.
  first = axes.containers[0].lines[2][0].get_segments()[0]
  np.testing.assert_allclose(np.ptp(first[:, 0]), 2 * math.sqrt(2))
  lightness = [sum(to_rgb(curve.get_color())) for curve in curves]
  assert np.all(np.diff(lightness) > 0.1)


def test_front_has_the_points_that_no_other_betters():
  xy = np.random.default_rng(1).uniform(size=(40, 2)).round(1)
  table = pd.DataFrame(xy, columns=['rate', 'distortion'])
  front = charts.pareto_front(table).to_numpy()
  undominated = {
    tuple(p)
    for p in xy
    if not any((q <= p).all() and (q < p).any() for q in xy)
  }
  assert set(map(tuple, front)) == undominated and len(front) == len(
    undominated
  )
  assert (np.diff(front[:, 0]) > 0).all()


def test_search_is_a_cloud_with_its_front_labelled():
  results = make(search(30))
  figure = charts.rate_distortion(results)
  axes, bar = figure.axes
  assert axes.collections[-1].get_offsets().shape == (30, 2)
  assert bar.get_ylabel() == 'β'
  front = charts.pareto_front(results.over_seeds('rate', 'distortion'))
  labels = [text.get_text() for text in axes.texts]
  assert [float(label) for label in labels if label] == pytest.approx(
    list(front['objective.beta']), rel=5e-3
  )


def test_charts_leave_out_what_is_missing():
  rows = grid(betas=BETAS[:2], dims=DIMS[:2])
  rows[0] = without(rows[0], 'waiting')
  rows[1]['rate'] = math.nan
  rows[2]['distortion'] = math.inf
  results = make(rows)
  axes = charts.rate_distortion(results).axes[0]
  assert sum(len(bars.lines[0].get_xdata()) for bars in axes.containers) == 1
  none = make([without(row, 'failed', 'x') for row in rows])
  assert charts.rate_distortion(none) is charts.kl_panels(none) is None


def test_kl_panels_show_each_points_dimensions_in_order():
  figure = charts.kl_panels(make(grid()))
  assert len(figure.axes) == len(DIMS) * len(BETAS)
  row, axes = grid()[-4], figure.axes[-4]
  assert axes.get_title() == 'β 16, latent_dim 8'
  heights = [bar.get_height() for bar in axes.patches]
  np.testing.assert_allclose(heights, sorted(row['kl'], reverse=True))
  count = sum(row['active'])
  assert f'{count} of 8 active\n{sum(row["kl"]):.1f} nats' in texts(figure)
  assert len(charts.kl_panels(make(search(100))).axes) == 60


@pytest.mark.filterwarnings('error')
def test_text_that_is_a_setting_is_drawn_as_it_is():
  """Neither as a formula nor as an entry that legends leave out."""
  names = ['/a/$x_$', r'/b/$\frac$', '_c']
  rows = [
    point({'data.dir': name, 'objective.beta': beta}, beta)
    for name in names
    for beta in (1.0, 2.0)
  ]
  for draw in (charts.rate_distortion, charts.kl_panels):
    figure = draw(make(rows))
    plots.png(figure)
    drawn = ' '.join(texts(figure))
    assert all(name in drawn for name in names)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A page of a grid with galleries, and a failed and a waiting point."""
  folder = epath.Path(tmp_path_factory.mktemp('sweep'))
  rows = grid(seeds=(0, 1))
  rows[5] = without(rows[5], 'failed', '</table> & diverged')
  rows[20] = without(rows[20], 'waiting')
  results = make(rows)
  for index, name in enumerate(results.frame.point):
    for kind in ('ORIGINALS', 'RECONSTRUCTIONS', 'SAMPLES'):
      path = folder / 'points' / name / getattr(report, kind)
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (60 + index, 10)).save(path)
  report.write(folder, results, 'test')
  return folder, results


def test_page_shows_everything_in_a_browser(written):
  folder, results = written
  for width in (390, 1280):
    seen = open_page(folder / 'report.html', width)
    assert seen['scroll_width'] <= seen['width']
  # Two charts and the gallery, in the order of the settings.
  widths = [width for width in seen['pictures'] if width < 200]
  assert widths == [60, *(60 + i // 2 for i in range(2 * len(results.frame)))]
  assert len(seen['pictures']) == 2 + 1 + 2 * 48 and all(seen['pictures'])
  for part in (
    'Of 48 points, 46 complete, 1 failed, 1 waiting.',
    'Best on the test split',
    '</table> & diverged',
    'β 0.25, latent_dim 8, seed 0: samples',
  ):
    assert part in seen['text']


def test_page_needs_no_network(written):
  folder, _ = written
  text = (folder / 'report.html').read_text()
  assert '://' not in text
  chart = (folder / 'rate_distortion.png').read_bytes()
  assert base64.b64encode(chart).decode() in text


def test_best_of_seeds_is_the_best_on_average():
  rows = grid(betas=[1.0, 2.0], dims=[8], seeds=(0, 1))
  for row, value in zip(rows, [10.0, 20.0, 1.0, 25.0], strict=True):
    row['elbo_optimal_sigma'] = value
  text = report.summary(make(rows), 'test')
  assert text.endswith('15 nats (seeds: 2): β 1.')
  none = make([without(row, 'running') for row in rows])
  assert report.summary(none, 'test') == 'Of 4 points, 4 running.'


def test_table_has_every_point_in_full_precision(written):
  folder, results = written
  table = pd.read_csv(folder / 'results.csv')
  assert len(table) == 48
  np.testing.assert_array_equal(table.rate, results.frame.rate)
  assert table.state.tolist() == results.frame.state.tolist()
  assert set(table.error.dropna()) == {'</table> & diverged'}
