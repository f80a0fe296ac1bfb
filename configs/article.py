"""The VAE of the article's listing on CelebA: 3,225,795 parameters.

The channels fall through the encoder, 512 → 32, and rise again in the decoder,
whose first transposed convolution keeps its 32 channels; ReLU throughout.
Schedule and objective are those of `configs/celeba.py`.
"""

from configs import celeba


def get_config():
  """The article's listing; all other settings are those of `celeba`."""
  config = celeba.get_config()
  config.model.hidden_channels = (512, 256, 128, 64, 32)
  config.model.decoder_channels = (32, 64, 128, 256, 512)
  config.model.activation = 'relu'
  return config
