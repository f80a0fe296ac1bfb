"""Serves a page on which the latent space of trained runs is explored.

  python explore.py --workdir=logs/faces
  python explore.py --workdir=logs/celeba,logs/beta4

Several runs are compared at the same z and the same image; the workdir of a
sweep opens its rate and distortion, and a click on a point its run. The page is
for this machine alone, unless --host names another address; then it needs the
token of the address that is printed. Nothing is written.
"""

import csv
import secrets
import socket

from absl import flags
import anyio
from etils import epath
from PIL import Image
import uvicorn

from explorer import server
from explorer.session import Session
from runs import command_line, run_flags, workdirs
from sweeps import POINTS, TABLE
from vae import devices, paths, registry
from vae.checkpoints import Checkpoints
from vae.errors import UserError

for _flag in ('workdir', 'checkpoint', 'data_dir'):
  flags.declare_key_flag(_flag)
_HOST = flags.DEFINE_string(
  'host', '127.0.0.1', 'Address to listen at; 0.0.0.0 is all of the machine.'
)
_PORT = flags.DEFINE_integer('port', 8080, 'Port; 0 for any.', 0, 65535)

_LOOPBACK = '127.0.0.1', 'localhost', '::1'

# Columns of a sweep's table beside its settings.
_METRICS = 'rate', 'distortion'


def main() -> None:
  """Restores the first run, and serves until it is interrupted."""
  if command_line.WORKDIR.value is None:
    raise UserError('name the runs with --workdir=FOLDER,… (--help lists all).')
  devices.check()
  folders, sweep = _find(command_line.WORKDIR.value)
  for folder in folders:
    source = workdirs.load_config(folder).data.source
    Checkpoints(folder).find(run_flags.CHECKPOINT.value)
    registry.find_module('data', source, 'find')
  # Before the model is restored: a port in use is a mistake.
  listening = _listen(_HOST.value, _PORT.value)

  def restore(index):
    print(f'{folders[index]} …', flush=True)
    return Session(
      folders[index], run_flags.CHECKPOINT.value, run_flags.DATA_DIR.value
    )

  sessions = server.Sessions([str(folder) for folder in folders], restore)
  is_local = _HOST.value in _LOOPBACK
  token = '' if is_local else secrets.token_urlsafe(16)
  hosts = ['127.0.0.1', 'localhost', '[::1]'] if is_local else ['*']
  app = server.make_app(sessions, sweep, token, hosts)
  # Bodies are in memory: at most this many at a time.
  config = uvicorn.Config(
    app,
    log_level='warning',
    lifespan='off',
    loop='asyncio',
    limit_concurrency=64,
  )
  # All imports come first: while a thread imports TFDS, as for the images, no
  # other one can import by relative names.
  config.load()
  config.get_loop_factory()
  anyio.run(anyio.Path(__file__).exists)
  Image.init()
  _ = sessions[0]
  host, port = listening.getsockname()[:2]
  if not is_local and host in ('0.0.0.0', '::'):
    host = socket.gethostname()
  address = f'[{host}]' if ':' in host else host
  query = f'?token={token}' if token else ''
  print(f'Open http://{address}:{port}/{query}  (Ctrl-C ends it)', flush=True)
  try:
    uvicorn.Server(config).run(sockets=[listening])
  finally:
    sessions.close()


def _find(names: str) -> tuple[list[epath.Path], dict | None]:
  """The folders of the runs, and of a sweep the table of its points."""
  folders = [paths.expand(name) for name in run_flags.split_names(names)]
  if len(folders) > 1 or not (folders[0] / TABLE).exists():
    return folders, None
  (folder,) = folders
  rows, count = [], 0
  for row in csv.DictReader((folder / TABLE).read_text().splitlines()):
    count += 1
    run = folder / POINTS / row['point']
    if row['state'] == 'complete' and Checkpoints(run).all_steps():
      rows.append((run, row))
  if not rows:
    raise UserError(f'{folder} is a sweep without a complete point.')
  print(f'{folder}: {len(rows)} of {count} points can be explored.')
  table = [
    {'name': row['point']}
    | {name: float(row[name]) if row.get(name) else None for name in _METRICS}
    for _, row in rows
  ]
  return [run for run, _ in rows], {'name': folder.name, 'points': table}


def _listen(host: str, port: int) -> socket.socket:
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  listening = socket.socket(family, socket.SOCK_STREAM)
  listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listening.bind((host, port))
    listening.listen()
  except OSError as error:
    raise UserError(
      f'--host={host} --port={port}: {error.strerror}; name another --port, or '
      '--port=0 for any.'
    ) from error
  return listening


if __name__ == '__main__':
  command_line.run(main, on_interrupt='stopped.')
