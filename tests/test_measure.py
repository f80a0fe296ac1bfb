import json

from etils import epath
import jax
import numpy as np
import pytest

from evaluation import measure as measuring
from evaluation import output
from evaluation.measure import Settings
import input_pipeline
from tests.conftest import make_small_config
import vae
from vae import models, splits
from vae.loading import TrainedVAE
from vae.models import fsq

SETTINGS = Settings(
  ('bounds', 'reconstruction', 'posterior', 'labels'), 20, batch_size=4
)


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


def test_rate_and_distortion_are_those_of_training(
  results, trained, trained_run
):
  lines = (trained_run / 'metrics.jsonl').read_text().splitlines()
  row = next(
    row
    for row in map(json.loads, lines)
    if row['step'] == trained.step and 'val/kl' in row
  )
  assert value(results, 'rate') == pytest.approx(row['val/kl'], rel=1e-5)
  # Other draws of z: the same up to chance.
  error = results.metrics['distortion'].standard_error
  assert abs(value(results, 'distortion') - row['val/distortion']) < 3 * error


def test_bounds_are_in_order(results):
  assert value(results, 'elbo') == pytest.approx(
    -value(results, 'rate') - value(results, 'distortion'), rel=1e-6
  )
  slack = 3 * value(results, 'iw_bound_monte_carlo_error') + 1e-3
  assert value(results, 'iw_bound') >= value(results, 'elbo') - slack
  bits = value(results, 'bits_per_dim_optimal_sigma')
  assert value(results, 'bits_per_dim_iw') <= bits + 0.01
  assert bits <= value(results, 'bits_per_dim')
  # The dequantised image is (x + u)/256 instead of x/255: all but the same.
  nats = value(results, 'elbo_optimal_sigma')
  expected = -nats / (16 * 16 * 3) / np.log(2) + 8
  assert bits == pytest.approx(expected, abs=0.02)


def test_numbers_have_errors_nulls_and_labels(results):
  for name in ('prior_in_holes', 'gaussian_total_correlation', 'mig', 'sap'):
    assert results.metrics[name].null is not None
  # 5 % of draws from q(z) lie in its holes, and more of few.
  assert 0 < results.metrics['prior_in_holes'].null.value < 0.5
  assert results.metrics['linear_accuracy'].standard_error > 0
  names = ('linear_accuracy', 'majority_accuracy', 'mig', 'sap')
  assert 'Smiling' in results.labels and len(results.labels) == 4
  for numbers in results.labels.values():
    for name in names:
      assert np.isnan(numbers[name]) or 0 <= numbers[name] <= 1


def test_summary_is_the_measurement_with_fewer_draws(results, trained, data):
  summary = measuring.summarise(trained, data, 'validation', SETTINGS)
  assert value(summary, 'rate') == pytest.approx(value(results, 'rate'))
  for name in ('distortion', 'elbo_optimal_sigma'):
    error = results.metrics[name].standard_error
    assert abs(value(summary, name) - value(results, name)) < error
  for name in ('mse_of_mean', 'active_units'):
    assert value(summary, name) == pytest.approx(value(results, name))


def make_untrained(config, model=None):
  """A model with its first parameters, by default that of the config."""
  model = model or models.from_config(config)
  images = np.zeros((1, *model.image_shape))
  variables = jax.jit(model.init)(jax.random.key(0), images)
  return TrainedVAE(config, model, variables, step=0)


def make_codes(data_dir):
  """FSQ: z is a code at each position, and the prior uniform over codes."""
  model = fsq.Model((16, 16, 3), levels=(4, 3), channels=(2, 2))
  return make_untrained(make_small_config(data_dir), model)


def test_bernoulli_has_bits_only_at_the_common_yardstick(small_config, data):
  small_config.model.likelihood = 'bernoulli'
  trained = make_untrained(small_config)
  results = measuring.summarise(trained, data, 'test', Settings())
  assert 'bits_per_dim' not in results.metrics
  assert 'sigma' not in results.metrics
  assert any('not a density' in note for note in results.notes)
  # Grey images, about: the decoder is untrained.
  assert 6 < value(results, 'bits_per_dim_optimal_sigma') < 9


def test_plain_autoencoder_has_no_bound_but_a_note(small_config, data):
  small_config.objective.update(sample_posterior=False, beta=0.0)
  trained = make_untrained(small_config)
  groups = ('bounds', 'reconstruction', 'posterior')
  results = measuring.measure(trained, data, 'test', Settings(groups, 5))
  assert set(results.metrics) == {
    *('mse_of_mean', 'psnr', 'ssim', 'active_units'),
    *('prior_in_holes', 'mixture_in_holes'),
  }
  assert results.verdict == ''
  assert any('plain autoencoder' in note for note in results.notes)


@pytest.mark.slow
def test_codes_without_a_gaussian_posterior_are_measured(
  celeba_dir, data, tmp_path
):
  trained = make_codes(celeba_dir)
  groups = ('bounds', 'reconstruction', 'posterior')
  results = measuring.measure(trained, data, 'validation', Settings(groups, 3))
  positions = np.prod(trained.latent_shape[:2])
  rate = positions * np.log(4 * 3)
  assert value(results, 'rate') == pytest.approx(rate, rel=1e-5)
  # The only draw of z is the code: all bounds are the ELBO.
  assert value(results, 'iw_bound') == pytest.approx(
    value(results, 'elbo'), rel=1e-5
  )
  np.testing.assert_allclose(
    results.dimensions['kl'], np.tile(np.log([4, 3]), positions), rtol=1e-5
  )
  assert 'mutual_information_lower_bound' not in results.metrics
  assert any('not a diagonal Gaussian' in note for note in results.notes)
  assert {'prior_in_holes', 'psnr'} < set(results.metrics)
  originals = splits.Examples(data.validation.images[:4])
  facts = dict(workdir='run', step=0, split='validation', num_images=11, seed=0)
  output.write(epath.Path(tmp_path), facts, results, trained, originals)
  assert {'traversals.png', 'samples.png', 'report.html'} < {
    path.name for path in tmp_path.iterdir()
  }
