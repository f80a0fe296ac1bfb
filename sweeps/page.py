"""The page of a sweep: what its points came to, side by side."""

import collections
import tempfile

from etils import epath
import numpy as np

from evaluation import html_page
from evaluation import plots
from sweeps import charts
from sweeps import curves
from sweeps import kl_panels
from sweeps import rate_distortion
from sweeps import variation
from sweeps.gallery import Gallery
from sweeps.results import Result
from sweeps.variation import BETA
from sweeps.variation import LATENT_DIM
from sweeps.variation import SEED
from vae import figures
from vae import paths

PAGE = 'report.html'
RATE_DISTORTION = 'rate_distortion.png'

_STATES = ('complete', 'failed', 'pruned', 'running', 'waiting')
_BEST_BY = 'elbo_optimal_sigma'
_MAPPED = {
  'rate': 'KL(q(z|x) ‖ N(0, I)): what z tells of the image.',
  'distortion': 'E_q[-log p(x|z)]: what z leaves open.',
  _BEST_BY: 'ELBO at the optimal σ, which is fitted to the same images: the '
  'yardstick of all points.',
  'active_units': 'Dimensions whose mean moves with the image.',
}

# Distortions compare only where these are the same.
_OF_LIKELIHOOD = {'model.likelihood', 'model.sigma', 'model.learn_sigma'}

# CSS pixels to the inch of a chart, so that its letters are those of the page.
# Where there is less room, a wide chart scrolls before it gets too small.
_PIXELS_PER_INCH = 104
_MIN_PIXELS_PER_INCH = 72


def write(
  folder: epath.Path,
  title: str,
  results: list[Result],
  galleries: dict[str, Gallery],
  originals: np.ndarray | None,
  facts: dict[str, object],
) -> epath.Path:
  """Writes the page, and the chart of rate and distortion beside it.

  Args:
    folder: is made, if it is not there.
    title: of the page.
    results: all points, whatever came of them.
    galleries: of the points that have one, by name.
    originals: what they reconstruct, uint8 [n, height, width, channels].
    facts: what was measured: data, split, seed.

  Returns:
    The path of the page.
  """
  folder.mkdir(parents=True, exist_ok=True)
  groups = variation.grouped(results, variation.varied(results))
  results = [result for members in groups.values() for result in members]
  page = html_page.Page(title)
  page.banner(_summary(results))
  with tempfile.TemporaryDirectory() as name:
    aside = epath.Path(name)
    _add_rate_distortion(page, results, aside)
    _add_heat_maps(page, results, aside)
    _add_dimensions(page, results, aside)
    _add_gallery(page, results, galleries, originals, aside)
    chart = aside / RATE_DISTORTION
    if chart.exists():
      paths.replace(folder / RATE_DISTORTION, chart.read_bytes())
  _add_points(page, results)
  page.heading('Measured')
  page.table(('', ''), [(name, str(value)) for name, value in facts.items()])
  paths.replace(folder / PAGE, page.html().encode())
  return folder / PAGE


def _summary(results: list[Result]) -> str:
  counts = collections.Counter(result.state for result in results)
  states = ', '.join(
    f'{counts[state]} {state}' for state in _STATES if counts[state]
  )
  if not counts['complete']:
    return f'No point is complete yet. Of {len(results)}: {states or "none"}.'
  summary = f'Of {len(results)} points: {states}.'
  if counts['complete'] == len(results):
    summary = f'All {len(results)} points are complete.'
  arranged = curves.arrange(results)
  points = arranged.points(variation.finite(results, _BEST_BY))
  if not points:
    return summary
  best = max(points, key=lambda point: point.mean(_BEST_BY))
  varied = variation.varied(results)
  seeds = len(best.results)
  if seeds > 1:
    varied.remove(SEED)
  of_seeds = f', the mean of {seeds} seeds' if seeds > 1 else ''
  return (
    f'{summary} Best by its ELBO at the optimal σ: '
    f'{_title(best.results[0], varied)}, with '
    f'{html_page.number(best.mean(_BEST_BY))} nats per image{of_seeds}.'
  )


def _title(result: Result, keys: list[str]) -> str:
  """What tells a point from the others: `β 0.5, latent_dim 16`."""
  values = {key: variation.setting(result, key) for key in keys}
  return variation.describe(values, variation.names(keys)) or result.name


def _add_chart(page, figure, path, caption) -> None:
  plots.save(figure, path)
  inches = figure.get_figwidth()
  page.figure(
    path,
    caption,
    width=round(inches * _PIXELS_PER_INCH),
    min_width=round(inches * _MIN_PIXELS_PER_INCH) if inches > 6 else 0,
  )


def _add_rate_distortion(page, results, aside) -> None:
  chart = rate_distortion.draw(results)
  if chart is None:
    return
  varied = set(variation.varied(results))
  caption = 'Along the dotted line, the ELBO is that of the best point.'
  if SEED in varied:
    caption += ' Means over the seeds, with standard deviations.'
  if varied & _OF_LIKELIHOOD:
    caption += (
      ' A distortion is that of the likelihood of its point, and compares with '
      'those of the same likelihood only.'
    )
  page.heading('Rate and distortion')
  _add_chart(page, chart, aside / RATE_DISTORTION, caption)


def _add_heat_maps(page, results, aside) -> None:
  drawn = {metric: charts.heat_map(results, metric) for metric in _MAPPED}
  drawn = {metric: chart for metric, chart in drawn.items() if chart}
  if not drawn:
    return
  page.heading('β and latent dimension')
  averaged = _averaged(results)
  for metric, chart in drawn.items():
    caption = f'{_MAPPED[metric]} {averaged}'.strip()
    _add_chart(page, chart, aside / f'{metric}_map.png', caption)


def _averaged(results) -> str:
  varied = variation.varied(results)
  called = variation.names(varied)
  others = [called[key] for key in varied if key not in (BETA, LATENT_DIM)]
  complete = [result for result in results if result.state == 'complete']
  if len(variation.grouped(complete, [BETA, LATENT_DIM])) == len(complete):
    return ''
  return f'Averaged over {" and ".join(others)}.'


def _add_dimensions(page, results, aside) -> None:
  units = charts.active_units(results)
  kl = kl_panels.draw(results)
  if not (units or kl):
    return
  page.heading('What the dimensions carry')
  if units:
    caption = _MAPPED['active_units']
    if averaged := _averaged(results):
      caption += f' {averaged} Bars: standard deviations.'
    _add_chart(page, units, aside / 'active_units.png', caption)
  if kl:
    caption = (
      'KL of each dimension, mean over the images, sorted. In the corner: how '
      'many are active, and the sum; faint: not active.'
    )
    if SEED in variation.varied(results):
      caption += ' Means over the seeds.'
    _add_chart(page, kl, aside / 'kl_per_dimension.png', caption)


def _add_gallery(page, results, galleries, originals, aside) -> None:
  shown = [result for result in results if result.name in galleries]
  if not shown:
    return

  def add(name, images, caption):
    strip = figures.image_grid(images, columns=len(images))
    figures.save_png(strip, aside / name)
    page.figure(aside / name, caption)

  page.heading('Pictures')
  if originals is not None:
    add('originals.png', originals, 'Originals.')
  page.text(
    'Of each point: reconstructions of the same images, through the posterior '
    'mean, and samples, decoded from the same z.'
  )
  varied = variation.varied(results)
  for index, result in enumerate(shown):
    title, gallery = _title(result, varied), galleries[result.name]
    numbers = ''.join(
      f', {metric} {html_page.number(result.metrics[metric])}'
      for metric in ('rate', 'distortion')
      if metric in result.metrics
    )
    nats = ' nats' if numbers else ''
    add(
      f'reconstructions_{index}.png',
      gallery.reconstructions,
      f'{title}: reconstructions{numbers}{nats}',
    )
    add(f'samples_{index}.png', gallery.samples, f'{title}: samples')


def _add_points(page, results) -> None:
  keys = variation.keys(results)
  called = variation.names(keys)
  metrics = list(
    dict.fromkeys(name for result in results for name in result.metrics)
  )
  units = {
    name: variation.unit([r for r in results if name in r.metrics], name)
    for name in metrics
  }
  page.heading('Points')
  page.table(
    (
      *(called[key] for key in keys),
      'state',
      *(f'{name}, {unit}' if unit else name for name, unit in units.items()),
      'folder',
    ),
    [
      (
        *(variation.text(variation.setting(result, key)) for key in keys),
        result.state,
        *(_cell(result, name, units[name]) for name in metrics),
        result.name,
      )
      for result in results
    ],
  )
  failed = [result for result in results if result.error]
  if failed:
    page.heading('Failed')
    page.table(
      ('point', 'error'), [(result.name, result.error) for result in failed]
    )


def _cell(result: Result, metric: str, shared_unit: str) -> str:
  """A number, with its unit where the header cannot have it."""
  if metric not in result.metrics:
    return '–'
  number = html_page.number(result.metrics[metric])
  unit = '' if shared_unit else result.units.get(metric, '')
  return f'{number} {unit}'.strip()
