"""Variational autoencoders in JAX: model, objective, training, pictures.

Pure JAX: it runs without TensorFlow, from a notebook as well as from the
scripts beside it.
"""
