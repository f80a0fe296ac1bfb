"""β and the latent dimension of a small VAE on the cartoon faces.

  python sweep.py --config=configs/faces_sweep.py

Four β × three latent dimensions × three seeds: 36 runs of 18 epochs each, on
images of 32×32, in fifteen minutes on two cores (docs/sweeps.md).
"""

from configs import faces


def get_config():
  """Settings of all points; unnamed ones are those of `faces`."""
  config = faces.get_config()
  config.data.image_size = 32
  config.model.hidden_channels = (16, 32, 64, 128)
  config.train.batch_size = 64
  config.train.num_epochs = 18
  config.eval.every_epochs = 9
  return config


def sweep():
  """The settings that vary, with their values."""
  return {
    'objective.beta': (0.5, 1.0, 2.0, 4.0),
    'model.latent_dim': (8, 16, 32),
    'seed': (0, 1, 2),
  }
