"""The benchmarks run and compare as they claim; no speed is asserted."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import (
  accelerator_checks,
  bandwidth,
  jax_vae,
  loop_recorder,
  profile_step,
  rounds,
  same_network,
  tpu_compile,
)
from tests.conftest import ROOT

# A part of each script's output.
SCRIPTS = {
  'train_step': 'Same network as in plain Flax',
  'end_to_end': 'seconds per epoch',
  'scaling': 'Virtual devices',
  'population': 'time of a run',
  'checkpoints': 'share of the loop',
  'bucket': 'bucket / disk, median of the rounds',
  'accelerator_checks': 'same bits',
  'command_buffers': 'with the loop',
  'profile_step': 'ms per step',
}
if tpu_compile.has_libtpu():
  SCRIPTS['tpu_compile'] = 'images a chip'


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_run_without_tensorflow_and_pytorch(script, tmp_path):
  blocked = [] if script == 'bucket' else ['tensorflow', 'clu', 'torch']
  program = (
    f'import runpy, sys; sys.modules |= dict.fromkeys({blocked}); '
    'sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name="__main__")'
  )
  output = tmp_path / 'results.json'
  flags = ['--quick', f'--output={output}']
  flags += ['--without_torch'] * (script == 'train_step')
  command = [sys.executable, '-c', program, f'benchmarks/{script}.py', *flags]
  result = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=600
  )
  assert result.returncode == 0, result.stderr
  assert SCRIPTS[script] in result.stdout
  assert json.loads(output.read_text())['machine']['devices']


def test_plain_flax_has_the_same_network():
  differences = same_network.check(jax_vae.make_config(True), with_torch=False)
  assert max(differences['plain Flax'].values()) < 1e-4


def measured(batch_size, *seconds):
  return rounds.Measured('name', batch_size, 'float32', 0.0, 1, list(seconds))


def test_speedup_is_the_median_of_the_ratios_of_the_rounds():
  # The machine is ten times slower in the second round.
  ours, other = measured(8, 0.1, 1.0, 0.1), measured(4, 0.2, 2.0, 0.1)
  assert rounds.speedup(ours, other) == pytest.approx(2 * 2)
  assert ours.images_per_second == pytest.approx(80)


def test_contenders_take_turns():
  runs = []
  contenders = [
    rounds.Contender(name, 1, 'float32', lambda steps, n=name: runs.append(n))
    for name in 'abc'
  ]
  found = [measured(1) for _ in contenders]
  rounds.alternate(contenders, found, num_rounds=3)
  assert ''.join(runs) == 'abcbcacab'
  assert [len(one.step_seconds) for one in found] == [3, 3, 3]


def test_minimum_bytes_of_a_network_counted_by_hand():
  config = jax_vae.make_config()
  config.data.image_size = 8
  config.model.hidden_channels = (2, 4)
  config.model.latent_dim = 3
  # Before a BatchNorm: 4·4·2 + 2·2·4, and 4·4·2 + 8·8·2.
  normalised, start, image = 48 + 160, 16, 192
  parameters = (9 * 3 + 1) * 2 + (9 * 2 + 1) * 4 + 2 * (16 + 1) * 3
  parameters += (3 + 1) * 16 + (9 * 4 + 1) * 2 + (9 * 2 + 1) * (2 + 3)
  parameters += 2 * (2 + 4 + 2 + 2)
  separate = (14 * normalised + 6 * start + 8 * image) * 2 + 2 * image
  fused = (6 * normalised + 5 * start + 2 * image) * 2 + 3 * image
  for expected, is_fused in ((separate, False), (fused, True)):
    counted = bandwidth.minimum_bytes(config, 10, 'bfloat16', is_fused)
    assert counted == 10 * expected + 40 * parameters


def test_devices_wait_between_the_calls_of_the_loop():
  call = loop_recorder.Call
  calls = [
    call('training', 0, True, called=0, returned=5, finished=7),
    call('training', 0, False, called=6, returned=6, finished=9),
    call('training', 0, False, called=12, returned=12, finished=14),
  ]
  loop_recorder.settle(calls)
  assert [c.compilation for c in calls] == [5, 0, 0]
  assert [c.computation for c in calls] == [2, 2, 2]
  assert [c.wait for c in calls] == [0, 0, 3]


# Stands in for Python in accelerator.sh.
STAND_IN = """#!/bin/sh
case $1 in
  *accelerator_checks.py) echo the reason >&2; exit 3 ;;
  *end_to_end.py) exec sleep 60 ;;
  *command_buffers.py) kill -KILL $$ ;;
  *.py) for last; do :; done; echo "$@" > "${last#--output=}" ;;
esac
"""


def test_parts_go_on_after_one_that_fails_hangs_or_is_killed(tmp_path):
  python, folder = tmp_path / 'python', tmp_path / 'results'
  python.write_text(STAND_IN)
  python.chmod(0o755)
  for flags in (
    ['--parts=checks,command_buffers,population'],
    ['--parts=end_to_end,profile', '--quick', '--seconds=5'],
  ):
    result = subprocess.run(
      [ROOT / 'benchmarks/accelerator.sh', *flags, folder],
      env=os.environ | {'PYTHON': str(python)},
      capture_output=True,
      text=True,
    )
    assert result.returncode == 1
  log = (folder / 'log.txt').read_text()
  assert log.endswith(result.stdout) and '\nthe reason\n' in log
  ended = dict(re.findall('^=== (.*): (.*)$', log, re.MULTILINE))
  assert ended['checks'].endswith(' with exit status 3')
  assert ended['command_buffers'].endswith(' with exit status 137')
  assert ended['population'].startswith('done after ')
  assert ended['end_to_end'].endswith(' s, as it took too long')
  assert 'profile' in ended


def test_losses_are_compared_with_the_limits_of_their_dtype():
  names = 'float64 default', 'float32 highest', 'float32 default'
  cpu = dict.fromkeys((*names, 'bfloat16 default'), [100.0, 50.0])
  accelerator = {
    names[0]: [100.0, 50.0 * (1 + 2e-9)],
    # The limit of the first step is lower than that of later ones.
    names[1]: [100.0 * (1 - 0.9e-5), 50.0 * (1 + 9e-3)],
    names[2]: [100.0, math.nan],
  }
  rows = accelerator_checks.compare(cpu, accelerator)
  assert [row['passed'] for row in rows] == [False, True, False]
  assert rows[0]['largest'] == pytest.approx(2e-9, rel=1e-6)
  assert rows[1]['first'] == pytest.approx(0.9e-5, rel=1e-6)


def event(kernel, *microseconds):
  start, duration = (10**6 * number for number in microseconds)
  times = f'offset_ps: {start} duration_ps: {duration}'
  stats = 'stats { metadata_id: 1 str_value: "op" }'
  return f'events {{ metadata_id: {kernel} {times} {stats} }}'


# Two steps: a kernel of 2 µs in each, which one of 1 µs on another stream
# overlaps in the first, and a copy of 1 µs in the second; no kernel is the sum
# of the streams.
TRACE = f"""planes {{
  name: "/device:GPU:0"
  lines {{ name: "Stream #7" {event(1, 0, 2)}{event(1, 6, 2)}{event(2, 9, 1)} }}
  lines {{ name: "Stream #8" {event(3, 1, 1)} }}
  lines {{ name: "XLA Modules" {event(1, 0, 10)} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "kernel" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "copy" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "other" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
}}"""


def test_trace_is_summed_by_kernel():
  data = jax.profiler.ProfileData
  binary = data.text_proto_to_serialized_xspace(TRACE)
  trace = data.from_serialized_xspace(binary)
  summary = profile_step.summarize(trace, num_steps=2, num_rows=1)
  assert summary['milliseconds_per_step'] == pytest.approx(0.005)
  assert (summary['busy'], summary['num_kernels']) == (pytest.approx(0.5), 2)
  (first,) = summary['kernels']
  assert (first.pop('kernel'), first.pop('operation')) == ('kernel', 'op')
  expected = {'milliseconds': 0.002, 'calls': 1, 'share': 4 / 6}
  assert first == pytest.approx(expected)
