from etils import epath
import numpy as np
from PIL import Image
import pytest

from vae import plots

ACCENT = tuple(bytes.fromhex(plots._ACCENT[1:]))
FAINT = tuple(bytes.fromhex(plots._FAINT[1:]))


def columns_of(path, color):
  """In which columns, and in how many rows of each, a PNG has a colour."""
  with Image.open(path) as image:
    pixels = np.asarray(image.convert('RGB'))
  hits = np.all(pixels == color, axis=-1)
  return np.flatnonzero(hits.any(axis=0)), hits.sum(axis=0)


def test_bars_fall_from_the_left_and_the_inactive_are_faint(tmp_path):
  path = epath.Path(tmp_path / 'kl.png')
  kl, active = np.array([0.5, 3.0, 0.1, 1.5]), np.array([1, 1, 0, 1], bool)
  plots.kl_per_dimension(kl, active, path)
  strong, heights = columns_of(path, ACCENT)
  faint, faint_heights = columns_of(path, FAINT)
  runs = np.split(strong, np.flatnonzero(np.diff(strong) > 1) + 1)
  assert len(runs) == 3 and strong.max() < faint.min()
  tops = [np.median(heights[run]) for run in runs]
  np.testing.assert_allclose(
    np.array(tops) / tops[0], [1, 0.5, 1 / 6], atol=0.02
  )
  assert np.median(faint_heights[faint]) < tops[2]


@pytest.mark.parametrize('history', [np.zeros((0, 2)), np.ones((3, 2))])
def test_rate_and_distortion_is_drawn_with_and_without_a_history(
  tmp_path, history
):
  path = epath.Path(tmp_path / 'new' / 'rd.png')
  plots.rate_distortion(45.0, -1200.0, history, 'step 3', path)
  assert len(columns_of(path, ACCENT)[0]) > 5


def test_scatter_colours_by_label(tmp_path):
  path = epath.Path(tmp_path / 'means.png')
  means = np.random.default_rng(0).normal(size=(60, 2))
  plots.latent_scatter(means, np.arange(60) % 3, ['a', 'b', 'c'], path)
  with Image.open(path) as image:
    colors = len(image.convert('RGB').quantize(8).getcolors())
  assert colors >= 4
