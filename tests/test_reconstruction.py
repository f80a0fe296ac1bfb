import jax
import numpy as np
import pytest
import tensorflow as tf

from evaluation import reconstruction
from tests import test_bounds
from tests.test_bounds import SIGMA
from vae import numerics, splits


@pytest.fixture(scope='module')
def linear():
  context, _ = test_bounds.make_linear()
  return context


def test_expectations_under_the_posterior_are_those_of_the_linear_model(linear):
  values = linear.images
  x = test_bounds.pixels_of(linear) / 255
  params = jax.device_get(linear.trained.variables['params'])
  mean = x @ params['encoder']['mean']['kernel']
  mean += params['encoder']['mean']['bias']
  np.testing.assert_allclose(values['mean'], mean, atol=1e-4)
  variance = np.exp(values['logvar'])
  kl = 0.5 * (mean**2 + variance - 1 - values['logvar'])
  np.testing.assert_allclose(values['kl'], kl, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(values['rate'], kl.sum(axis=1), rtol=1e-4)
  dense = params['decoder']['Dense_0']
  errors = x - mean @ dense['kernel'] - dense['bias']
  spread = (variance * (dense['kernel'] ** 2).sum(axis=1)).sum(axis=1)
  expected = (errors**2).sum(axis=1) + spread
  assert values['squared_error'].mean() == pytest.approx(
    expected.mean(), rel=0.03
  )
  distortion = values['squared_error'] / (2 * SIGMA**2)
  distortion += 48 * (np.log(SIGMA) + 0.5 * np.log(2 * np.pi))
  np.testing.assert_allclose(values['distortion'], distortion, atol=1e-2)
  np.testing.assert_allclose(values['sigma'], SIGMA, rtol=1e-6)
  clipped = np.clip(x - errors, 0, 1)
  mse = ((x - clipped) ** 2).mean(axis=1)
  np.testing.assert_allclose(values['mse'], mse, rtol=1e-3)
  np.testing.assert_allclose(values['psnr'], -10 * np.log10(mse), rtol=1e-3)
  assert 'ssim' not in values  # The images are smaller than its window.


def test_float64_models_are_measured_in_float64():
  with numerics.precise('float64'):
    context, _ = test_bounds.make_linear(dtype='float64')
    values = context.images
  params = jax.device_get(
    context.trained.variables['params']['encoder']['mean']
  )
  mean = test_bounds.pixels_of(context) / 255 @ params['kernel']
  np.testing.assert_allclose(values['mean'], mean + params['bias'], rtol=1e-9)
  assert values['distortion'].dtype == np.float64


def test_every_image_counts_once_in_order(linear, capsys):
  pixels = np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1)
  values = linear.over_split(
    lambda images, start: {'pixel': images[..., 0, 0, 0], 'twice': 2 * images},
    'doubling',
    splits.ArraySplit(pixels),
    batch_size=4,
  )
  np.testing.assert_array_equal(values['pixel'], np.arange(11))
  np.testing.assert_array_equal(values['twice'], 2 * pixels)
  assert 'doubling: 11 images in' in capsys.readouterr().out


@pytest.mark.parametrize('shape', [(32, 40, 3), (11, 11, 1)])
def test_psnr_and_ssim_are_those_of_tensorflow(shape):
  generator = np.random.default_rng(0)
  a = generator.uniform(size=(5, *shape)).astype(np.float32)
  b = np.clip(a + 0.2 * generator.normal(size=a.shape), 0, 1)
  b = b.astype(np.float32)
  np.testing.assert_allclose(
    reconstruction.psnr(a, b), tf.image.psnr(a, b, max_val=1.0), rtol=1e-5
  )
  np.testing.assert_allclose(
    reconstruction.ssim(a, b), tf.image.ssim(a, b, max_val=1.0), rtol=1e-4
  )
  np.testing.assert_allclose(reconstruction.ssim(a, a), 1, rtol=1e-5)
