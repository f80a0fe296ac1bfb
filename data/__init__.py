"""Data sets: one module for each kind of source, and the embedded one."""

import runs  # noqa: F401 (Sets the environment of TensorFlow.)
