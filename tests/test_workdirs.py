import json

from etils import epath
import jax
import pytest

from configs import celeba
from configs import default
from runs import schema
from runs import workdirs
from vae.errors import UserError

COUNTS = {'train': 40, 'validation': 10}


def claim(config, workdir, counts=COUNTS, begun=True):
  """A run that is started, and perhaps comes as far as a checkpoint."""
  workdir = epath.Path(workdir)
  workdirs.check(config, workdir)
  workdirs.claim(config, workdir, counts)
  if begun:
    (workdir / 'checkpoints' / '5').mkdir(parents=True, exist_ok=True)


def test_workdir_remembers_its_config(tmp_path):
  workdir = epath.Path(tmp_path) / 'a' / 'b'
  config = celeba.get_config()
  claim(config, workdir)
  assert schema.flatten(workdirs.load_config(workdir)) == (
    schema.flatten(config) | {'data.crop_size': 148}
  )
  # Longer, or told otherwise where the data is: the same run.
  config.train.num_epochs = 200
  config.data.dir = '/elsewhere'
  claim(config, workdir)
  assert workdirs.load_config(workdir).train.num_epochs == 200


def test_config_is_written_when_it_changes(tmp_path):
  config = celeba.get_config()
  claim(config, tmp_path)
  (tmp_path / 'kept').hardlink_to(tmp_path / 'config.json')
  claim(config, tmp_path)
  assert (tmp_path / 'kept').samefile(tmp_path / 'config.json')


def test_code_before_loads_a_run_that_changed_code_continued(
  tmp_path, monkeypatch
):
  claim(celeba.get_config(), tmp_path)
  before = json.loads((tmp_path / 'config.json').read_text())
  with monkeypatch.context() as changed_code:
    table = default.get_config()
    table.objective.gamma = 1.0
    table.checkpoint.keep_worst = 0
    copy = table.copy_and_resolve_references
    changed_code.setattr(default, 'get_config', copy)
    free = schema.FREE_KEYS | {'checkpoint.keep_worst'}
    changed_code.setattr(schema, 'FREE_KEYS', free)
    config = celeba.get_config()
    config.train.num_epochs = 200
    config.checkpoint.keep_worst = 3
    claim(config, tmp_path)
    # What the run lacks has been as its default is.
    config.objective.gamma = 2.0
    with pytest.raises(UserError, match='gamma was 1.0 and is now 2.0'):
      claim(config, tmp_path)
  config = workdirs.load_config(tmp_path)
  assert config.train.num_epochs == 200
  before['train']['num_epochs'] = 200
  assert json.loads((tmp_path / 'config.json').read_text()) == before


def test_key_that_this_code_does_not_know_is_named(tmp_path):
  config = celeba.get_config()
  claim(config, tmp_path)
  found = json.loads((tmp_path / 'config.json').read_text())
  found['objective']['gamma'] = 1.0
  (tmp_path / 'config.json').write_text(json.dumps(found))
  for use in (workdirs.load_config, lambda path: claim(config, path)):
    with pytest.raises(UserError, match='json has config.objective.gamma') as e:
      use(tmp_path)
    assert '\n' not in str(e.value)


def test_error_of_a_wrong_value_names_the_file(tmp_path):
  claim(celeba.get_config(), tmp_path)
  found = json.loads((tmp_path / 'config.json').read_text())
  found['objective']['beta'] = -1
  (tmp_path / 'config.json').write_text(json.dumps(found))
  with pytest.raises(UserError, match='config.json: config.objective.beta is'):
    workdirs.load_config(tmp_path)


def test_crop_that_is_the_sources_own_may_be_named(tmp_path):
  workdir = epath.Path(tmp_path)
  config = celeba.get_config()
  config.data.crop_size = 148
  claim(config, workdir)
  claim(celeba.get_config(), workdir)
  # So that it is known whatever the default becomes.
  assert (
    json.loads((workdir / 'config.json').read_text())['data']['crop_size']
    == 148
  )
  config.data.crop_size = 100
  with pytest.raises(UserError, match='crop_size was 148 and is now 100'):
    workdirs.check(config, workdir)


def test_workdir_in_which_nothing_was_trained_is_free(tmp_path):
  config = celeba.get_config()
  claim(config, tmp_path, begun=False)
  (tmp_path / 'checkpoints').mkdir()
  config.objective.beta = 4.0
  claim(config, tmp_path)
  assert workdirs.load_config(epath.Path(tmp_path)).objective.beta == 4.0


def test_workdir_of_a_contradicting_config_is_refused(tmp_path):
  config = celeba.get_config()
  claim(config, tmp_path)
  before = (tmp_path / 'config.json').read_text()
  config.objective.beta = 4.0
  config.model.hidden_channels = (512, 256, 128, 64, 32)
  with pytest.raises(UserError) as caught:
    workdirs.check(config, epath.Path(tmp_path))
  message = str(caught.value)
  assert 'config.objective.beta was 1.536 and is now 4.0' in message
  assert 'config.model.hidden_channels' in message
  assert 'config.seed' not in message
  assert (tmp_path / 'config.json').read_text() == before


def test_workdir_of_other_data_is_refused(tmp_path):
  config = celeba.get_config()
  claim(config, tmp_path)
  before = (tmp_path / 'config.json').read_text()
  config.train.num_epochs = 7
  with pytest.raises(UserError, match="'train': 40.*now.*'train': 48"):
    claim(config, tmp_path, counts={'train': 48, 'validation': 10})
  assert (tmp_path / 'config.json').read_text() == before


NAMES = {'train_names': '1a', 'validation_names': '2b'}


def test_workdir_of_as_many_other_images_is_refused(tmp_path):
  config, workdir = celeba.get_config(), epath.Path(tmp_path)
  claim(config, workdir, COUNTS | NAMES)
  before = (workdir / 'data.json').read_text()
  for other, said in (
    ({'train_names': '3c'}, 'those of train have'),
    ({'train_names': '3c', 'validation_names': '3c'}, 'train and validation'),
  ):
    for check in (
      lambda data: claim(config, workdir, data),
      lambda data: workdirs.check_data(workdir, data),
    ):
      with pytest.raises(UserError, match='other data: .*as many') as caught:
        check(COUNTS | NAMES | other)
      assert said in str(caught.value) and '\n' not in str(caught.value)
  # The numbers come first, as they say more.
  with pytest.raises(UserError, match=r"'validation': 10} images, and now"):
    workdirs.check_data(workdir, COUNTS | {'train': 48, 'train_names': '3c'})
  assert (workdir / 'data.json').read_text() == before


def test_workdir_that_knows_numbers_alone_learns_the_names(tmp_path):
  config, workdir = celeba.get_config(), epath.Path(tmp_path)
  claim(config, workdir, COUNTS)
  workdirs.check_data(workdir, COUNTS | NAMES)
  claim(config, workdir, COUNTS | NAMES)
  assert json.loads((workdir / 'data.json').read_text()) == COUNTS | NAMES
  # And keeps them, where images have none.
  claim(config, workdir, COUNTS)
  assert json.loads((workdir / 'data.json').read_text()) == COUNTS | NAMES


def test_what_is_known_of_the_data_is_written_when_it_changes(tmp_path):
  config, workdir = celeba.get_config(), epath.Path(tmp_path)
  claim(config, workdir, COUNTS | NAMES)
  (tmp_path / 'kept').hardlink_to(tmp_path / 'data.json')
  claim(config, workdir, COUNTS | NAMES)
  assert (tmp_path / 'kept').samefile(tmp_path / 'data.json')


@pytest.mark.parametrize(
  'content', [b'', b'{"train": 4', b'[]', b'{}', b'null', b'\xff']
)
def test_damaged_data_json_is_a_clear_error(tmp_path, content):
  config, workdir = celeba.get_config(), epath.Path(tmp_path)
  # Of a run that came to nothing it says nothing.
  (workdir / 'data.json').write_bytes(content)
  claim(config, workdir)
  (workdir / 'data.json').write_bytes(content)
  for check in (
    lambda: claim(config, workdir),
    lambda: workdirs.check_data(workdir, COUNTS),
  ):
    with pytest.raises(UserError, match=r'data\.json cannot be read') as caught:
      check()
    message = str(caught.value)
    assert 'Delete it' in message and '--workdir' not in message
    assert '\n' not in message
  # What it says can be done.
  (workdir / 'data.json').unlink()
  claim(config, workdir, COUNTS)
  assert json.loads((workdir / 'data.json').read_text()) == COUNTS


@pytest.mark.parametrize('workdir', ['taken', 'taken/below'])
def test_workdir_that_is_a_file_is_refused(tmp_path, workdir):
  (tmp_path / 'taken').write_text('')
  with pytest.raises(UserError, match='taken.* cannot be written'):
    workdirs.check_writable(epath.Path(tmp_path / workdir), '--workdir')


@pytest.mark.parametrize(
  'text',
  [
    '',
    '{',
    '[]',
    '{"model": 3}',
    '{"objective": {"beta": 1' + '0' * 400 + '}}',
  ],
)
def test_damaged_config_is_a_clear_error(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match='config.json'):
    workdirs.load_config(epath.Path(tmp_path))


def test_another_precision_of_products_is_refused(tmp_path):
  """It is no part of the config, and changes every number."""
  config = celeba.get_config()
  claim(config, tmp_path)
  jax.config.update('jax_default_matmul_precision', 'bfloat16')
  try:
    with pytest.raises(UserError) as caught:
      workdirs.check(config, epath.Path(tmp_path))
    assert 'PRECISION was not set and is now bfloat16.' in str(caught.value)
    # Who knows better deletes what is recorded.
    (tmp_path / 'environment.json').unlink()
    claim(config, tmp_path)
  finally:
    jax.config.update('jax_default_matmul_precision', None)
  with pytest.raises(UserError, match='was bfloat16 and is now not set'):
    workdirs.check(config, epath.Path(tmp_path))


def test_another_version_of_jax_is_noted(tmp_path, capsys):
  config = celeba.get_config()
  claim(config, tmp_path)
  claim(config, tmp_path)
  assert capsys.readouterr().out == ''
  path = tmp_path / 'environment.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'jax': '0.4.1'}))
  claim(config, tmp_path)
  said = capsys.readouterr().out
  assert said.startswith(f'note: {tmp_path} was trained by jax 0.4.1 on cpu; ')
  assert said.count('\n') == 1
  # Once: then it is trained by this one.
  claim(config, tmp_path)
  assert capsys.readouterr().out == ''
