"""`python evaluate.py`, mostly in processes of its own."""

import json
import math
import re
import shutil

from absl import flags
from absl.testing import flagsaver
import pytest

import evaluate
from evaluation import labels
from tests.browser import open_page
from tests.preloaded import run

FIGURES = {
  'kl_per_dimension.png',
  'mixture_samples.png',
  'reconstructions.png',
  'samples.png',
  'training.png',
  'traversals.png',
}


def measured(*flags, **options):
  """Exit status, standard output and standard error."""
  return run(*flags, script='evaluate.py', **options)


@pytest.fixture(scope='module')
def evaluated(trained_run, inception_file, tmp_path_factory):
  """Folder and output of an evaluation on one device."""
  # The batch size does not divide the 11 images.
  flags = f'--workdir={trained_run}', f'--inception_weights={inception_file}'
  folder = tmp_path_factory.mktemp('evaluated')
  return folder, evaluate_all(folder, *flags, '--batch_size=7')


def evaluate_all(folder, *flags, **options):
  """The output of an evaluation of the validation split into a folder."""
  code, out, err = measured(
    *(*flags, '--split=validation', '--importance_samples=50'),
    *(f'--output={folder}',),
    **options,
  )
  assert code == 0, err
  return out


def read(folder):
  return json.loads((folder / 'metrics.json').read_text())


@pytest.mark.slow
def test_devices_and_batches_do_not_matter(
  evaluated, trained_run, inception_file, tmp_path
):
  flags = f'--workdir={trained_run}', f'--inception_weights={inception_file}'
  evaluate_all(tmp_path, *flags, '--batch_size=8', devices=4)
  one, four = (read(path)['metrics'] for path in (evaluated[0], tmp_path))
  assert one.keys() == four.keys() and len(one) > 30
  for name, metric in one.items():
    # A number that is 0 but for rounding, such as the total correlation of two
    # independent dimensions, has no relative error.
    for found, expected in zip(
      numbers_of(four[name]), numbers_of(metric), strict=True
    ):
      assert found == pytest.approx(expected, rel=1e-5, abs=2e-6), name


def numbers_of(metric):
  numbers = metric['value'], metric.get('standard_error')
  null = metric.get('null') or {}
  return [x for x in (*numbers, *null.values()) if x is not None]


def test_metrics_have_units_and_definitions(evaluated):
  found = read(evaluated[0])
  assert found['split'] == 'validation' and found['num_images'] == 11
  assert (found['seed'], found['checkpoint']) == (0, 'best')
  assert found['step'] in (5, 10, 15)
  wanted = {
    *('elbo', 'iw_bound', 'bits_per_dim_optimal_sigma', 'bits_per_dim_iw'),
    *('bits_per_dim_pixel_gaussian', 'mse_of_mean', 'psnr', 'ssim'),
    *('active_units', 'dimensions_of_90_percent', 'prior_in_holes'),
    'mutual_information_lower_bound',
    'total_correlation_upper_bound',
    *('gaussian_total_correlation', 'dimension_wise_kl', 'linear_accuracy'),
    *('mig', 'dci_disentanglement', 'sap', 'sap_svm'),
    *('fid_samples', 'kid_reconstructions'),
  }
  assert wanted <= found['metrics'].keys()
  for name, metric in found['metrics'].items():
    assert metric['unit'] and metric['about'], name
    assert metric['value'] is None or math.isfinite(metric['value']), name
  assert found['verdict'] and not found['not_measured']
  assert len(found['dimensions']['kl']) == 2


def test_page_and_figures_are_left_and_printed(evaluated):
  folder, out = evaluated
  expected = FIGURES | {'metrics.json', 'report.html'}
  assert {path.name for path in folder.iterdir()} == expected
  assert str(folder / 'report.html') in out
  assert re.search(r'importance-weighted bound, K = 50: 11 images in', out)


def test_page_shows_numbers_and_figures_in_a_browser(evaluated):
  folder, _ = evaluated
  page = open_page(folder / 'report.html', width=500)
  assert page['scroll_width'] <= 500
  # Tables of a number for each label or dimension are too wide to be read else.
  assert all(t.startswith(('label', 'dimension')) for t in page['sideways'])
  assert len(page['pictures']) == len(FIGURES)
  assert all(width > 100 for width in page['pictures'])
  for text in (
    *(read(folder)['verdict'], 'bits_per_dim_iw', 'Smiling'),
    *('Evidence lower bound', 'Labels in the code', 'config.seed'),
  ):
    assert text in page['text']


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--metrics=elbo', "no 'elbo'; it has bounds, fid, labels"),
    ('--inception_weights=gone.tgz', 'gone.tgz cannot be read'),
    ('--output=/dev/null/x', '--output=/dev/null/x cannot be written'),
  ],
)
def test_bad_input_is_one_line(trained_run, flag, message):
  code, _, err = measured(f'--workdir={trained_run}', flag)
  assert code == 2
  assert re.fullmatch(rf'error: .*{message}.*\n', err), err


def test_metrics_measured_before_ctrl_c_are_kept(
  trained_run, tmp_path, monkeypatch, capsys
):
  def interrupt(context, results):
    raise KeyboardInterrupt

  monkeypatch.setattr(labels, 'evaluate', interrupt)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['evaluate'])
  named = {'workdir': str(trained_run), 'output': str(tmp_path)}
  partial = tmp_path / 'metrics.partial.json'
  with flagsaver.flagsaver(metrics=['reconstruction', 'labels'], **named):
    with pytest.raises(KeyboardInterrupt):
      evaluate.main()
  assert 'psnr' in json.loads(partial.read_text())['metrics']
  assert f'measured so far are in {partial}' in capsys.readouterr().out
  with flagsaver.flagsaver(metrics=['reconstruction'], **named):
    evaluate.main()
  assert 'psnr' in read(tmp_path)['metrics'] and not partial.exists()


@pytest.fixture
def data(celeba_dir, tmp_path):
  """A copy of the data."""
  return shutil.copytree(celeba_dir, tmp_path / 'data')


def test_other_data_is_refused_or_noted_if_named(trained_run, data, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns('eval*'))
  (run / 'data.json').write_text('{"train": 41, "validation": 11}')
  (data / 'list_attr_celeba.txt').unlink()
  flags = f'--workdir={run}', '--metrics=labels'
  code, _, err = measured(*flags)
  assert code == 2 and re.fullmatch('error: .* a run on other data.*\n', err)
  code, out, err = measured(*flags, f'--data_dir={data}')
  assert code == 2 and re.search('note: .* a run on other data', out), out
  assert re.fullmatch(r'error: --metrics=labels: .* has no labels.*\n', err)
  # Its results replace no others.
  refused, noted = sorted(p.name for p in (run / 'evaluation').iterdir())
  assert re.fullmatch(rf'{refused}_data_dir=[0-9a-f]{{12}}', noted)


def test_lacks_are_noted(trained_run, data, tmp_path, monkeypatch):
  # A cache that cannot be written, and no labels.
  (tmp_path / 'cache').mkdir()
  (tmp_path / 'cache' / 'vae').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  (data / 'list_attr_celeba.txt').unlink()
  output = tmp_path / 'out'
  flags = f'--workdir={trained_run}', f'--data_dir={data}', f'--output={output}'
  code, out, err = measured(*flags, '--importance_samples=1')
  assert code == 0, err
  found = read(output)
  assert 'elbo' in found['metrics'] and 'fid_samples' not in found['metrics']
  labels, fid = found['not_measured'][:2]
  assert labels.startswith('labels: the test split has no labels')
  assert fid.startswith('fid: ') and '--inception_weights=FILE' in fid
  assert fid in out
