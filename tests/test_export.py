"""`export.py`: its folder, used without this repository."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from configs import family
from exports import functions
from runs import schema
from tests.browser import find_browser
from tests.conftest import ROOT
from tests.hub_server import Hub
from tests.preloaded import run
from vae import loading, steps

# Run with -I in a folder of its own, so that nothing of this project is found.
WITH_JAX = """
import sys
import jax
import numpy as np
folder, given, made = sys.argv[1:]
arrays = np.load(given)
def call(name, *inputs):
  program = open(f'{folder}/{name}.jax', 'rb').read()
  return jax.export.deserialize(bytearray(program)).call(*inputs)
mean, logvar = call('encoder', arrays['images'])
(images,) = call('decoder', arrays['z'])
np.savez(made, mean=mean, logvar=logvar, images=images)
assert not {'vae', 'flax', 'runs'} & set(sys.modules)
"""
WITH_ONNX = """
import sys
import numpy as np
import onnxruntime
folder, given, made = sys.argv[1:]
arrays = np.load(given)
def call(name, **inputs):
  session = onnxruntime.InferenceSession(f'{folder}/{name}.onnx')
  names = [output.name for output in session.get_outputs()]
  return dict(zip(names, session.run(names, inputs), strict=True))
found = call('encoder', images=arrays['images'])
np.savez(made, **found, **call('decoder', z=arrays['z']))
assert not {'jax', 'vae'} & set(sys.modules)
"""


def export(workdir, output, *flags):
  code, out, err = run(
    f'--workdir={workdir}', f'--output={output}', *flags, script='export.py'
  )
  assert code == 0, err
  return out


@pytest.fixture(scope='module')
def given():
  """Images and latents, of numbers that no batch size divides."""
  generator = np.random.default_rng(0)
  images = generator.random((7, 16, 16, 3), np.float32)
  return {'images': images, 'z': generator.normal(size=(7, 2)).astype('f')}


@pytest.fixture(scope='module')
def expected(trained_run, given):
  trained = loading.load(trained_run)
  posterior = trained.encode(given['images'])
  images = trained.decode(given['z'])
  return {'mean': posterior.mean, 'logvar': posterior.logvar, 'images': images}


def check(script, exported, given, expected, tmp_path):
  np.savez(tmp_path / 'given.npz', **given)
  command = [sys.executable, '-I', '-c', script, str(exported)]
  command += [tmp_path / 'given.npz', tmp_path / 'made.npz']
  subprocess.run(command, check=True, cwd=tmp_path)
  made = np.load(tmp_path / 'made.npz')
  for name, value in expected.items():
    np.testing.assert_allclose(made[name], value, atol=1e-5, err_msg=name)


@pytest.fixture(scope='module')
def exported(trained_run, tmp_path_factory):
  folder = tmp_path_factory.mktemp('exported')
  export(trained_run, folder, '--formats=jax')
  return folder


def test_jax_alone_computes_the_same(exported, given, expected, tmp_path):
  check(WITH_JAX, exported, given, expected, tmp_path)


def test_programs_are_for_all_platforms(exported):
  from jax import export

  program = (exported / 'decoder.jax').read_bytes()
  found = export.deserialize(bytearray(program))
  assert set(found.platforms) == {'cpu', 'cuda', 'tpu'}


def test_dimensions_are_sorted_by_what_they_change(exported, trained_run):
  found = json.loads((exported / 'latents.json').read_text())
  trained = loading.load(trained_run)
  draws = np.reshape(found['draws'], (-1, 2))
  changes = []
  for dimension in found['dimensions']:
    ends = np.stack([draws.mean(axis=0)] * 2)
    ends[:, dimension] += np.array([1.5, -1.5]) * draws.std(axis=0)[dimension]
    up, down = trained.decode(ends)
    changes.append(abs(up - down).mean())
  assert changes[0] > changes[1]
  np.testing.assert_allclose(found['changes'], changes, atol=1e-4)


def test_other_files_are_not_replaced(trained_run, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained_run, workdir)
  before = (workdir / 'config.json').read_text()
  flags = f'--workdir={workdir}', f'--output={workdir}', '--formats=jax'
  code, _, err = run(*flags, script='export.py')
  assert code == 2 and 'is not an export' in err
  assert (workdir / 'config.json').read_text() == before


def test_folder_names_no_place_of_this_machine(
  exported, trained_run, celeba_dir
):
  for path in exported.iterdir():
    content = path.read_bytes()
    for place in (str(celeba_dir), str(trained_run), str(ROOT)):
      assert place.encode() not in content, path
  config = json.loads((exported / 'config.json').read_text())
  assert config['model']['latent_dim'] == 2


def test_card_has_the_measured_numbers(trained_run, tmp_path):
  workdir = tmp_path / 'measured'
  shutil.copytree(trained_run, workdir)
  code, _, err = run(
    f'--workdir={workdir}',
    '--split=validation',
    '--metrics=reconstruction',
    script='evaluate.py',
  )
  assert code == 0, err
  export(workdir, tmp_path / 'out', '--formats=jax', '--licence=mit')
  card = (tmp_path / 'out' / 'README.md').read_text()
  (path,) = workdir.glob('evaluation/*/metrics.json')
  psnr = json.loads(path.read_text())['metrics']['psnr']['value']
  assert card.startswith('---\nlicense: mit\n')
  assert f'| psnr | {psnr:.1f}' in card
  # A code block of the card runs, in the exported folder.
  assert 'onnx' not in card
  code = card.split('```python\n')[1].split('```')[0]
  code += 'assert images.shape == (16, 16, 16, 3)\n'
  code += 'assert abs(mean).max() < 100 and logvar.shape == mean.shape\n'
  command = [sys.executable, '-I', '-c', code]
  subprocess.run(command, check=True, cwd=tmp_path / 'out')


@pytest.fixture
def hub():
  server = Hub()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


def hf(hub, home, *arguments):
  """Runs the hub's own command line."""
  environment = {
    'HF_ENDPOINT': hub.url,
    'HF_HOME': str(home),
    'HF_TOKEN': 'hf_of_this_test',
    # This protocol has a storage of its own.
    'HF_HUB_DISABLE_XET': '1',
  }
  command = [sys.executable, '-m', 'huggingface_hub.cli.hf', *arguments]
  done = subprocess.run(
    command, env=os.environ | environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_folder_comes_back_from_the_hub(
  hub, exported, given, expected, tmp_path
):
  pytest.importorskip('huggingface_hub')
  hf(hub, tmp_path / 'sender', 'upload', 'me/faces', str(exported))
  sent = contents(exported)
  assert hub.files == sent
  # The hub lists a model by the front matter of its card.
  assert 'library_name: jax' in hub.cards[0]
  folder = tmp_path / 'downloaded'
  arguments = 'download', 'me/faces', '--local-dir', str(folder)
  hf(hub, tmp_path / 'receiver', *arguments)
  assert contents(folder) == sent
  check(WITH_JAX, folder, given, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
  'member',
  ['conditional', 'vamp', 'flow_posterior', 'full_covariance', 'binary', 'vq']
  + ['fsq', 'residual', 'gated', 'logistic_mixture'],
)
def test_members_compute_the_same_in_jax(member):
  from jax import export

  config = family.get_config(member)
  schema.validate(config)
  program = steps.program_from_config(config, 1000)
  variables = steps.create_state(program, 0).variables
  trained = loading.TrainedVAE(config, program.model, variables, 0)
  shape = (3, *program.model.image_shape)
  images = np.random.default_rng(0).random(shape, np.float32)
  labels = [np.arange(3, dtype=np.int32)] * (member == 'conditional')
  z = trained.sample_latents(3)
  for function, inputs, expected in (
    (functions.encoder, images, trained.encode(images, *labels).mean),
    (functions.decoder, z, trained.decode(z, *labels)),
  ):
    program = function(trained, 'native').serialized()
    found, *_ = export.deserialize(bytearray(program)).call(inputs, *labels)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--formats=pickle'], '--formats has pickle'),
    (['--web=/nowhere'], 'onnxruntime-web'),
    (['--formats=jax', '--web=/nowhere'], 'needs onnx'),
  ],
)
def test_mistakes_are_one_line(trained_run, tmp_path, flags, message):
  code, _, err = run(
    f'--workdir={trained_run}',
    f'--output={tmp_path}',
    *flags,
    script='export.py',
  )
  assert code == 2 and err.count('\n') == 1 and message in err
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def complete(trained_run, tmp_path_factory):
  pytest.importorskip('jax2onnx')
  folder = tmp_path_factory.mktemp('complete')
  export(trained_run, folder)
  return folder


@pytest.mark.slow
def test_onnx_runtime_computes_the_same(complete, given, expected, tmp_path):
  check(WITH_ONNX, complete, given, expected, tmp_path)


@pytest.mark.slow
def test_safetensors_are_the_parameters(complete, trained_run):
  from safetensors import numpy as safetensors

  found = safetensors.load_file(complete / 'model.safetensors')
  variables = loading.load(trained_run).variables
  kernel = variables['params']['decoder']['Conv_0']['kernel']
  np.testing.assert_array_equal(found['params.decoder.Conv_0.kernel'], kernel)


@pytest.mark.slow
def test_browser_decodes_the_same(
  complete, onnxruntime_web, trained_run, given, expected
):
  export(trained_run, complete, '--formats=onnx', f'--web={onnxruntime_web}')
  api = pytest.importorskip('playwright.sync_api')

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=complete)

    def log_message(self, *args):
      pass

  with (
    http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server,
    api.sync_playwright() as playwright,
  ):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/'
    browser = playwright.chromium.launch(
      executable_path=find_browser(), args=['--no-sandbox']
    )
    page = browser.new_page()
    wrong, requests = [], []
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.on('request', lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_function(
      "document.getElementById('status').textContent.startsWith('Decoded')"
    )
    for z, image in zip(given['z'], expected['images'], strict=True):
      script = 'async z => Array.from(await decode(Float32Array.from(z)))'
      found = np.array(page.evaluate(script, z.tolist())).reshape(16, 16, 3)
      np.testing.assert_allclose(found, image, atol=1e-5)
    before = page.evaluate("document.querySelector('canvas').toDataURL()")
    page.fill('input >> nth=0', '2.5')
    page.wait_for_function(
      "before => document.querySelector('canvas').toDataURL() !== before",
      arg=before,
    )
    assert not wrong
    assert all(url.startswith((address, 'blob:', 'data:')) for url in requests)
    browser.close()
    server.shutdown()
