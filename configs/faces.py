"""The article's VAE on the cartoon faces, which need no download.

Ten epochs take about four minutes on two cores.
"""

from configs import default


def get_config():
  """As `configs/celeba.py`, on the embedded data set and for fewer epochs."""
  config = default.get_config()
  config.seed = 1265

  config.data.source = 'cartoon_faces'
  config.data.crop_size = 148
  config.data.image_size = 64

  config.model.latent_dim = 64
  config.model.hidden_channels = (32, 64, 128, 256, 512)

  config.objective.beta = 1.0

  config.optimizer.learning_rate = 0.005
  config.optimizer.decay_per_epoch = 0.95

  config.train.batch_size = 64
  config.train.num_epochs = 10
  return config
