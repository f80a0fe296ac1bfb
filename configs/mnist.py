"""A small VAE on MNIST: digits of 28×28, a few minutes on a CPU.

TFDS downloads the digits, or finds them in --config.data.dir. The likelihood is
Bernoulli, with grey values as probabilities.
"""

from configs import default


def get_config():
  """Settings for MNIST; `default` has the others."""
  config = default.get_config()
  config.data.source = 'tfds'
  config.data.name = 'mnist'
  config.data.train = 'train[:50000]'
  config.data.validation = 'train[50000:]'
  config.data.image_size = 28
  config.data.channels = 1
  config.model.latent_dim = 16
  config.model.hidden_channels = (32, 64)
  config.model.likelihood = 'bernoulli'
  config.train.batch_size = 128
  config.train.num_epochs = 10
  config.train.flip = False
  return config
