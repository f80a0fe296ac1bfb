import re
import subprocess
import sys
import time

import optuna
import psutil
import pytest
import sqlalchemy
from sqlalchemy import exc

from tests import postgres

CREATE = """
import sys
import optuna
storage = optuna.storages.RDBStorage(sys.argv[1])
study = optuna.create_study(storage=storage, study_name='rate')
study.add_trial(optuna.trial.create_trial(value=3.5))
"""


def read_value(url):
  engine = sqlalchemy.create_engine(url)
  try:
    with engine.connect() as connection:
      return connection.scalar(
        sqlalchemy.text('select value from trial_values')
      )
  finally:
    engine.dispose()


def has_ended(process):
  """Whether it runs no more; a container's init may never reap it."""
  try:
    return process.status() == psutil.STATUS_ZOMBIE
  except psutil.NoSuchProcess:
    return True


def test_processes_share_a_study():
  with postgres.server() as server:
    subprocess.run([sys.executable, '-c', CREATE, server.url], check=True)
    storage = optuna.storages.RDBStorage(server.url)
    study = optuna.load_study(study_name='rate', storage=storage)
    assert study.best_value == 3.5
    storage.engine.dispose()

    wrong = re.sub(':[^:@]+@', ':wrong@', server.url)
    with pytest.raises(exc.OperationalError, match='authentication failed'):
      read_value(wrong)

    server.stop()
    with pytest.raises(exc.OperationalError, match='refused'):
      read_value(server.url)
    server.start()
    assert read_value(server.url) == 3.5


def test_leaves_nothing():
  with (
    pytest.raises(RuntimeError, match='in the test'),
    postgres.server() as server,
  ):
    pid_file = server.folder / 'data' / 'postmaster.pid'
    main_process = psutil.Process(int(pid_file.read_text().split()[0]))
    processes = [main_process, *main_process.children()]
    assert len(processes) > 1
    raise RuntimeError('in the test')
  assert not server.folder.exists()
  # The file with its id goes a moment before the process itself.
  deadline = time.monotonic() + 30
  while not all(map(has_ended, processes)):
    assert time.monotonic() < deadline
    time.sleep(0.05)
