import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.conftest import ROOT
import vae
from vae import trained
from vae.errors import UserError


@pytest.fixture(scope='module')
def model(trained_run):
  return vae.load(trained_run)


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda model: model.update(prior='mixture'), "argument 'prior'"),
    (lambda model: model.pop('latent_dim'), "argument: 'latent_dim'"),
  ],
)
def test_config_of_other_code_gets_one_line(
  trained_run, tmp_path, change, said
):
  config = json.loads((trained_run / 'config.json').read_text())
  change(config['model'])
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='config.json does not fit') as caught:
    vae.load(tmp_path)
  assert said in str(caught.value) and '\n' not in str(caught.value)


def apply(model, *args, method):
  return model.model.apply(model.variables, *args, method=method)


def test_config_that_is_older_than_a_setting_has_its_default(
  trained_run, tmp_path, model, images
):
  shutil.copytree(trained_run, tmp_path / 'run')
  config = json.loads((trained_run / 'config.json').read_text())
  del config['model']['decoder_channels']
  (tmp_path / 'run/config.json').write_text(json.dumps(config))
  np.testing.assert_array_equal(
    vae.load(tmp_path / 'run').reconstruct(images), model.reconstruct(images)
  )


@pytest.mark.parametrize('method', ['encode', 'reconstruct', 'sample'])
def test_numbers_are_computed_precisely(model, images, monkeypatch, method):
  asked = []
  apply = trained._apply

  def asking(*args):
    asked.append(jax.config.jax_default_matmul_precision)
    return apply(*args)

  monkeypatch.setattr(trained, '_apply', asking)
  getattr(model, method)(3 if method == 'sample' else images)
  assert set(asked) == {'highest'}


def test_methods_are_the_models_whatever_the_number_of_rows(model, images):
  x = images / np.float32(255)
  mean, logvar = apply(model, x, method='encode')
  decoded = np.clip(apply(model, mean, method='decode'), 0, 1)
  for count in (70, 64, 1, 0):
    found = model.encode(images[:count])
    np.testing.assert_allclose(found[0], mean[:count], atol=1e-5)
    np.testing.assert_allclose(found[1], logvar[:count], atol=1e-5)
    np.testing.assert_allclose(
      model.reconstruct(images[:count]), decoded[:count], atol=1e-5
    )
    np.testing.assert_allclose(
      model.decode(mean[:count]), decoded[:count], atol=1e-5
    )
  assert decoded.dtype == np.float32


def test_uint8_and_unit_range_are_the_same(model, images):
  for dtype in (np.float32, np.float64):
    np.testing.assert_allclose(
      model.encode(images)[0],
      model.encode(images.astype(dtype) / 255)[0],
      atol=1e-5,
    )


def test_samples_are_of_the_seed_and_the_temperature(model):
  samples = model.sample(5, seed=3)
  assert samples.shape == (5, 16, 16, 3)
  np.testing.assert_array_equal(samples, model.sample(5, seed=3))
  assert not np.array_equal(samples, model.sample(5, seed=4))
  np.testing.assert_allclose(
    model.sample(5, temperature=0.0),
    np.tile(model.decode(np.zeros((1, 2))), (5, 1, 1, 1)),
    atol=1e-6,
  )


def test_drawn_reconstructions_scatter_as_the_posterior_does(model, images):
  assert not np.array_equal(
    model.reconstruct(images[:4]), model.reconstruct(images[:4], seed=0)
  )
  # Through a decoder that is the identity, the draws themselves.
  mean, logvar = model.encode(images[:1])
  draws = []
  model_decode, model.decode = model.decode, draws.append
  try:
    for seed in range(2000):
      model.reconstruct(images[:1], seed=seed)
  finally:
    model.decode = model_decode
  draws = np.concatenate(draws)
  deviation = np.exp(0.5 * logvar[0])
  np.testing.assert_allclose(
    draws.mean(axis=0), mean[0], atol=4 * deviation.max() / 2000**0.5
  )
  np.testing.assert_allclose(draws.std(axis=0), deviation, rtol=0.1)


@pytest.mark.parametrize(
  ('wrong', 'says'),
  [
    (np.zeros((16, 16, 3), np.uint8), r'\(16, 16, 3\); they must be \[n, 16, '),
    (np.zeros((2, 16, 16, 1), np.uint8), r'must be \[n, 16, 16, 3\]'),
    (np.full((1, 16, 16, 3), 255.0), 'from 255 to 255; .* in \\[0, 1\\]'),
    (np.full((1, 16, 16, 3), np.nan), 'in \\[0, 1\\]'),
    (np.zeros((1, 16, 16, 3), np.int64), 'int64; .* uint8 or floating'),
  ],
)
def test_what_is_no_image_is_refused(model, wrong, says):
  with pytest.raises(ValueError, match=says):
    model.encode(wrong)


def test_latents_of_another_size_are_refused(model):
  with pytest.raises(ValueError, match=r'\(3, 5\); it must be \[n, 2\]'):
    model.decode(np.zeros((3, 5)))


def test_any_checkpoint_can_be_loaded(trained_run, model):
  assert vae.load(trained_run, 'last').step == 15
  assert vae.load(str(trained_run), model.step).step == model.step
  with pytest.raises(UserError, match='no checkpoint 4; there are best, last'):
    vae.load(trained_run, 4)


def test_contradicting_shapes_are_a_clear_error(trained_run, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained_run, workdir)
  config = json.loads((workdir / 'config.json').read_text())
  config['model']['latent_dim'] = 7
  (workdir / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='do not go together: .* shape'):
    vae.load(workdir)


@pytest.mark.parametrize(
  ('content', 'says'),
  [(None, 'holds no run'), ('{', 'cannot be read'), ('[]', 'cannot be read')],
)
def test_workdir_without_a_config_is_a_clear_error(tmp_path, content, says):
  if content is not None:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UserError, match=says):
    vae.load(tmp_path)


def test_tensorflow_is_not_needed(trained_run):
  code = (
    'import sys, vae; '
    f'print(vae.load({str(trained_run)!r}).sample(2).shape, '
    "[m for m in ('tensorflow', 'clu', 'tensorboard') if m in sys.modules])"
  )
  result = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert (result.stdout, result.stderr) == ('(2, 16, 16, 3) []\n', '')


def test_each_method_is_compiled_once(model, images):
  model.encode(images)
  compiled = trained._apply._cache_size()
  for count in (1, 3, 64, 65):
    model.encode(images[:count])
  assert trained._apply._cache_size() == compiled
