"""`explore.py` as a process of its own, and requests to it."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

from tests.conftest import ROOT


@contextlib.contextmanager
def serving(*flags):
  """Starts `explore.py` on any port; yields its address, a base and a query."""
  command = [sys.executable, ROOT / 'explore.py', '--port=0', *flags]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    try:
      for line in process.stdout:
        if found := re.match(r'Open (http://\S+?/)(\?token=(\S+))?\s', line):
          break
      else:
        raise AssertionError(process.stderr.read())
      yield found[1], found[3] or ''
    finally:
      process.send_signal(signal.SIGINT)
      process.communicate(timeout=30)


def ask(address, path, content=None, **headers):
  """Status, and the answer's JSON or bytes."""
  data = content
  if content is not None and not isinstance(content, bytes):
    data = json.dumps(content).encode()
  request = urllib.request.Request(address + path, data, headers)
  try:
    with urllib.request.urlopen(request, timeout=60) as answer:
      body, status = answer.read(), answer.status
  except urllib.error.HTTPError as error:
    body, status = error.read(), error.code
  with contextlib.suppress(ValueError):
    return status, json.loads(body)
  return status, body


def wait_until(condition, seconds=60):
  end = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < end
    time.sleep(0.2)
  return found


def wait_for_atlas(address, run=0):
  wait_until(lambda: ask(address, f'api/run/{run}')[1].get('is_surveyed'))
