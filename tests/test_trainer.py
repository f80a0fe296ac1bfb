"""A run in training, step by step."""

import dataclasses
import threading
import time

import jax
import pytest

from runs import schema
from tests.conftest import make_data, make_small_config, Rows
import train
from vae import population, splits, steps
from vae.checkpoints import Checkpoints
from vae.errors import UserError
from vae.population import Population
from vae.trainer import Trainer


def on_device(data):
  return splits.DataSet(
    *(
      splits.DeviceSplit(getattr(data, field.name))
      for field in dataclasses.fields(data)
    )
  )


@pytest.fixture
def lowered():
  """The programs that are lowered, and so compiled or read, from now on."""
  found = []
  steps.make_eval_steps.cache_clear()
  population._over_members.cache_clear()

  def listen(event, seconds, **about):
    if event == '/jax/core/compile/jaxpr_to_mlir_module_duration':
      found.append(about)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
  ('place', 'make', 'settings'),
  [
    (lambda data: data, Trainer, {}),
    (on_device, Trainer, {}),
    (on_device, Trainer, {'num_classes': 2}),
    (on_device, lambda config, data: Population([config], data), {}),
    (lambda data: data, lambda c, data: Population([c], data), {}),
  ],
  ids=['host', 'device', 'labels', 'population', 'population_host'],
)
def test_validation_can_be_compiled_before(place, make, settings, lowered):
  config = make_small_config('')
  config.model.update(settings)
  config.data.cache = 'host'
  schema.validate(config)
  trainer = make(config, place(make_data()))
  trainer.train(next(trainer.train_chunks(0, 0)))
  del lowered[:]
  trainer.compile_validation()
  assert lowered
  chunks = list(trainer.eval_chunks())
  del lowered[:]
  jax.block_until_ready([trainer.evaluate(*chunk) for chunk in chunks])
  assert lowered == []


@pytest.mark.slow
def test_loop_compiles_the_validation_once(lowered, tmp_path, monkeypatch):
  monkeypatch.setattr(train, '_compiles_beside', lambda: True)
  config = make_small_config('')
  config.train.num_epochs = 2
  data, counts = make_data(), []
  for name in ('together', 'after'):
    if name == 'after':
      monkeypatch.setattr(Trainer, 'compile_validation', lambda self: None)
    steps.make_train_steps.cache_clear()
    steps.make_eval_steps.cache_clear()
    jax.clear_caches()
    del lowered[:]
    train.train_and_evaluate(config, tmp_path / name, data, Rows())
    counts.append(len(lowered))
  assert counts[0] == counts[1]


def test_stopped_run_leaves_no_compilation_behind(tmp_path, monkeypatch):
  monkeypatch.setattr(train, '_compiles_beside', lambda: True)
  ended = threading.Event()

  def compile_slowly(self):
    time.sleep(1)
    ended.set()

  monkeypatch.setattr(Trainer, 'compile_validation', compile_slowly)
  config = make_small_config('')
  train.train_and_evaluate(config, tmp_path, make_data(), Rows(), lambda: True)
  assert ended.is_set()


def test_error_of_the_compilation_ends_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(train, '_compiles_beside', lambda: True)

  def fail(self):
    raise UserError('no memory')

  monkeypatch.setattr(Trainer, 'compile_validation', fail)
  with pytest.raises(UserError, match='no memory'):
    train.train_and_evaluate(
      make_small_config(''), tmp_path, make_data(), Rows()
    )
  assert Checkpoints(tmp_path).all_steps() == [5]
