import jax
import numpy as np
import pytest

from vae import layers


def test_parameters_start_within_the_fan_in_bound():
  params = layers.Conv(64).init(
    jax.random.key(0), np.ones((1, 4, 4, 32), np.float32)
  )
  bound = (9 * 32) ** -0.5
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
