"""`python evaluate.py` in processes of its own."""

import json
import math
import re
import shutil

import pytest

from tests.browser import open_page
from tests.preloaded import run
from tests.test_main import finish
from tests.test_main import SMALL
from tests.test_main import start

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
  processes = {
    devices: start(
      f'--workdir={trained_run}',
      '--split=validation',
      '--importance_samples=50',
      f'--batch_size={batch_size}',
      f'--inception_weights={inception_file}',
      f'--output={folder / str(devices)}',
      script='evaluate.py',
      devices=devices,
    )
    # Neither divides the 11 images.
    for devices, batch_size in ((1, 7), (4, 8))
  }
  found = {}
  for devices, process in processes.items():
    code, out, err = finish(process)
    assert code == 0, err
    found[devices] = folder / str(devices), out
  return found


def numbers_of(value, path=''):
  """All numbers in a JSON value, by where they are."""
  if isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list):
    items = enumerate(value)
  else:
    return {path: value} if isinstance(value, (int, float)) else {}
  return {
    where: number
    for key, item in items
    for where, number in numbers_of(item, f'{path}/{key}').items()
  }


def read(folder):
  return json.loads((folder / 'metrics.json').read_text())


def test_devices_and_batches_do_not_matter(evaluated):
  one, four = (numbers_of(read(evaluated[n][0])) for n in (1, 4))
  assert one.keys() == four.keys() and len(one) > 60
  for where, number in one.items():
    # What is 0 but for rounding, such as the total correlation of two
    # independent dimensions, has no relative error.
    assert four[where] == pytest.approx(number, rel=1e-5, abs=2e-6), where


def test_every_number_has_its_unit_and_says_what_it_is(evaluated):
  found = read(evaluated[1][0])
  assert found['split'] == 'validation' and found['num_images'] == 11
  assert (found['seed'], found['checkpoint']) == (0, 'best')
  assert found['step'] in (5, 10, 15)
  wanted = {
    'elbo',
    'iw_bound',
    'bits_per_dim_optimal_sigma',
    'bits_per_dim_pixel_gaussian',
    'mse_of_mean',
    'psnr',
    'ssim',
    'active_units',
    'dimensions_of_90_percent',
    'mutual_information_lower_bound',
    'mutual_information_upper_bound',
    'total_correlation_lower_bound',
    'total_correlation_upper_bound',
    'gaussian_total_correlation',
    'dimension_wise_kl',
    'prior_in_holes',
    'linear_accuracy',
    'mig',
    'dci_disentanglement',
    'sap',
    'sap_svm',
    'fid_samples',
    'kid_reconstructions',
  }
  assert wanted <= found['metrics'].keys()
  for name, metric in found['metrics'].items():
    assert metric['unit'] and metric['about'], name
    assert metric['value'] is None or math.isfinite(metric['value']), name
  assert found['verdict'] and not found['not_measured']
  assert len(found['dimensions']['kl']) == 2


def test_leaves_page_and_figures_and_says_where(evaluated):
  for folder, out in evaluated.values():
    assert {path.name for path in folder.iterdir()} == FIGURES | {
      'metrics.json',
      'report.html',
    }
    assert str(folder / 'report.html') in out
    assert re.search(r'importance-weighted bound, K = 50: 11 images in', out)
    assert 'fitting the mixture …\n' in out


def test_page_shows_numbers_and_figures_in_a_browser(evaluated):
  folder, _ = evaluated[1]
  page = open_page(folder / 'report.html', width=1280)
  assert page['scroll_width'] <= 1280
  assert len(page['pictures']) == len(FIGURES)
  assert all(width > 100 for width in page['pictures'])
  for text in (read(folder)['verdict'], 'bits_per_dim_iw', 'Smiling'):
    assert text in page['text']


def test_page_fits_a_phone(evaluated):
  page = open_page(evaluated[1][0] / 'report.html', width=500)
  assert page['scroll_width'] <= 500


def copy_run(trained_run, folder):
  shutil.copytree(trained_run, folder, ignore=shutil.ignore_patterns('eval*'))
  return folder


def no_checkpoint(run):
  shutil.rmtree(run / 'checkpoints')


def half_written(run):
  for path in (run / 'checkpoints').iterdir():
    path.rename(path.with_name(path.name + '.orbax-checkpoint-tmp'))


def truncated(run):
  for path in (run / 'checkpoints').glob('*/default/_METADATA'):
    path.write_bytes(path.read_bytes()[:100])


def other_shapes(run):
  config = json.loads((run / 'config.json').read_text())
  config['model']['hidden_channels'] = [4, 4]
  (run / 'config.json').write_text(json.dumps(config))


def unknown_key(run):
  config = json.loads((run / 'config.json').read_text())
  config['model']['prior'] = 'mixture'
  (run / 'config.json').write_text(json.dumps(config))


def other_data(run):
  (run / 'data.json').write_text('{"train": 41, "validation": 11}')


def other_names(run):
  data = json.loads((run / 'data.json').read_text())
  data['validation_names'] = data['train_names']
  (run / 'data.json').write_text(json.dumps(data))


def damaged_data_json(run):
  (run / 'data.json').write_text('{')


@pytest.mark.parametrize(
  ('spoil', 'flags', 'says'),
  [
    (no_checkpoint, (), 'checkpoints holds no complete checkpoint'),
    (half_written, (), 'checkpoints holds no complete checkpoint'),
    (truncated, (), 'cannot be restored'),
    (other_shapes, (), 'has the shape .* the config asks for'),
    (unknown_key, (), r'config\.json has config\.model\.prior'),
    (None, ('--checkpoint=7',), 'no checkpoint 7; there are best, last'),
    (None, ('--importance_samples=0',), 'importance_samples=0'),
    (None, ('--split=best',), '--split=best'),
    (None, ('--seed=4294967296',), 'seed=4294967296'),
    (other_data, (), 'a run on other data'),
    (other_names, (), 'other data: .* as many images .* those of validation'),
    (damaged_data_json, (), r'data\.json cannot be read .* Delete it'),
    (None, ('--metrics=elbo',), 'no elbo; there are bounds, reconstruction'),
    (None, ('--inception_weights=gone.tgz',), 'gone.tgz cannot be read'),
    (None, ('--data_dir=gone',), 'gone; there is no such folder'),
    (None, ('--output=/dev/null/x',), '--output=/dev/null/x cannot be written'),
  ],
  ids=lambda value: getattr(value, '__name__', str(value)),
)
def test_bad_input_is_one_line(trained_run, tmp_path, spoil, flags, says):
  run = trained_run
  if spoil:
    run = copy_run(trained_run, tmp_path / 'run')
    spoil(run)
  code, _, err = evaluate(f'--workdir={run}', *flags)
  assert code == 2
  assert re.fullmatch(rf'error: .*{says}.*\n', err), err


def test_without_a_workdir_the_flag_is_named():
  code, _, err = evaluate()
  assert code == 2 and '--workdir' in err and err.count('\n') == 1


def copy_data(celeba_dir, folder):
  shutil.copytree(celeba_dir, folder)
  return folder


def rename_image(data, number):
  """In the folder and in the lists."""
  old, new = f'{number:06d}.jpg', 'renamed.jpg'
  (data / 'img_align_celeba' / old).rename(data / 'img_align_celeba' / new)
  for path in data.glob('list_*.txt'):
    path.write_text(path.read_text().replace(old, new))


def test_other_data_that_is_named_is_remarked_on(
  trained_run, celeba_dir, tmp_path
):
  data = copy_data(celeba_dir, tmp_path / 'data')
  flags = (f'--workdir={trained_run}', f'--data_dir={data}', '--metrics=labels')
  (data / 'list_attr_celeba.txt').unlink()
  # Where it is as it was, but elsewhere, there is nothing to say.
  code, out, _ = evaluate(*flags)
  assert code == 2 and 'note: ' not in out
  rename_image(data, 3)
  code, out, err = evaluate(*flags)
  assert re.search('note: .* other data: .* those of train have', out), out
  assert code == 2 and 'has no labels' in err
  # And what is measured on it takes the place of nothing.
  folders = [path.name for path in (trained_run / 'evaluation').iterdir()]
  pattern = r'test_15_labels_data_dir=[0-9a-f]{12}'
  assert len([name for name in folders if re.fullmatch(pattern, name)]) == 1


def test_labels_of_data_without_labels_are_refused(
  trained_run, celeba_dir, tmp_path
):
  data = copy_data(celeba_dir, tmp_path / 'data')
  (data / 'list_attr_celeba.txt').unlink()
  code, _, err = evaluate(
    f'--workdir={trained_run}', '--metrics=labels', f'--data_dir={data}'
  )
  assert code == 2
  assert re.fullmatch(r'error: --metrics=labels: .* has no labels.*\n', err)


def test_failed_run_leaves_what_is_there(
  trained_run, celeba_dir, evaluated, tmp_path
):
  output = tmp_path / 'evaluation'
  shutil.copytree(evaluated[1][0], output)
  before = {path.name: path.read_bytes() for path in output.iterdir()}
  data = copy_data(celeba_dir, tmp_path / 'data')
  # An image of the test split, found when it is decoded.
  last = sorted((data / 'img_align_celeba').iterdir())[-1]
  last.write_bytes(last.read_bytes()[:2000])
  code, _, err = finish(
    start(
      f'--workdir={trained_run}',
      '--metrics=reconstruction',
      f'--data_dir={data}',
      f'--output={output}',
      script='evaluate.py',
    )
  )
  assert code == 2
  assert re.fullmatch(rf'error: .*{last.name} cannot be decoded.*\n', err)
  assert {p.name: p.read_bytes() for p in output.iterdir()} == before


def test_without_inception_weights_the_rest_is_measured(
  trained_run, tmp_path, monkeypatch
):
  # A cache that cannot be written.
  (tmp_path / 'cache').mkdir()
  (tmp_path / 'cache' / 'vae').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  code, out, err = evaluate(
    f'--workdir={trained_run}',
    '--metrics=reconstruction,fid',
    f'--output={tmp_path / "out"}',
  )
  assert code == 0, err
  found = read(tmp_path / 'out')
  assert (
    'mse_of_mean' in found['metrics'] and 'fid_samples' not in found['metrics']
  )
  (note,) = found['not_measured']
  assert 'FID and KID' in note and '--inception_weights=FILE' in note
  assert note in out


def test_without_weights_fid_alone_is_an_error(
  trained_run, tmp_path, monkeypatch
):
  (tmp_path / 'cache').mkdir()
  (tmp_path / 'cache' / 'vae').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  code, _, err = evaluate(f'--workdir={trained_run}', '--metrics=fid')
  assert code == 2
  assert re.fullmatch('error: .*--inception_weights=FILE.*\n', err)


def test_wrong_labels_are_told_before_long_work(
  trained_run, celeba_dir, tmp_path
):
  data = copy_data(celeba_dir, tmp_path / 'data')
  path = data / 'list_attr_celeba.txt'
  path.write_text(path.read_text().replace(' -1', ' 2', 1))
  code, out, err = evaluate(
    f'--workdir={trained_run}', '--metrics=bounds,labels', f'--data_dir={data}'
  )
  assert code == 2 and 'list_attr_celeba.txt, line' in err
  assert 'importance-weighted bound' not in out


def test_float64_is_measured_too(celeba_dir, tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_ENABLE_X64', '1')
  code, _, err = run(
    *SMALL,
    '--config.model.dtype=float64',
    '--config.train.num_epochs=1',
    f'--config.data.dir={celeba_dir}',
    f'--workdir={tmp_path}',
  )
  assert code == 0, err
  code, _, err = evaluate(
    f'--workdir={tmp_path}',
    '--metrics=bounds,posterior',
    '--importance_samples=3',
  )
  assert code == 0, err
  folder = tmp_path / 'evaluation' / 'test_5_bounds_posterior_k3'
  assert read(folder)['metrics']['iw_bound']['value'] is not None
  monkeypatch.delenv('JAX_ENABLE_X64')
  code, _, err = evaluate(f'--workdir={tmp_path}')
  assert code == 2 and 'JAX_ENABLE_X64=1' in err
