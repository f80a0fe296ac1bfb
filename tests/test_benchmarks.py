"""That the benchmarks run, and compare as they say; not how fast it all is."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import accelerator_checks
from benchmarks import accelerator_tables
from benchmarks import bandwidth
from benchmarks import profile_step
from benchmarks import rounds
from benchmarks import tpu_compile
from configs import celeba
from tests.conftest import ROOT
from tests.preloaded import program_lines


@pytest.mark.parametrize(
  ('script', 'flags', 'said'),
  [
    ('train_step', ['--without_torch'], 'Same network as in plain Flax'),
    ('end_to_end', ['--cache=device'], 'seconds per epoch'),
    ('scaling', [], 'devices'),
    ('population', [], 'time of one run'),
    ('checkpoints', [], 'share of the loop'),
    ('accelerator_checks', [], 'same bits'),
    ('command_buffers', [], 'with the loop'),
    ('profile_step', [], 'ms a step'),
    pytest.param(
      *('tpu_compile', [], 'images a chip'),
      marks=pytest.mark.skipif(
        not tpu_compile.has_libtpu(), reason='no libtpu (make libtpu)'
      ),
    ),
  ],
)
def test_scripts_run_without_tensorflow(script, flags, said, tmp_path):
  program = (
    'import runpy, sys\n'
    # What is not there cannot be imported.
    'sys.modules |= dict.fromkeys(["tensorflow", "clu", "torch"])\n'
    'script = sys.argv.pop(1)\n'
    'sys.argv[0] = script\n'
    'runpy.run_path(script, run_name="__main__")\n'
  )
  output = tmp_path / 'results.json'
  result = subprocess.run(
    [
      *(sys.executable, '-c', program, f'benchmarks/{script}.py'),
      *('--quick', f'--output={output}', *flags),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stderr
  assert said in result.stdout
  machine = json.loads(output.read_text())['machine']
  assert {'date', 'jax', 'devices', 'cpu'} <= machine.keys()


@pytest.mark.parametrize('script', ['train_step', 'checkpoints'])
def test_devices_that_are_not_there_get_one_line(script):
  result = subprocess.run(
    [sys.executable, f'benchmarks/{script}.py'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'typo'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  assert program_lines(result.stderr).count('\n') == 1
  assert result.stderr.startswith("error: JAX_PLATFORMS is 'typo'; ")


def measured(batch_size, *seconds):
  return rounds.Measured('name', batch_size, 'float32', 0.0, 1, list(seconds))


def test_speedup_is_the_median_of_the_rounds_ratios():
  # The machine slows down to a tenth in the second round, for both alike.
  ours, other = measured(8, 0.1, 1.0, 0.1), measured(4, 0.2, 2.0, 0.1)
  assert rounds.speedup(ours, other) == pytest.approx(2 * 2)
  assert ours.images_per_second == pytest.approx(80)


def test_contenders_take_turns():
  runs = []
  contenders = [
    rounds.Contender(name, 1, 'float32', lambda steps, n=name: runs.append(n))
    for name in 'abc'
  ]
  results = [measured(1) for _ in contenders]
  rounds.alternate(contenders, results, num_rounds=3)
  assert ''.join(runs) == 'abcbcacab'
  assert [len(result.step_seconds) for result in results] == [3, 3, 3]


def test_minimum_bytes_of_a_network_counted_by_hand():
  config = celeba.get_config()
  config.data.image_size = 8
  config.model.hidden_channels = (2, 4)
  config.model.latent_dim = 3
  # Before a BatchNorm: 4·4·2 + 2·2·4, and 4·4·2 + 8·8·2.
  normalised, start, image = 48 + 160, 16, 192
  parameters = (
    (9 * 3 + 1) * 2 + (9 * 2 + 1) * 4 + 2 * (16 + 1) * 3 + (3 + 1) * 16
  )
  parameters += (9 * 4 + 1) * 2 + (9 * 2 + 1) * 2 + (9 * 2 + 1) * 3
  parameters += 2 * (2 + 4 + 2 + 2)
  separate = (14 * normalised + 6 * start + 8 * image) * 2 + 2 * image
  fused = (6 * normalised + 5 * start + 2 * image) * 2 + 3 * image
  for expected, is_fused in ((separate, False), (fused, True)):
    counted = bandwidth.minimum_bytes(config, 10, 'bfloat16', is_fused)
    assert counted == 10 * expected + 40 * parameters


def test_run_in_a_bucket_is_compared_with_one_on_a_disk(tmp_path):
  output = tmp_path / 'results.json'
  result = subprocess.run(
    [sys.executable, 'benchmarks/bucket.py', '--quick', f'--output={output}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stderr
  assert 'bucket / disk, median of the rounds' in result.stdout
  found = json.loads(output.read_text())
  speeds = found['images_per_second']
  assert found['ratio'] == speeds['bucket'][0] / speeds['disk'][0] > 0


# For accelerator.sh, in the place of Python: what its parts would do.
STAND_IN = """#!/bin/sh
case $1 in
  *accelerator_tables.py) echo tables of "$2" ;;
  *accelerator_checks.py) echo the reason >&2; exit 3 ;;
  *end_to_end.py) echo begun; exec sleep 60 ;;
  *command_buffers.py) kill -KILL $$ ;;
  *.py) for last; do :; done; echo "$@" > "${last#--output=}" ;;
esac
"""


def run_accelerator(tmp_path, *flags):
  """accelerator.sh with the stand-in; its result, and how each part ended."""
  python = tmp_path / 'python'
  python.write_text(STAND_IN)
  python.chmod(0o755)
  result = subprocess.run(
    [ROOT / 'benchmarks/accelerator.sh', *flags, tmp_path / 'results'],
    env=os.environ | {'PYTHON': str(python)},
    capture_output=True,
    text=True,
  )
  log = (tmp_path / 'results/log.txt').read_text()
  return result, dict(re.findall('^=== (.*): (.*)$', log, re.MULTILINE)), log


def test_parts_go_on_after_one_that_fails_and_one_that_hangs(tmp_path):
  # Of 460 seconds the whole loop may take 90, of 18 seconds 3.
  result, ended, log = run_accelerator(tmp_path, '--quick', '--seconds=18')
  assert result.returncode == 1
  assert ended['checks'].endswith(' with exit status 3')
  assert '\nthe reason\n' in log
  assert ended['end_to_end'].endswith(' s, as it took too long')
  assert '\nbegun\n' in log
  assert ended['command_buffers'].endswith(' with exit status 137')
  others = {'train_step', 'population', 'profile'}
  assert {part for part in ended if ended[part].startswith('done')} == others
  files = {path.stem for path in (tmp_path / 'results').glob('*.json')}
  assert files == others
  flags = (tmp_path / 'results/population.json').read_text().split()
  assert {'--quick', '--runs=8'} <= set(flags)
  assert result.stdout.endswith(f'tables of {tmp_path}/results\n')


def test_parts_without_time_are_skipped(tmp_path):
  result, ended, _ = run_accelerator(
    tmp_path, '--parts=end_to_end,profile', '--quick', '--seconds=1'
  )
  assert result.returncode == 1
  assert list(ended) == ['end_to_end', 'profile']
  assert ended['profile'] == 'skipped, as 0 s were left'


def test_parts_that_are_done_are_a_success(tmp_path):
  result, ended, _ = run_accelerator(tmp_path, '--parts=profile')
  assert result.returncode == 0, result.stderr
  assert re.fullmatch(r'done after \d s', ended['profile'])


@pytest.mark.parametrize('flag', ['--parts=typo', '--typo', '--seconds=x'])
def test_accelerator_refuses_what_it_does_not_know(flag, tmp_path):
  result = subprocess.run(
    [ROOT / 'benchmarks/accelerator.sh', flag, tmp_path],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  assert 'typo' in result.stderr or '--seconds=x' in result.stderr
  assert result.stderr.count('\n') == 1


def test_losses_are_compared_with_the_cpus():
  cpu = {
    'float64 default': [100.0, 50.0],
    'float32 highest': [100.0, 50.0],
    'float32 default': [100.0, 50.0],
    'bfloat16 default': [100.0, 50.0],
  }
  accelerator = {
    'float64 default': [100.0, 50.0 * (1 + 2e-9)],
    # The first step is as far as it may be, a later one may be farther.
    'float32 highest': [100.0 * (1 - 0.9e-5), 50.0 * (1 + 9e-3)],
    'float32 default': [100.0, math.nan],
  }
  rows = accelerator_checks.compare(cpu, accelerator)
  assert [(row['dtype'], row['passed']) for row in rows] == [
    ('float64', False),
    ('float32', True),
    ('float32', False),
  ]
  assert rows[0]['largest'] == pytest.approx(2e-9, rel=1e-6)
  assert rows[1]['first'] == pytest.approx(0.9e-5, rel=1e-6)
  assert rows[1]['largest'] == pytest.approx(9e-3, rel=1e-6)


# Of two steps: on a GPU's stream a kernel of 2 µs in each, which the other
# stream's of 1 µs overlaps in the first, and a copy of 1 µs in the second. What
# the host does, and sums of the streams, are not kernels.
TRACE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #7(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000
      stats { metadata_id: 1 str_value: "fusion.1" } }
    events { metadata_id: 1 offset_ps: 6000000 duration_ps: 2000000
      stats { metadata_id: 1 str_value: "fusion.1" } }
    events { metadata_id: 2 offset_ps: 9000000 duration_ps: 1000000 }
  }
  lines {
    name: "Stream #8(Compute)"
    events { metadata_id: 3 offset_ps: 1000000 duration_ps: 1000000
      stats { metadata_id: 1 str_value: "while.2" } }
  }
  lines {
    name: "XLA Modules"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 10000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "kernel" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2D" } }
  event_metadata { key: 3 value { id: 3 name: "other" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes {
  name: "/host:CPU"
  lines { name: "thread" events { metadata_id: 1 duration_ps: 90000000 } }
  event_metadata { key: 1 value { id: 1 name: "call" } }
}
"""


def test_trace_is_summed_by_kernel():
  data = jax.profiler.ProfileData
  trace = data.from_serialized_xspace(
    data.text_proto_to_serialized_xspace(TRACE)
  )
  summary = profile_step.summarize(trace, num_steps=2, num_rows=2)
  assert summary['milliseconds_per_step'] == pytest.approx(0.005)
  assert summary['busy'] == pytest.approx(0.5)
  assert summary['num_kernels'] == 2
  first, second = summary['kernels']
  assert (first['kernel'], first['operation']) == ('kernel', 'fusion.1')
  assert first['milliseconds'] == pytest.approx(0.002)
  assert first['calls'] == 1
  assert first['share'] == pytest.approx(4 / 6)
  assert second['milliseconds'] == pytest.approx(0.0005)


def contender(name, dtype, speed, speedup, share):
  return {
    'name': name,
    'dtype': dtype,
    'images_per_second': speed,
    'speedup_of': {
      'this codebase, float32 at default precision (TF32)': speedup,
      'this codebase, bfloat16': 2 * speedup,
    },
    'of_bandwidth_bound': {'separate': share, 'fused': share / 2},
  }


def test_tables_have_what_the_parts_left(tmp_path):
  machine = {
    'date': '2027-01-02T03:04:05+00:00',
    'commit': 'abc',
    'python': '3.12.3',
    **dict.fromkeys(('jaxlib', 'flax', 'optax', 'numpy', 'torch')),
    'jax': '0.11.2',
    'devices': ['NVIDIA H200'],
    'cpu': 'Xeon',
    'cores': 16,
    'environment': {},
  }
  ours = 'this codebase, float32 at default precision (TF32)'
  contents = {
    'train_step': {
      'machine': machine,
      'copy_bytes_per_second': 4.3e12,
      # Ended before the larger batch sizes.
      'batch_sizes': {
        '64': {
          'contenders': [
            contender(ours, 'float32', 61_000, 1.0, 0.34),
            contender('this codebase, bfloat16', 'bfloat16', 122e3, 0.5, 0.36),
            contender('PyTorch, eager', 'float32', 8_000, 7.625, 0.05),
            contender('PyTorch, TF32 graph', 'float32', 25e3, 2.44, 0.1),
            contender('PyTorch, bf16 graph', 'bfloat16', 40e3, 1.525, 0.1),
          ],
          'failed': {'PyTorch, compiled': 'no compiler'},
        }
      },
    },
    'population': {
      'machine': machine,
      'rows': [
        {
          'runs': runs,
          'milliseconds_per_step': milliseconds,
          'time_relative': relative,
          'images_per_second': 1e5,
        }
        for runs, milliseconds, relative in ((1, 1.11, 1.0), (8, 2.47, 2.23))
      ],
    },
  }
  for part, content in contents.items():
    (tmp_path / f'{part}.json').write_text(json.dumps(content))
  (tmp_path / 'log.txt').write_text(
    '=== checks: failed after 9 s with exit status 1\n=== of something else\n'
    '=== train_step: ended after 180 s, as it took too long\n'
    '=== population: skipped, as 3 s were left\n'
    '=== population: done after 30 s\n'
  )
  text = accelerator_tables.tables(tmp_path)
  for line in (
    '1 × NVIDIA H200, Xeon (16 cores), python 3.12.3, jax 0.11.2, commit abc, '
    '2027-01-02T03:04:05+00:00',
    '| checks | failed after 9 s with exit status 1 |',
    '| population | done after 30 s |',
    '| profile | not run |',
    '| batch 64 | the step, against PyTorch eager float32 | 5 | 7.62 |',
    '| batch 64 | the step, against the best PyTorch in float32 | 1.5 | 2.44 |',
    '| batch 64 | the step, against the best PyTorch in bfloat16 | 1.5 '
    '| 3.05 |',
    '| batch 1024 | the step, against the best PyTorch in float32 | 1.5 '
    '| not measured: train_step ended after 180 s, as it took too long |',
    '| batch 64 | 8 values of β at once, in the time of one run | ≤ 2.5 '
    '| 2.23 |',
    '| batch 64, float32 | 100 epochs of 162,770 images, with validation '
    '| 150 s | not measured: end_to_end not run |',
    '| PyTorch, TF32 graph | 25,000 (2.44) |',
    f'| {ours} | **61,000** |',
    '| PyTorch, compiled | failed |',
    '| 8 | 2.47 | 2.23 | 100,000 |',
    'Not measured: failed after 9 s with exit status 1.',
  ):
    assert line in text.splitlines(), line
  assert 'float32 34%, bfloat16 36%' in text


def test_without_libtpu_there_is_one_line(monkeypatch, capsys):
  monkeypatch.setattr(tpu_compile, 'has_libtpu', lambda: False)
  monkeypatch.setattr(sys, 'argv', ['tpu_compile.py'])
  with pytest.raises(SystemExit) as caught:
    tpu_compile.main()
  assert caught.value.code == 2
  message = capsys.readouterr().err
  assert message.count('\n') == 1 and 'make libtpu' in message


# As XLA writes a program: a step is the body of a loop, behind which come sums.
PROGRAM = """HloModule jit_f, is_scheduled=true

%body.2 (p.1: (f32[3], s32[])) -> (f32[3], s32[]) {
  %a = (f32[2,32]{1,0:T(8,128)}, bf16[5]{0}) all-reduce(%x, %y)
  %b = f32[3]{0} fusion(%a), backend_config={"estimated_cycles":"70"}
  %c = f32[] all-reduce-start(%b), backend_config={"estimated_cycles":"5"}
}

%condition.3 (p.2: (f32[3], s32[])) -> pred[] {
  ROOT %d = pred[] compare(%e, %f), backend_config={"estimated_cycles":"1"}
}

ENTRY %main.4 (p.3: f32[3]) -> f32[3] {
  %g = f32[3]{0} copy(%p.3), backend_config={"estimated_cycles":"1000"}
  ROOT %h = (f32[3]) while(%g), condition=%condition.3, body=%body.2
}
"""


def test_what_a_compiled_program_says():
  sizes = tpu_compile.collective_bytes(PROGRAM)
  assert sizes == {'all-reduce': [2 * 32 * 4 + 5 * 2, 4]}
  assert tpu_compile._cycles(PROGRAM) == 75
  # Without a loop all counts.
  straight = PROGRAM.replace('body=%body.2', '').replace(' while(', ' call(')
  assert tpu_compile._cycles(straight) == 1000
