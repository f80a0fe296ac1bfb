import json
import shutil
import types

from etils import epath
import jax
import numpy as np
import pytest
from vae.trained import TrainedVAE

from evaluation import aggregate_posterior
from evaluation import log_likelihood
from evaluation import measure as measuring
from evaluation.measure import Settings
from evaluation.measurements import Measurements
import input_pipeline
from sweeps import measuring as sweep_measuring
from tests.conftest import make_small_config
import vae
from vae import model as models
from vae import splits

# No Inception weights, so no FID; tests/test_evaluate.py has it.
SETTINGS = Settings(num_importance_samples=20, batch_size=4)


@pytest.fixture(scope='module')
def data(celeba_dir):
  return input_pipeline.load(make_small_config(celeba_dir))


@pytest.fixture(scope='module')
def trained(trained_run):
  return vae.load(trained_run)


@pytest.fixture(scope='module')
def results(trained, data):
  return measuring.measure(trained, data, 'validation', SETTINGS)


def value(results, name):
  return results.metrics[name].value


def test_rate_is_what_training_wrote(results, trained, trained_run):
  lines = (trained_run / 'metrics.jsonl').read_text().splitlines()
  row = next(
    row
    for row in map(json.loads, lines)
    if row['step'] == trained.step and 'val/kl' in row
  )
  assert value(results, 'rate') == pytest.approx(row['val/kl'], rel=1e-5)
  # z is drawn anew: the same up to chance.
  error = results.metrics['distortion'].standard_error
  assert abs(value(results, 'distortion') - row['val/distortion']) < 3 * error


def test_bounds_are_in_order(results):
  assert value(results, 'elbo') == pytest.approx(
    -value(results, 'rate') - value(results, 'distortion'), rel=1e-6
  )
  slack = 3 * value(results, 'iw_bound_monte_carlo_error') + 1e-3
  assert value(results, 'iw_bound') >= value(results, 'elbo') - slack
  assert value(results, 'elbo_optimal_sigma') >= value(results, 'elbo')
  assert value(results, 'bits_per_dim_optimal_sigma') <= value(
    results, 'bits_per_dim'
  )
  assert value(results, 'bits_per_dim_iw') <= (
    value(results, 'bits_per_dim_optimal_sigma') + 0.01
  )


def test_bound_at_the_optimal_sigma_is_its_closed_form(results):
  dimensions = 16 * 16 * 3
  sigma = value(results, 'optimal_sigma')
  likelihood = -dimensions / 2 * (1 + np.log(2 * np.pi * sigma**2))
  assert value(results, 'elbo_optimal_sigma') == pytest.approx(
    likelihood - value(results, 'rate'), rel=1e-5
  )
  # The dequantised image is (x + u)/256 instead of x/255: all but the same.
  bits = -value(results, 'elbo_optimal_sigma') / dimensions / np.log(2) + 8
  assert value(results, 'bits_per_dim_optimal_sigma') == pytest.approx(
    bits, abs=0.02
  )


def test_rate_is_the_sum_of_its_parts(results):
  rate = value(results, 'rate')
  low, high = (
    value(results, f'mutual_information_{end}_bound')
    + value(results, f'total_correlation_{end}_bound')
    for end in ('lower', 'upper')
  )
  rest = value(results, 'dimension_wise_kl')
  error = 2 * results.metrics['dimension_wise_kl'].standard_error
  assert low < rate - rest + error and rate - rest - error < high
  assert sum(results.dimensions['kl']) == pytest.approx(rate, rel=1e-6)
  assert 1 <= value(results, 'dimensions_of_90_percent') <= 2


def test_bound_that_rests_on_one_draw_is_called_loose(
  trained, data, monkeypatch
):
  # Of 1,000 draws all count at the model's σ, at the optimal one about one;
  # half as many gave 46 to 48 nats less.
  ones = np.ones(11)
  weighted = {
    'bound': -900 * ones,
    'half_bounds': np.stack([-900.5 * ones, -899.5 * ones], axis=1),
    'effective_sample_size': 700 * ones,
    'dequantised_bound': 1000 * ones,
    'dequantised_half_bounds': np.stack([952 * ones, 954 * ones], axis=1),
    'dequantised_effective_sample_size': 1.06 * ones,
  }
  monkeypatch.setattr(
    log_likelihood.per_image, 'over_split', lambda *args: weighted
  )
  results = Measurements(11)
  log_likelihood.add_importance_weighted(
    results, trained, data.validation, 0.1, 1000, 8, 0
  )
  in_bits = 768 * np.log(2)
  assert 'loose' not in results.metrics['iw_bound'].about
  loose = results.metrics['bits_per_dim_iw']
  assert 'a loose bound' in loose.about and '1.06 count' in loose.about
  assert f'{-47 / in_bits:+.2g} from K/2 to K' in loose.about
  assert value(results, 'bits_per_dim_iw_effective_samples') == pytest.approx(
    1.06
  )
  # Each image's halves differ by 2 nats: √2 nats for each of eleven images.
  error = np.sqrt(2 / 11) / in_bits
  assert value(results, 'bits_per_dim_iw_monte_carlo_error') == pytest.approx(
    error
  )


def test_what_is_fitted_to_the_images_measured_says_so(results):
  for name in (
    'optimal_sigma',
    'elbo_optimal_sigma',
    'bits_per_dim_optimal_sigma',
    'bits_per_dim_iw',
  ):
    about = results.metrics[name].about
    assert 'fitted to the same images' in about, name


def test_mse_is_that_of_the_mean_and_says_how_it_differs(results):
  assert 'mse' not in results.metrics
  about = results.metrics['mse_of_mean'].about
  assert 'posterior mean' in about and 'clipped' in about


@pytest.mark.parametrize('groups', [(), ('posterior',)])
def test_points_of_a_sweep_have_the_same_numbers(
  trained, trained_run, data, tmp_path, groups
):
  workdir = epath.Path(tmp_path / 'run')
  shutil.copytree(trained_run, workdir)
  run = types.SimpleNamespace(config=trained.config, workdir=workdir)
  metrics, _ = sweep_measuring.measure_run(
    run, data, 'validation', Settings(groups, batch_size=8), 4, ('elbo',)
  )
  # Models are padded to four dimensions, more than the config has.
  assert metrics['active_units'].unit == 'of 2'
  assert metrics['dimensions_of_90_percent'].unit == 'of 2'
  assert metrics['dimensions_of_90_percent'].value in (1, 2)
  if groups:
    null = metrics['gaussian_total_correlation_null'].value
    assert null == metrics['gaussian_total_correlation'].null.value


@pytest.mark.parametrize(
  ('split', 'fitted'), [('validation', 'train'), ('train', 'validation')]
)
def test_label_scores_have_their_chance_level(trained, data, split, fitted):
  results = measuring.measure(
    trained, data, split, Settings(('labels',), batch_size=8)
  )
  count = getattr(data, fitted).num_examples
  assert f'{count} images of the {fitted} split' in results.metrics['mig'].about
  for name, metric in results.metrics.items():
    assert (metric.null is None) == (name == 'majority_accuracy')
  for name in ('dci_disentanglement', 'dci_completeness', 'sap'):
    about = results.metrics[name].about
    assert 'not comparable with published figures' in about
  for name in ('linear_accuracy', 'linear_balanced_accuracy'):
    assert results.metrics[name].standard_error > 0


def test_standard_errors_are_of_the_mean_over_images():
  results = Measurements(num_images=5)
  values = np.array([1.0, 2.0, 4.0, 8.0, 0.0])
  results.mean('x', values, 'nats', 'a mean')
  assert results.metrics['x'].value == 3
  assert results.metrics['x'].standard_error == pytest.approx(
    np.std(values, ddof=1) / np.sqrt(5)
  )


def test_labels_have_their_numbers(results):
  assert list(results.labels) == [
    'Bald',
    'Eyeglasses',
    'Mouth_Slightly_Open',
    'Smiling',
  ]
  names = ('linear_accuracy', 'majority_accuracy', 'mig', 'sap')
  for numbers in results.labels.values():
    for name in names:
      assert np.isnan(numbers[name]) or 0 <= numbers[name] <= 1
  for name in (*names, 'dci_disentanglement', 'dci_completeness'):
    assert 0 <= value(results, name) <= 1


def make_untrained(data_dir, likelihood='gaussian', **objective):
  """A model with its first parameters."""
  config = make_small_config(data_dir)
  config.model.likelihood = likelihood
  config.objective.update(objective)
  model = models.from_config(config)
  variables = jax.jit(model.init)(
    jax.random.key(0), np.zeros((1, *model.image_shape))
  )
  return TrainedVAE(config, model, variables, step=0)


def test_bernoulli_has_bits_only_at_the_common_yardstick(celeba_dir, data):
  trained = make_untrained(celeba_dir, 'bernoulli')
  results = measuring.measure(
    trained, data, 'test', Settings(('bounds',), 10, 4)
  )
  assert 'bits_per_dim' not in results.metrics
  assert 'sigma' not in results.metrics
  # Grey images, about: the decoder is untrained.
  assert 6 < value(results, 'bits_per_dim_optimal_sigma') < 9


def test_plain_autoencoder_has_no_bound_and_says_so(celeba_dir, data):
  trained = make_untrained(celeba_dir, sample_posterior=False, beta=0.0)
  results = measuring.measure(trained, data, 'test', SETTINGS)
  assert not {
    'elbo',
    'rate',
    'iw_bound',
    'total_correlation_upper_bound',
    'gaussian_total_correlation',
  } & set(results.metrics)
  assert {'mse_of_mean', 'psnr', 'active_units', 'prior_in_holes'} < set(
    results.metrics
  )
  assert results.verdict == ''
  assert any('plain autoencoder' in note for note in results.notes)


def test_data_without_labels_says_so(celeba_dir, data):
  def without(split):
    images = np.concatenate(
      list(split.batches(np.arange(split.num_examples), 8))
    )
    return splits.ArraySplit(images)

  bare = splits.DataSet(
    without(data.train), without(data.validation), without(data.test)
  )
  results = measuring.measure(
    make_untrained(celeba_dir), bare, 'test', Settings(('labels',))
  )
  assert not results.metrics and not results.labels
  assert results.notes == ['labels: the data has none.']


def test_collapsed_posterior_is_said_to_be_collapsed(celeba_dir, data):
  trained = make_untrained(celeba_dir)
  # The heads of the encoder are cut off: q(z|x) = N(0, I).
  encoder = trained.variables['params']['encoder']
  for head in ('mean', 'logvar'):
    encoder[head] = jax.tree.map(lambda a: 0 * a, encoder[head])
  results = measuring.measure(
    trained, data, 'test', Settings(('bounds', 'posterior'), 5)
  )
  assert results.verdict.startswith('Collapsed: none of the 3 dimensions')
  assert value(results, 'rate') == 0
  assert value(results, 'active_units') == 0
  # All weights are p(x|z) for z from the prior.
  for end in ('lower', 'upper'):
    information = value(results, f'mutual_information_{end}_bound')
    assert information == pytest.approx(0, abs=1e-5)
  assert value(results, 'dimensions_of_90_percent') == 0


def test_what_is_fitted_has_other_noise_than_what_it_is_compared_with(
  celeba_dir, data, monkeypatch
):
  draws = []
  draw = aggregate_posterior.draw
  monkeypatch.setattr(
    aggregate_posterior,
    'draw',
    lambda *args: draws.append(draw(*args)) or draws[-1],
  )
  trained = make_untrained(celeba_dir)
  measuring.measure(trained, data, 'validation', Settings(('posterior',)))
  # An untrained posterior is near the prior: the draws are noise alone.
  (fitted,) = (z for z in draws if len(z) == data.train.num_examples)
  here = [z for z in draws if len(z) == data.validation.num_examples]
  assert here
  for z in here:
    shared = np.corrcoef(z.ravel(), fitted[: len(z)].ravel())[0, 1]
    assert abs(shared) < 0.6


def test_what_is_known_shows_before_all_is(celeba_dir, data, monkeypatch):
  def fail(*_):
    raise MemoryError

  monkeypatch.setattr(aggregate_posterior, 'split_rate', fail)
  results = measuring.Measurements(11)
  with pytest.raises(MemoryError):
    measuring.measure(
      make_untrained(celeba_dir),
      data,
      'validation',
      Settings(('reconstruction', 'posterior')),
      results,
    )
  assert {'mse_of_mean', 'psnr', 'active_units'} <= set(results.metrics)


def test_full_precision_is_asked_for(celeba_dir, data, monkeypatch):
  asked = []
  make_step = measuring.per_image.make_measure_step
  monkeypatch.setattr(
    measuring.per_image,
    'make_measure_step',
    lambda *args: (
      asked.append(jax.config.jax_default_matmul_precision) or make_step(*args)
    ),
  )
  measuring.measure(
    make_untrained(celeba_dir), data, 'test', Settings(('reconstruction',))
  )
  assert asked == ['highest']
