"""That the benchmarks run, and compare as they say; not how fast it all is."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import bandwidth
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
    timeout=300,
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
