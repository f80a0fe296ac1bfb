import jax
import numpy as np
import pytest

from vae import layers


def test_parameters_start_within_the_fan_in_bound():
  bound_holds(layers.Conv(64), bound=(9 * 32) ** -0.5)


def test_transposed_convolutions_take_their_outputs_for_the_fan_in():
  # PyTorch keeps their kernel as [inputs, outputs, 3, 3], and counts the fan-in
  # of any kernel as the numbers in its second and later dimensions.
  bound_holds(layers.ConvTranspose(64), bound=(9 * 64) ** -0.5)


def bound_holds(layer, bound):
  params = layer.init(jax.random.key(0), np.ones((1, 4, 4, 32), np.float32))
  for values in jax.tree.leaves(params):
    assert np.abs(values).max() <= bound
  kernel = params['params']['kernel']
  # The standard deviation of a uniform distribution.
  assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_auto_is_matmul_on_a_cpu_only(monkeypatch):
  assert layers.use_matmul('auto') and layers.use_matmul('matmul')
  assert not layers.use_matmul('native')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert not layers.use_matmul('auto')
