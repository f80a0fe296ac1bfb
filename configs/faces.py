"""A small VAE on the embedded cartoon faces: no download, minutes on a CPU.

The likelihood's σ of 0.35 makes the code carry about 45 nats, enough for
distinct faces; the larger the σ, the more the reconstructions blur.
"""

from configs import default


def get_config():
  """The demo's settings; unnamed ones are those of `default`."""
  config = default.get_config()
  config.seed = 1265
  config.data.source = 'cartoon_faces'
  config.data.image_size = 64
  config.model.latent_dim = 32
  config.model.hidden_channels = (16, 32, 64, 128, 256)
  config.model.likelihood = 'gaussian'
  config.model.sigma = 0.35
  config.objective.beta = 1.0
  config.optimizer.learning_rate = 0.003
  config.optimizer.decay_per_epoch = 0.85
  config.train.batch_size = 32
  config.train.num_epochs = 12
  config.train.log_every_steps = 100
  return config
