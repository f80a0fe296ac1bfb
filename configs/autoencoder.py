"""The plain autoencoder that the article starts from, on the cartoon faces.

No sampling and no KL: z is the encoder's mean, and the loss is the
reconstruction error. Samples from the prior show why that is no generative
model: the latent space has holes.
"""

from configs import faces


def get_config():
  """The settings of `faces`, with z = μ and no KL."""
  config = faces.get_config()
  config.objective.beta = 0.0
  config.objective.sample_posterior = False
  return config
