"""Where workers keep the record of a sweep: a database, or Optuna's journal."""

import os
import time
import warnings

import optuna
from optuna import exceptions
from optuna.storages import journal
import sqlalchemy

from vae import paths
from vae.errors import UserError


def file_url(path: os.PathLike) -> str:
  """The URL of a SQLite file, whatever characters are in its path."""
  url = sqlalchemy.URL.create('sqlite', database=os.fspath(path))
  return url.render_as_string()


def open_storage(url: str) -> optuna.storages.BaseStorage:
  """Opens a database, by its URL, or Optuna's journal, by its path.

  Raises:
    UserError: if it cannot be reached.
  """
  if '://' not in url:
    _quiet_optuna()
    path = str(paths.expand(url))
    try:
      return optuna.storages.JournalStorage(journal.JournalFileBackend(path))
    except OSError as error:
      raise UserError(
        f'--storage={url} cannot be opened ({error.strerror}); name the file '
        'of a journal in a folder that is there, or the URL of a database.'
      ) from error
  _quiet_optuna()
  try:
    parsed = sqlalchemy.make_url(url)
    shown = parsed.render_as_string(hide_password=True)
  except sqlalchemy.exc.ArgumentError as error:
    raise UserError(
      '--storage is not the URL of a database, such as '
      'postgresql://USER:PASSWORD@HOST/DATABASE.'
    ) from error
  if parsed.get_backend_name() == 'sqlite' and parsed.database:
    parsed = parsed.set(database=str(paths.expand(parsed.database)))
    url = parsed.render_as_string(hide_password=False)
  try:
    return _open_database(url)
  except Exception as error:  # Of any driver.
    cause = error.__cause__ or error
    reason = ' '.join(str(getattr(cause, 'orig', None) or cause).split())
    raise UserError(
      f'--storage={shown} cannot be reached: {reason[:300]}'
    ) from error


def _open_database(url: str) -> optuna.storages.RDBStorage:
  is_sqlite = url.startswith('sqlite:')
  options = {'pool_pre_ping': True}
  if is_sqlite:
    options['connect_args'] = {'timeout': 60}
  attempts = 10
  while True:
    try:
      storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
      break
    except sqlalchemy.exc.DBAPIError as error:
      # Of workers that begin at the same moment one makes the tables.
      attempts -= 1
      is_there = isinstance(
        error, (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError)
      )
      if not attempts or not (is_there or 'already exists' in str(error)):
        raise
      time.sleep(0.3)
  if is_sqlite:
    _lock_whole_transactions(storage.engine)
  return storage


def _quiet_optuna() -> None:
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  warnings.filterwarnings('ignore', category=exceptions.ExperimentalWarning)


def _lock_whole_transactions(engine: sqlalchemy.Engine) -> None:
  """Has SQLite lock from what a transaction reads, not from what it writes.

  Python's driver would begin a transaction with its first change, so that two
  workers might read that a point waits, and both take it.
  """

  @sqlalchemy.event.listens_for(engine, 'connect')
  def connect(connection, unused_record):
    connection.isolation_level = None

  @sqlalchemy.event.listens_for(engine, 'begin')
  def begin(connection):
    connection.exec_driver_sql('BEGIN IMMEDIATE')

  engine.dispose()
