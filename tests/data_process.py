"""A process that reads data, so that a hang or a crash is its own.

It takes a JSON object a line and answers each with one: what was read, or the
error, how long it took and by how much memory grew at most meanwhile.
"""

import contextlib
import io
import json
import os
import pathlib
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

from data import crops
from data import image_files
from data.encoded import FileSplit
import input_pipeline
from tests.conftest import make_small_config
from vae.errors import UserError

SPLITS = ('train', 'validation', 'test')


def memory(key):
  """MB of this process, as Linux counts them."""
  with open('/proc/self/status') as file:
    [line] = [line for line in file if line.startswith(f'{key}:')]
  return int(line.split()[1]) / 1e3


def read_image(path, channels, image_size):
  """One file as the train split reads it."""
  split = FileSplit('', [os.fsdecode(bytes.fromhex(path))])
  crop = crops.Crop(148, image_size, channels)
  streamed = input_pipeline.StreamedSplit(split, np.arange(1), crop)
  [images] = streamed.batches(np.arange(1), 1)
  return {'images': images}


def load_image(path, side):
  """One file as the user names it to generate.py."""
  path = os.fsdecode(bytes.fromhex(path))
  return {'images': image_files.load(path, (side, side, 3), 148)[None]}


CHANGES = {
  'removed': lambda path: path.unlink(),
  'a pipe': lambda path: (path.unlink(), os.mkfifo(path)),
  'a folder': lambda path: (path.unlink(), path.mkdir()),
  'text': lambda path: path.write_text('no image'),
  'empty': lambda path: path.write_bytes(b''),
}


def load(settings, read=SPLITS, labels=False, change=None):
  """A whole data set.

  Args:
    settings: of config.data.
    read: the splits whose images are read.
    labels: whether those are read too.
    change: a key of CHANGES and the path that it befalls, between listing and
      reading.
  """
  config = make_small_config('')
  config.train.batch_size = 1
  for key, value in settings.items():
    config.data[key] = value
  data = input_pipeline.load(config)
  if change:
    CHANGES[change[0]](pathlib.Path(change[1]))
  found = {}
  for name in SPLITS:
    split = getattr(data, name)
    found[f'num_{name}'] = np.array(split.num_examples)
    if name in read:
      everything = np.arange(split.num_examples)
      found[name] = np.concatenate(list(split.batches(everything, 64)))
    if labels:
      found[f'labels_{name}'] = split.labels().values
  return found


COMMANDS = {'read_image': read_image, 'load_image': load_image, 'load': load}


def answer(command, arguments, arrays):
  with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')  # The most memory so far is what there is now.
  before, start = memory('VmRSS'), time.monotonic()
  reply = {'error': None, 'trace': None}
  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
      np.savez(arrays, **COMMANDS[command](**arguments))
    except UserError as error:
      reply['error'] = str(error)
    except BaseException:
      reply['trace'] = traceback.format_exc()
  seconds = time.monotonic() - start
  growth = memory('VmHWM') - before
  return reply | {'seconds': seconds, 'growth': growth, 'said': said.getvalue()}


def main():
  with open(os.dup(1), 'w') as replies:
    # Nothing else may write there.
    os.dup2(2, 1)
    for line in sys.stdin:
      print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)


if __name__ == '__main__':
  main()
