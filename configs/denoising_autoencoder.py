"""The denoising autoencoder (Vincent et al. 2008), on the cartoon faces.

As the plain autoencoder, but the encoder sees images with Gaussian noise of
standard deviation 0.2; the target stays clean.
"""

from configs import autoencoder


def get_config():
  """As `autoencoder`, with noise on the encoder's input."""
  config = autoencoder.get_config()
  config.objective.input_noise = 0.2
  return config
