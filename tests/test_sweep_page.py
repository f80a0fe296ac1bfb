import base64
import dataclasses
import html
import io
import itertools
import json
import math
import re

from etils import epath
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
import numpy as np
from PIL import Image
import pytest
from tests.test_html_page import Outline

from evaluation import plots
from sweeps import charts
from sweeps import curves
from sweeps import kl_panels
from sweeps import page
from sweeps import rate_distortion
from sweeps import variation
from sweeps.gallery import Gallery
from sweeps.results import Result
from tests.browser import open_page
from tests.test_plots import ACCENT
from tests.test_plots import FAINT

BETAS = [0.25, 0.5, 1.0, 2.0, 4.0, 16.0]
DIMS = [8, 16, 32, 64]
FACTS = {'split': 'test', 'images': '500 of 500'}
ERROR = 'loss is nan at step 312'


def point(name, values, noise=0.0):
  """What a linear VAE would come to on data with these eigenvalues."""
  latent_dim = values.get('model.latent_dim', 32)
  kept = values.get('objective.beta', 1.0) * 0.1
  eigenvalues = 60 * np.arange(1, 200) ** -1.4
  own = eigenvalues[:latent_dim]
  kl = np.maximum(0, 0.5 * np.log(own / max(kept, 1e-6))) + 0.01
  active = own > kept
  rate = kl.sum() + noise
  distortion = (
    5 * np.minimum(own, kept).sum() + 5 * eigenvalues[latent_dim:].sum()
  )
  distortion += 2 * abs(noise) - 1200
  metrics = {
    'rate': rate,
    'distortion': distortion,
    'elbo': -rate - distortion,
    'elbo_optimal_sigma': 11_500 - rate - distortion,
    'active_units': int(active.sum()),
  }
  units = dict.fromkeys(metrics, 'nats per image')
  units['active_units'] = f'of {latent_dim}'
  # Not in order, as training leaves them.
  kl, active = np.roll(kl, 3), np.roll(active, 3)
  return Result(
    name, values, 'complete', metrics, units, kl.tolist(), active.tolist()
  )


def grid(betas=BETAS, dims=DIMS, seeds=None):
  results = []
  for beta, dim, seed in itertools.product(betas, dims, seeds or [0]):
    values = {'objective.beta': beta, 'model.latent_dim': dim}
    if seeds:
      values['seed'] = seed
    name = ','.join(f'{key}={value:g}' for key, value in values.items())
    results.append(point(name, values, noise=2.0 * seed))
  return results


def search(count):
  generator = np.random.default_rng(0)
  return [
    point(
      f'trial_{index}',
      {
        'objective.beta': float(np.exp(generator.uniform(-2, 3))),
        'model.latent_dim': int(generator.choice(DIMS)),
        'optimizer.learning_rate': float(np.exp(generator.uniform(-9, -4))),
      },
      noise=generator.exponential(20),
    )
    for index in range(count)
  ]


def without(result, state, error=''):
  return Result(result.name, result.values, state, error=error)


def unfinished():
  """A grid, one point of which failed, and one of which waits."""
  results = grid()
  results[5] = without(results[5], 'failed', ERROR)
  results[20] = without(results[20], 'waiting')
  return results


def strips(names):
  generator = np.random.default_rng(0)
  return {
    name: Gallery(*generator.integers(0, 256, (2, 5, 8, 8, 3), np.uint8))
    for name in names
  }


ORIGINALS = np.arange(5 * 8 * 8 * 3, dtype=np.uint8).reshape(5, 8, 8, 3)


def write(folder, results, galleries=None, originals=None):
  path = page.write(
    epath.Path(folder), 'A sweep', results, galleries or {}, originals, FACTS
  )
  return path.read_text()


def pictures(text):
  """Captions and arrays of the pictures, from the top."""
  images = []
  for image in Outline(text).images:
    kind, data = image['src'].split(',')
    assert kind == 'data:image/png;base64'
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
      images.append((image['alt'], np.asarray(opened)))
  return images


def rows_of(text, heading):
  """The cells of the table below a heading, row by row."""
  table = text.split(f'<h2>{heading}</h2>')[1].split('</table>')[0]
  return [
    [html.unescape(cell) for cell in re.findall('<t[hd]>(.*?)</t[hd]>', row)]
    for row in re.findall('<tr>(.*?)</tr>', table, re.DOTALL)
  ]


# What varies.


def test_names_are_short_and_never_the_same():
  assert variation.names(
    ['objective.beta', 'model.latent_dim', 'train.batch_size', 'seed']
  ) == {
    'objective.beta': 'β',
    'model.latent_dim': 'latent_dim',
    'train.batch_size': 'batch_size',
    'seed': 'seed',
  }
  both = ['train.batch_size', 'eval.batch_size']
  assert variation.names(both) == {key: key for key in both}


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (0.00025, '0.00025'),
    (4.0, '4'),
    (1_000_000, '1000000'),
    ((32, 64), '(32,64)'),
    ([32, 64], '(32,64)'),
    (True, 'True'),
    ('gaussian', 'gaussian'),
  ],
)
def test_values_are_written_without_spaces_and_zeros(value, text):
  assert variation.text(value) == text


def test_values_are_in_the_order_of_numbers_and_then_of_text():
  values = [[32, 64], 16.0, 2, 'relu', 0.5]
  results = [Result(str(v), {'key': v}, 'waiting') for v in values]
  assert variation.distinct(results, 'key') == [0.5, 2, 16.0, (32, 64), 'relu']


# Rate and distortion.


def drawn_curves(figure):
  """What the legend names: label and points of each line, [n, 2]."""
  (legend,) = figure.legends
  labels = [text.get_text() for text in legend.get_texts()]
  by_label = {line.get_label(): line for line in figure.axes[0].get_lines()}
  return {label: by_label[label] for label in labels}


def point_labels(figure):
  return [t for t in figure.axes[0].texts if t.get_visible() and t.get_text()]


def test_a_grid_is_a_line_for_each_latent_dim_in_the_order_of_beta():
  results = grid()
  shuffled = [results[i] for i in np.random.default_rng(0).permutation(24)]
  lines = drawn_curves(rate_distortion.draw(shuffled))
  assert list(lines) == ['8', '16', '32', '64']
  for dim, line in zip(DIMS, lines.values(), strict=True):
    expected = [
      (r.metrics['rate'], r.metrics['distortion'])
      for r in results
      if r.values['model.latent_dim'] == dim
    ]
    np.testing.assert_array_equal(line.get_xydata(), expected)
    assert line.get_linestyle() == '-'
  assert len({line.get_marker() for line in lines.values()}) == 4


def test_colours_are_told_apart_by_lightness_alone():
  lines = drawn_curves(rate_distortion.draw(grid())).values()
  light = [np.dot(to_rgb(li.get_color()), (0.3, 0.59, 0.11)) for li in lines]
  assert (np.diff(light) > 0.1).all() and max(light) < 0.8


def test_points_that_are_not_finite_are_left_out():
  results = grid(dims=[8])
  results[2].metrics['rate'] = math.nan
  results[3].metrics['distortion'] = math.inf
  (line, *_) = rate_distortion.draw(results).axes[0].get_lines()
  assert len(line.get_xydata()) == 4
  assert np.isfinite(line.get_xydata()).all()


def test_seeds_are_averaged_with_their_standard_deviation():
  figure = rate_distortion.draw(grid(dims=[8, 16], seeds=[0, 1, 2]))
  lines = drawn_curves(figure)
  expected = [
    (r.metrics['rate'] + 2, r.metrics['distortion'] + 4)
    for r in grid(dims=[16])
  ]
  np.testing.assert_allclose(lines['16'].get_xydata(), expected)
  bars = [
    segment
    for collection in figure.axes[0].collections
    for segment in collection.get_segments()
  ]
  reach = np.array([np.ptp(bar, axis=0) for bar in bars])
  # Rates of 0, 2, 4 above the law; distortions of 0, 4, 8.
  assert len(reach) == 2 * 12
  np.testing.assert_allclose(sorted(reach.max(axis=1)), [4] * 12 + [8] * 12)


def test_labels_name_their_points_and_cover_nothing():
  for results in (grid(), search(50), grid(seeds=[0, 1, 2])):
    figure = rate_distortion.draw(results)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    labels = point_labels(figure)
    assert len(labels) >= 5
    points = [
      (r.metrics['rate'], r.metrics['distortion'], r.values['objective.beta'])
      for r in results
    ]
    boxes = [label.get_window_extent() for label in labels]
    for one, other in itertools.combinations(boxes, 2):
      assert not one.overlaps(other)
    if 'seed' not in results[0].values:
      pixels = axes.transData.transform([p[:2] for p in points])
      radius = 2.5 * figure.dpi / 72
      for label, box in zip(labels, boxes, strict=True):
        near = [beta for *xy, beta in points if label.xy == tuple(xy)]
        assert f'{near[0]:.3g}' == label.get_text()
        assert not box.padded(radius).count_contains(pixels)
        assert axes.get_window_extent().contains(box.x0, box.y0)
        assert axes.get_window_extent().contains(box.x1, box.y1)


def test_labels_are_not_struck_through():
  figure = rate_distortion.draw(grid())
  figure.draw_without_rendering()
  to_pixels = figure.axes[0].transData.transform
  steps = np.linspace(0, 1, 100)[:, None]
  for line in drawn_curves(figure).values():
    for start, end in itertools.pairwise(to_pixels(line.get_xydata())):
      for label in point_labels(figure):
        box = label.get_window_extent()
        assert not box.count_contains(start + steps * (end - start))


def test_every_curve_is_labelled_but_not_where_all_are_the_same():
  labels = point_labels(rate_distortion.draw(grid()))
  # At β = 16 all latent dimensions come to much the same.
  assert [label.get_text() for label in labels].count('16') == 1
  for dim in DIMS:
    end = point('', {'objective.beta': 0.25, 'model.latent_dim': dim}).metrics
    xy = end['rate'], end['distortion']
    assert '0.25' in [t.get_text() for t in labels if t.xy == xy]


def test_what_a_point_betters_is_not_on_the_front():
  results = search(40)
  points = curves.arrange(results).points(results)
  front = rate_distortion.pareto_front(points)
  xy = {id(p): np.array([p.mean('rate'), p.mean('distortion')]) for p in points}
  expected = {
    id(p)
    for p in points
    if not any(
      (xy[id(q)] <= xy[id(p)]).all() and (xy[id(q)] < xy[id(p)]).any()
      for q in points
    )
  }
  assert {id(p) for p in front} == expected
  assert 1 < len(front) < 40


def test_a_search_is_a_cloud_with_its_front_and_a_colour_bar():
  results = search(50)
  figure = rate_distortion.draw(results)
  axes, bar = figure.axes
  shown = np.concatenate([c.get_offsets() for c in axes.collections])
  expected = [(r.metrics['rate'], r.metrics['distortion']) for r in results]
  np.testing.assert_allclose(sorted(map(tuple, shown)), sorted(expected))
  assert bar.get_ylabel() == 'β'
  front = rate_distortion.pareto_front(curves.arrange(results).points(results))
  labelled = {label.xy for label in point_labels(figure)}
  assert labelled <= {(p.mean('rate'), p.mean('distortion')) for p in front}


def test_many_curves_are_a_cloud_too():
  results = grid(betas=BETAS[:2], dims=range(1, 10))
  assert len(rate_distortion.draw(results).axes) == 2
  assert len(rate_distortion.draw(grid(betas=BETAS[:2])).axes) == 1


def test_without_beta_points_are_labelled_and_not_joined():
  results = [point(str(d), {'model.latent_dim': d}) for d in DIMS]
  figure = rate_distortion.draw(results)
  line, *_ = figure.axes[0].get_lines()
  assert line.get_linestyle() == 'None' and len(line.get_xydata()) == 4
  labels = [label.get_text() for label in point_labels(figure)]
  assert labels == ['8', '16', '32', '64']


# β and latent dimension.


def cells(axes):
  """The texts that are written into cells, by column and row."""
  return {tuple(t.get_position()): t.get_text() for t in axes.texts}


def test_heat_map_has_a_value_in_each_cell_and_hatches_what_is_missing():
  results = unfinished()
  (axes,) = charts.heat_map(results, 'rate').axes
  written = cells(axes)
  assert len(written) == 22
  ticks = [t.get_text() for t in axes.get_xticklabels()]
  assert ticks == ['0.25', '0.5', '1', '2', '4', '16']
  assert [t.get_text() for t in axes.get_yticklabels()] == list(map(str, DIMS))
  (image,) = axes.get_images()
  for result in results:
    column = BETAS.index(result.values['objective.beta'])
    row = DIMS.index(result.values['model.latent_dim'])
    if result.metrics:
      rate = result.metrics['rate']
      assert written[column, row] == f'{rate:.0f}'
      assert image.get_array()[row, column] == rate
    else:
      assert (column, row) not in written
      assert image.get_array().mask[row, column]
  hatched = [p for p in axes.patches if p.get_hatch()]
  assert [(p.get_x(), p.get_y()) for p in hatched] == [(4.5, -0.5), (0.5, 0.5)]
  assert axes.get_title(loc='left') == 'rate, nats per image'


def test_heat_map_is_averaged_over_all_other_settings():
  results = grid(dims=[8, 16], seeds=[0, 3])
  values = charts.heat_map(results, 'rate').axes[0].get_images()[0].get_array()
  expected = charts.heat_map(grid(dims=[8, 16]), 'rate').axes[0]
  np.testing.assert_allclose(
    values, expected.get_images()[0].get_array() + 3, rtol=1e-12
  )


def test_letters_in_the_cells_stand_out():
  (axes,) = charts.heat_map(grid(), 'elbo_optimal_sigma').axes
  (image,) = axes.get_images()

  def luminance(color):
    linear = np.array(to_rgb(color)) ** 2.2
    return linear @ (0.2126, 0.7152, 0.0722)

  for text in axes.texts:
    column, row = text.get_position()
    cell = image.cmap(image.norm(image.get_array()[row, column]))
    low, high = sorted([luminance(cell[:3]), luminance(text.get_color())])
    assert (high + 0.05) / (low + 0.05) > 4.5  # WCAG's AA.


@pytest.mark.parametrize(
  'results',
  [
    search(30),
    grid(dims=[8]),
    grid(betas=[1.0]),
    [without(r, 'waiting') for r in grid()],
  ],
)
def test_heat_map_needs_a_grid_of_both(results):
  assert charts.heat_map(results, 'rate') is None


def test_active_units_fall_along_beta_for_each_latent_dim():
  results = grid()
  figure = charts.active_units(results)
  axes = figure.axes[0]
  assert axes.get_xscale() == 'log'
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert labels == ['8', '16', '32', '64']
  lines = axes.get_lines()
  for dim, line in zip(DIMS, lines, strict=True):
    expected = [
      (r.values['objective.beta'], r.metrics['active_units'])
      for r in results
      if r.values['model.latent_dim'] == dim
    ]
    np.testing.assert_array_equal(line.get_xydata(), expected)
  assert charts.active_units([point('a', {'model.latent_dim': 8})]) is None


def test_a_beta_of_0_has_its_place():
  results = grid(betas=[0.0, 0.1, 1.0, 10.0], dims=[8])
  axes = charts.active_units(results).axes[0]
  places = axes.transData.transform([(b, 0) for b in (0, 0.1, 1, 10)])[:, 0]
  assert (np.diff(places) > 20).all()


# KL of each dimension.


def bars(axes):
  return [p for p in axes.patches if isinstance(p, Rectangle)]


def test_kl_panels_are_a_table_of_beta_and_latent_dim():
  figure = kl_panels.draw(unfinished())
  panels = np.array(figure.axes).reshape(4, 6)
  assert [p.get_title() for p in panels[0]] == [f'β {b:g}' for b in BETAS]
  names = [p.get_ylabel().split('\N{NO-BREAK SPACE}') for p in panels[:, 0]]
  assert names == [['latent_dim', str(dim)] for dim in DIMS[::-1]]
  for (row, column), axes in np.ndenumerate(panels):
    beta, dim = BETAS[column], DIMS[::-1][row]
    if (beta, dim) in [(0.5, 16), (16.0, 8)]:
      assert not bars(axes)
      continue
    result = point('', {'objective.beta': beta, 'model.latent_dim': dim})
    heights = [bar.get_height() for bar in bars(axes)]
    np.testing.assert_allclose(heights, sorted(result.kl, reverse=True))
    strong = [
      np.allclose(np.array(bar.get_facecolor()[:3]) * 255, ACCENT)
      for bar in bars(axes)
    ]
    faint = [
      np.allclose(np.array(bar.get_facecolor()[:3]) * 255, FAINT)
      for bar in bars(axes)
    ]
    active = sum(result.active)
    assert strong == [True] * active + [False] * (dim - active)
    assert faint == [not is_strong for is_strong in strong]


def test_kl_panels_are_all_on_one_scale():
  results = grid(betas=[1.0, 4.0], dims=[8, 16])
  results[0].kl[0] = 9.0
  limits = {panel.get_ylim() for panel in kl_panels.draw(results).axes}
  assert len(limits) == 1 and limits.pop()[1] > 9


def test_kl_of_seeds_is_the_mean_of_the_sorted():
  results = [
    dataclasses.replace(
      point(str(seed), {'seed': seed}), kl=kl, active=[k > 0.5 for k in kl]
    )
    for seed, kl in enumerate([[0.0, 3.0, 1.0], [5.0, 0.2, 0.4]])
  ]
  (axes,) = kl_panels.draw(results).axes
  heights = [bar.get_height() for bar in bars(axes)]
  np.testing.assert_allclose(heights, [4.0, 0.7, 0.1])


def test_kl_panels_of_a_search_follow_each_other_and_are_not_too_many():
  figure = kl_panels.draw(search(8))
  filled = [axes for axes in figure.axes if bars(axes)]
  assert len(figure.axes) == 12 and len(filled) == 8
  for axes in filled:
    assert 'latent_dim' in axes.get_title() and 'β' in axes.get_title()
  assert sum(bool(bars(a)) for a in kl_panels.draw(search(80)).axes) == 60


# The page.


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A page of a grid, with galleries, a failed and a waiting point."""
  folder = tmp_path_factory.mktemp('sweep')
  results = unfinished()
  galleries = strips(r.name for r in results if r.state == 'complete')
  write(folder, results, galleries, ORIGINALS)
  return folder, results, galleries


def read(folder):
  return (folder / 'report.html').read_text()


def test_page_is_whole_and_takes_nothing_from_elsewhere(written):
  text = read(written[0])
  assert not Outline(text).open
  assert '://' not in text
  assert {p.name for p in written[0].iterdir()} == {
    'report.html',
    'rate_distortion.png',
  }


def test_page_says_how_far_the_sweep_is_and_what_is_best(written):
  folder, results, _ = written
  complete = [r for r in results if r.state == 'complete']
  best = max(complete, key=lambda r: r.metrics['elbo_optimal_sigma'])
  banner = read(folder).split('class="banner">')[1].split('</p>')[0]
  assert '24 points: 22 complete, 1 failed, 1 waiting.' in banner
  beta, dim = best.values.values()
  assert f'β {beta:g}, latent_dim {dim}' in banner
  assert f'{best.metrics["elbo_optimal_sigma"]:,.1f} nats per image' in banner


def test_best_of_seeds_is_the_best_on_average(tmp_path):
  results = [
    dataclasses.replace(
      result, metrics={'elbo_optimal_sigma': value}, kl=[], active=[]
    )
    for result, value in zip(
      grid(betas=[1.0, 2.0], dims=[8], seeds=[0, 1]),
      [10.0, 20.0, 1.0, 25.0],
      strict=True,
    )
  ]
  text = write(tmp_path, results)
  assert 'σ: β 1, with 15 nats per image, the mean of 2 seeds.' in text


def test_gallery_has_the_same_strips_in_the_order_of_the_settings(written):
  folder, results, galleries = written
  shown = pictures(read(folder))
  start = [caption for caption, _ in shown].index('Originals.')
  expected = [('Originals.', ORIGINALS)]
  for result in results:
    if result.name not in galleries:
      continue
    beta, dim = result.values.values()
    gallery = galleries[result.name]
    name = f'β {beta:g}, latent_dim {dim}'
    expected.append((f'{name}: reconstructions', gallery.reconstructions))
    expected.append((f'{name}: samples', gallery.samples))
  shown = shown[start:]
  assert len(shown) == len(expected) == 1 + 2 * 22
  for (caption, strip), (name, images) in zip(shown, expected, strict=True):
    assert caption.startswith(name)
    # All of one size, so that columns are aligned.
    assert strip.shape == (8, 5 * 10 - 2, 3)
    for index, image in enumerate(images):
      np.testing.assert_array_equal(
        strip[:, index * 10 : index * 10 + 8], image
      )
  metrics = results[0].metrics
  assert shown[1][0].endswith(
    f'rate {metrics["rate"]:.4g}, distortion {metrics["distortion"]:,.1f} nats'
  )


def test_table_has_every_point_and_the_failed_say_why(written):
  folder, results, _ = written
  header, *rows = rows_of(read(folder), 'Points')
  assert header[:4] == ['β', 'latent_dim', 'state', 'rate, nats per image']
  assert len(rows) == 24
  for row, result in zip(rows, results, strict=True):
    cell = dict(zip(header, row, strict=True))
    assert cell['folder'] == result.name
    assert cell['state'] == result.state
    assert float(cell['β']) == result.values['objective.beta']
    if result.metrics:
      distortion = float(cell['distortion, nats per image'].replace(',', ''))
      assert distortion == pytest.approx(
        result.metrics['distortion'], abs=0.06, rel=1e-3
      )
      dim = result.values['model.latent_dim']
      assert cell['active_units'].endswith(f' of {dim}')
    else:
      assert cell['rate, nats per image'] == '–'
  assert rows_of(read(folder), 'Failed')[1:] == [[results[5].name, ERROR]]
  assert rows_of(read(folder), 'Measured') == [list(f) for f in FACTS.items()]


def test_the_chart_beside_the_page_is_the_one_in_it(written):
  folder, *_ = written
  beside = (folder / 'rate_distortion.png').read_bytes()
  assert base64.b64encode(beside).decode() in read(folder)


def test_page_shows_in_a_browser(written):
  seen = open_page(written[0] / 'report.html', width=1280)
  assert seen['scroll_width'] <= 1280
  # Rate and distortion, four maps, active units, KL; the gallery.
  assert len(seen['pictures']) == 7 + 1 + 2 * 22
  assert all(seen['pictures'])
  for text in ('22 complete', 'Rate and distortion', ERROR, '500 of 500'):
    assert text in seen['text']


# A window is 500 pixels wide at least, so the phone is a frame within, so
# high that no scroll bar takes of its width.
PHONE = """<!doctype html><body><iframe style="width: 360px; height: 30000px;
border: 0" srcdoc="{}"></iframe><script>
addEventListener('load', () => {{
  const page = document.querySelector('iframe').contentDocument;
  document.body.innerText = JSON.stringify({{
    width: page.documentElement.clientWidth,
    scroll_width: page.documentElement.scrollWidth,
    pictures: [...page.images].map(image => image.naturalWidth),
    boxes: [...page.querySelectorAll('.scroll')].map(box => box.offsetWidth),
    strips: [...page.images].map(image => image.offsetWidth),
  }});
}});</script>"""


def on_phone(path, folder):
  frame = folder / 'phone.html'
  frame.write_text(PHONE.format(html.escape(path.read_text())))
  return json.loads(open_page(frame, width=500)['text'])


def test_page_fits_a_phone(written, tmp_path):
  seen = on_phone(written[0] / 'report.html', tmp_path)
  assert seen['width'] == 360 and seen['scroll_width'] == 360
  assert len(seen['pictures']) == 7 + 1 + 2 * 22 and all(seen['pictures'])
  assert max(seen['boxes']) <= 360
  assert len(set(seen['strips'][7:])) == 1


def test_page_of_a_search(tmp_path):
  text = write(tmp_path, search(30))
  assert not Outline(text).open and '://' not in text
  assert 'All 30 points are complete.' in text
  assert len(pictures(text)) == 3  # No maps: nearly all cells were empty.
  header, *rows = rows_of(text, 'Points')
  assert header[:3] == ['β', 'latent_dim', 'learning_rate']
  assert len(rows) == 30 and 'Failed' not in text


def test_page_of_seeds_says_what_is_averaged(tmp_path):
  text = write(tmp_path, grid(betas=[1.0, 4.0], dims=[8, 16], seeds=[0, 1]))
  captions = ' '.join(caption for caption, _ in pictures(text))
  assert 'Means over the seeds, with standard deviations.' in captions
  assert captions.count('Averaged over seed.') == 5
  assert len(rows_of(text, 'Points')) == 1 + 8


def test_page_without_a_complete_point(tmp_path):
  first, *others = grid(betas=[1.0, 2.0], dims=[8])
  results = [without(first, 'failed', ERROR)]
  results += [without(other, 'waiting') for other in others]
  text = write(tmp_path, results)
  assert not Outline(text).open
  assert 'No point is complete yet' in text and '1 failed, 1 waiting' in text
  assert ERROR in text and not pictures(text)
  assert [path.name for path in tmp_path.iterdir()] == ['report.html']


def test_what_is_written_by_others_is_not_taken_for_html(tmp_path):
  result = Result('<b>', {'data.source': '<i>'}, 'failed', error='</table> & "')
  text = write(tmp_path, [result])
  assert not Outline(text).open
  assert '</table> & "' in Outline(text).texts
  assert '<b>' not in text and '<i>' not in text


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('along', ['objective.beta', None])
def test_text_that_is_a_setting_is_written_as_it_is(tmp_path, along):
  """In a legend, at points and above panels; not as a formula, nor boxes."""
  texts = ['/a/$x_$', r'/b/$\frac$', '_c', '/d' * 40, 'e\nf']
  results = [
    point(f'{text} {beta}', {'data.dir': text, 'objective.beta': beta}, beta)
    for text in texts
    for beta in ([1.0, 2.0] if along else [1.0])
  ]
  written = [
    '/a/$x_$',
    r'/b/$\frac$',
    '_c',
    '/d' * 10 + '…' + '/d' * 10,
    r'e\nf',
  ]
  chart, panels = rate_distortion.draw(results), kl_panels.draw(results)
  for figure in (chart, panels):
    plots.save(figure, epath.Path(tmp_path / 'a.png'))
  drawn = {
    text.get_text()
    for text in chart.findobj(Text)
    if text._preprocess_math(text.get_text()) == (text.get_text(), False)
  }
  if along:
    assert set(written) <= drawn
  else:
    # At the points, where there is room.
    assert len(drawn & set(written)) >= 3
  of_panels = ' '.join(text.get_text() for text in panels.findobj(Text))
  of_panels = of_panels.replace('\n', '')
  assert all(text in of_panels for text in written)


def test_a_failure_leaves_the_old_page(tmp_path, monkeypatch):
  write(tmp_path, grid(betas=[1.0], dims=[8]))
  old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def fail(*_):
    raise OSError

  monkeypatch.setattr(plots, 'save', fail)
  with pytest.raises(OSError):
    write(tmp_path, grid(betas=[1.0, 2.0], dims=[8]))
  assert old == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
