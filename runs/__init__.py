"""What surrounds a run: command line, schema, workdir, progress, processes.

Modules that import TensorFlow import this package first: TensorFlow reads its
environment once, when it is imported.
"""

import os

# Errors come as exceptions too, so the log of TensorFlow's C++ side is off. JAX
# sets this to 1 when it is imported, so 1 counts as unset.
if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
# Processors with AVX-512 or AMX have oneDNN on, which logs at any level. Images
# are decoded and resized without it.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
