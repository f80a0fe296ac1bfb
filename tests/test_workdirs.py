import json

from etils import epath
import jax
import pytest

from configs import celeba
from runs import schema, workdirs
from vae.errors import UserError

COUNTS = {'train': 40, 'validation': 10}
NAMES = {'train_names': '1a', 'validation_names': '2b'}


@pytest.fixture
def config():
  return celeba.get_config()


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path) / 'a' / 'b'


def claim(config, workdir, data=COUNTS, begun=True):
  """A run that starts, and may come as far as a checkpoint."""
  workdirs.check(config, workdir)
  workdirs.claim(config, workdir, data)
  if begun:
    (workdir / 'checkpoints' / '5').mkdir(parents=True, exist_ok=True)


def test_workdir_keeps_its_config(config, workdir):
  claim(config, workdir)
  schema.complete(config)
  assert schema.flatten(workdirs.load_config(workdir)) == (
    schema.flatten(config) | {'data.crop_size': 148}
  )
  # Keys that change no step may change.
  config.train.num_epochs = 200
  config.data.dir = '/elsewhere'
  claim(config, workdir)
  assert workdirs.load_config(workdir).train.num_epochs == 200


def test_run_that_is_older_than_a_setting_has_its_default(config, workdir):
  claim(config, workdir)
  content = json.loads((workdir / 'config.json').read_text())
  del content['objective']['name'], content['model']['name']
  del content['objective']['num_samples'], content['checkpoint']
  (workdir / 'config.json').write_text(json.dumps(content))
  claim(config, workdir)
  loaded = workdirs.load_config(workdir)
  assert (loaded.objective.num_samples, loaded.model.name) == (1, 'conv')
  config.objective.num_samples = 2
  with pytest.raises(UserError, match='num_samples was .* and is now 2'):
    claim(config, workdir)


@pytest.mark.parametrize(
  'text', ['{', '[]', '{"model": 3}', '{"objective": {"beta": -1}}']
)
def test_error_in_a_kept_config_names_the_file(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match='config.json'):
    workdirs.load_config(tmp_path)


def test_default_crop_of_a_source_may_be_named(config, workdir):
  config.data.crop_size = 148
  claim(config, workdir)
  claim(celeba.get_config(), workdir)
  config.data.crop_size = 100
  with pytest.raises(UserError, match='crop_size was 148 and is now 100'):
    workdirs.check(config, workdir)


def test_workdir_without_checkpoints_is_free(config, workdir):
  claim(config, workdir, begun=False)
  (workdir / 'checkpoints').mkdir()
  config.objective.beta = 4.0
  claim(config, workdir, COUNTS | {'train': 7})
  assert workdirs.load_config(workdir).objective.beta == 4.0


def test_contradicting_config_is_refused(config, workdir):
  claim(config, workdir)
  before = (workdir / 'config.json').read_text()
  config.objective.beta = 4.0
  config.model.hidden_channels = (512, 256, 128, 64, 32)
  with pytest.raises(UserError) as caught:
    workdirs.check(config, workdir)
  message = str(caught.value)
  assert 'config.objective.beta was 1.536 and is now 4.0' in message
  assert 'config.model.hidden_channels' in message
  assert 'config.seed' not in message
  assert (workdir / 'config.json').read_text() == before


@pytest.mark.parametrize(
  ('other', 'reason'),
  [
    ({'train': 48}, 'train was 40 and is now 48'),
    ({'train_names': '3c'}, 'other data: train_names was 1a and is now 3c. N'),
  ],
)
def test_other_data_is_refused(config, workdir, other, reason):
  claim(config, workdir, COUNTS | NAMES)
  before = (workdir / 'data.json').read_text()
  with pytest.raises(UserError, match=reason):
    claim(config, workdir, COUNTS | NAMES | other)
  with pytest.raises(UserError, match=reason):
    workdirs.check_data(workdir, COUNTS | NAMES | other)
  assert (workdir / 'data.json').read_text() == before


@pytest.mark.parametrize('content', [b'', b'[]', b'\xff'])
def test_damaged_data_json_is_a_clear_error(config, workdir, content):
  claim(config, workdir)
  (workdir / 'data.json').write_bytes(content)
  with pytest.raises(UserError, match=r'data\.json cannot be read.*delete'):
    claim(config, workdir)
  # The advice works.
  (workdir / 'data.json').unlink()
  claim(config, workdir, COUNTS | NAMES)
  assert json.loads((workdir / 'data.json').read_text()) == COUNTS | NAMES


@pytest.mark.parametrize('name', ['taken', 'taken/below'])
def test_workdir_that_is_a_file_is_refused(tmp_path, name):
  (tmp_path / 'taken').write_text('')
  with pytest.raises(UserError, match='taken.* cannot be written'):
    workdirs.check_writable(epath.Path(tmp_path / name), '--workdir')


def test_another_precision_of_products_is_refused(config, workdir):
  """An environment variable, no setting, that changes every number."""
  claim(config, workdir)
  with jax.default_matmul_precision('bfloat16'):
    with pytest.raises(UserError, match="was 'not set' and .* 'bfloat16'"):
      workdirs.check(config, workdir)
