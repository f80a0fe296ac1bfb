"""Ports for the servers that tests start."""

import os
import random
import socket

# Outgoing connections use ports from 32768 on.
_FIRST, _END = 20000, 32768


def free_port() -> int:
  """A port that stays free until a server takes it, and while it is restarted.

  Workers of pytest choose from different ports.
  """
  worker = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw'))
  num_workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
  while True:
    port = random.randrange(_FIRST + worker, _END, num_workers)
    with socket.socket() as probe:
      try:
        probe.bind(('127.0.0.1', port))
      except OSError:
        continue
    return port
