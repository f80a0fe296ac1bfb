import numpy as np
import pytest
import tensorflow as tf

from evaluation import image_quality


@pytest.fixture(scope='module', params=[(32, 40, 3), (11, 11, 1)])
def pair(request):
  generator = np.random.default_rng(0)
  a = generator.uniform(size=(5, *request.param)).astype(np.float32)
  b = np.clip(a + 0.2 * generator.normal(size=a.shape), 0, 1)
  return a, b.astype(np.float32)


def test_psnr_and_ssim_are_those_of_tensorflow(pair):
  a, b = pair
  np.testing.assert_allclose(
    image_quality.psnr(a, b), tf.image.psnr(a, b, max_val=1.0), rtol=1e-5
  )
  np.testing.assert_allclose(
    image_quality.ssim(a, b), tf.image.ssim(a, b, max_val=1.0), rtol=1e-4
  )


def test_equal_images_are_as_like_as_can_be(pair):
  a, _ = pair
  np.testing.assert_allclose(image_quality.ssim(a, a), 1, rtol=1e-5)
  assert np.all(np.isinf(image_quality.psnr(a, a)))


def test_ssim_of_flat_images_is_its_luminance_term():
  a, b = np.full((1, 16, 16, 3), 0.25), np.full((1, 16, 16, 3), 0.75)
  expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
  np.testing.assert_allclose(image_quality.ssim(a, b), expected, rtol=1e-4)


def test_ssim_of_images_smaller_than_the_window_is_refused():
  with pytest.raises(ValueError, match='at least 11×11, not 10×16'):
    image_quality.ssim(np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)))
