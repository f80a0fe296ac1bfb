"""A VAE on CIFAR-10: colour photographs of ten classes, 32×32.

The Gaussian likelihood learns its σ, so that rate and distortion balance
without a choice of β.
"""

from configs import default


def get_config():
  """Settings for CIFAR-10; `default` has the others."""
  config = default.get_config()
  config.data.source = 'tfds'
  config.data.name = 'cifar10'
  config.data.train = 'train[:45000]'
  config.data.validation = 'train[45000:]'
  config.data.image_size = 32
  config.model.latent_dim = 128
  config.model.hidden_channels = (64, 128, 256)
  config.model.learn_sigma = True
  config.train.batch_size = 128
  config.train.num_epochs = 50
  return config
