"""Variational autoencoders in JAX: model, objective, training, evaluation.

Pure JAX: it runs without TensorFlow, from a notebook as well as from the
scripts beside it. `vae.load(workdir)` gives a trained model.
"""

from vae.loading import load as load
