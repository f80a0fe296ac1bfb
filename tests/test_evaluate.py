"""`python evaluate.py` in processes of its own."""

import json
import math
import re
import shutil

import pytest

from tests.browser import open_page
from tests.preloaded import run

FIGURES = {
  'kl_per_dimension.png',
  'rate_distortion.png',
  'reconstructions.png',
  'samples.png',
  'traversals.png',
}


def evaluate(*flags):
  """Exit status, standard output and standard error."""
  return run(*flags, script='evaluate.py')


@pytest.fixture(scope='module')
def evaluated(trained_run, inception_file, tmp_path_factory):
  """Folders and outputs of evaluations on 1 and on 4 devices."""
  folder = tmp_path_factory.mktemp('evaluated')
  found = {}
  # Neither divides the 11 images.
  for devices, batch_size in ((1, 7), (4, 8)):
    code, out, err = run(
      f'--workdir={trained_run}',
      '--split=validation',
      '--importance_samples=50',
      f'--batch_size={batch_size}',
      f'--inception_weights={inception_file}',
      f'--output={folder / str(devices)}',
      script='evaluate.py',
      devices=devices,
    )
    assert code == 0, err
    found[devices] = folder / str(devices), out
  return found


def read(folder):
  return json.loads((folder / 'metrics.json').read_text())


def test_devices_and_batches_do_not_matter(evaluated):
  one, four = (read(evaluated[n][0])['metrics'] for n in (1, 4))
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
  found = read(evaluated[1][0])
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
  for folder, out in evaluated.values():
    expected = FIGURES | {'metrics.json', 'report.html'}
    assert {path.name for path in folder.iterdir()} == expected
    assert str(folder / 'report.html') in out
    assert re.search(r'importance-weighted bound, K = 50: 11 images in', out)


@pytest.mark.parametrize('width', [1280, 500])
def test_page_shows_numbers_and_figures_in_a_browser(evaluated, width):
  folder, _ = evaluated[1]
  page = open_page(folder / 'report.html', width)
  assert page['scroll_width'] <= width
  assert len(page['pictures']) == len(FIGURES)
  assert all(width > 100 for width in page['pictures'])
  for text in (read(folder)['verdict'], 'bits_per_dim_iw', 'Smiling'):
    assert text in page['text']


def no_checkpoint(run):
  shutil.rmtree(run / 'checkpoints')


def truncated(run):
  for path in (run / 'checkpoints').glob('*/default/_METADATA'):
    path.write_bytes(path.read_bytes()[:100])


def other_shapes(run):
  config = json.loads((run / 'config.json').read_text())
  config['model']['hidden_channels'] = [4, 4]
  (run / 'config.json').write_text(json.dumps(config))


def other_data(run):
  (run / 'data.json').write_text('{"train": 41, "validation": 11}')


@pytest.mark.parametrize(
  ('spoil', 'flags', 'message'),
  [
    (no_checkpoint, (), 'checkpoints holds no complete checkpoint'),
    (truncated, (), 'cannot be restored'),
    (other_shapes, (), 'the checkpoint does not fit its config'),
    (None, ('--checkpoint=7',), 'no checkpoint 7; there are best, last'),
    (None, ('--split=best',), '--split=best'),
    (other_data, (), 'a run on other data'),
    (None, ('--metrics=elbo',), "no 'elbo'; it has bounds, fid, labels"),
    (None, ('--inception_weights=gone.tgz',), 'gone.tgz cannot be used'),
    (None, ('--data_dir=gone',), 'gone; there is no such folder'),
    (None, ('--output=/dev/null/x',), '--output=/dev/null/x cannot be written'),
  ],
  ids=lambda value: getattr(value, '__name__', str(value)),
)
def test_bad_input_is_one_line(trained_run, tmp_path, spoil, flags, message):
  run = trained_run
  if spoil:
    run, ignore = tmp_path / 'run', shutil.ignore_patterns('eval*')
    shutil.copytree(trained_run, run, ignore=ignore)
    spoil(run)
  code, _, err = evaluate(f'--workdir={run}', *flags)
  assert code == 2
  assert re.fullmatch(rf'error: .*{message}.*\n', err), err


@pytest.fixture
def data(celeba_dir, tmp_path):
  """A copy of the data."""
  return shutil.copytree(celeba_dir, tmp_path / 'data')


def test_other_data_that_is_named_is_noted(trained_run, data):
  flags = f'--workdir={trained_run}', f'--data_dir={data}', '--metrics=labels'
  (data / 'list_attr_celeba.txt').unlink()
  # Elsewhere, but as it was.
  code, out, err = evaluate(*flags)
  assert code == 2 and 'note: ' not in out
  assert re.fullmatch(r'error: --metrics=labels: .* has no labels.*\n', err)
  old, new = data / 'img_align_celeba' / '000003.jpg', 'renamed.jpg'
  old.rename(old.with_name(new))
  for path in data.glob('list_*.txt'):
    path.write_text(path.read_text().replace(old.name, new))
  code, out, _ = evaluate(*flags)
  assert code == 2
  assert re.search('note: .* other data: train_names was', out), out
  # Its results replace no others.
  folders = [path.name for path in (trained_run / 'evaluation').iterdir()]
  pattern = r'test_15_labels_data_dir=[0-9a-f]{12}'
  assert len([name for name in folders if re.fullmatch(pattern, name)]) == 1


def test_failed_run_leaves_the_files_of_an_earlier_one(
  trained_run, data, evaluated, tmp_path
):
  output = shutil.copytree(evaluated[1][0], tmp_path / 'evaluation')
  before = {path.name: path.read_bytes() for path in output.iterdir()}
  # An image of the test split, found when it is decoded.
  last = sorted((data / 'img_align_celeba').iterdir())[-1]
  last.write_bytes(last.read_bytes()[:2000])
  code, _, err = evaluate(
    f'--workdir={trained_run}',
    '--metrics=reconstruction',
    f'--data_dir={data}',
    f'--output={output}',
  )
  assert code == 2
  assert re.fullmatch(rf'error: .*{last.name} cannot be decoded.*\n', err)
  assert {p.name: p.read_bytes() for p in output.iterdir()} == before


def test_lacks_are_noted_unless_they_are_asked_for(
  trained_run, data, tmp_path, monkeypatch
):
  # A cache that cannot be written, and no labels.
  (tmp_path / 'cache').mkdir()
  (tmp_path / 'cache' / 'vae').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  (data / 'list_attr_celeba.txt').unlink()
  output = tmp_path / 'out'
  flags = f'--workdir={trained_run}', f'--data_dir={data}', f'--output={output}'
  code, out, err = evaluate(*flags, '--importance_samples=1')
  assert code == 0, err
  found = read(output)
  assert 'elbo' in found['metrics'] and 'fid_samples' not in found['metrics']
  labels, fid = found['not_measured'][:2]
  assert labels.startswith('labels: the test split has no labels')
  assert fid.startswith('fid: ') and '--inception_weights=FILE' in fid
  assert fid in out
  code, _, err = evaluate(*flags, '--metrics=reconstruction,fid')
  assert code == 2
  assert re.fullmatch('error: --metrics=fid: .*weights=FILE.*\n', err)
