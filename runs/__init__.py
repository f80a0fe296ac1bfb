"""A run's surroundings: command line, schema, workdir, progress, processes.

Modules that import TensorFlow import this package first, since TensorFlow reads
its environment when it is imported.
"""

import os

# TensorFlow's errors come as exceptions too, so its C++ log is off. JAX sets
# this to 1 when it is imported, so 1 counts as unset.
if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
# Many images at a time use the cores; sharing one image's pixels out costs a
# quarter of the time.
os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
# oneDNN logs at any level, and decoding images does not need it.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
