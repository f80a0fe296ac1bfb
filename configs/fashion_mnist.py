"""A small VAE on Fashion-MNIST: grey pictures of clothes, 28×28."""

from configs import mnist


def get_config():
  """Settings for Fashion-MNIST; `mnist` has the others."""
  config = mnist.get_config()
  config.data.name = 'fashion_mnist'
  return config
