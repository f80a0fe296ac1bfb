"""The autoencoder of latent diffusion on CelebA (Rombach et al. 2022).

Residual blocks with group normalisation, attention at the lowest resolution,
and a latent map of 16×16×4 (f = 8); absolute errors in units of a learned
scale, a KL of weight 1e-6, and averaged parameters. The paper's perceptual and
adversarial losses are missing. For 256 pixels: --config.data.image_size=256.
"""

from configs import default


def get_config():
  """Settings; `default` has the others."""
  config = default.get_config()
  config.data.source = 'celeba'
  config.data.crop_size = 178
  config.data.image_size = 128
  config.model = {
    'name': 'residual',
    'latent_dim': 4,
    'spatial': True,
    'channels': (64, 128, 256),
    'num_blocks': 2,
    'attention': True,
    'likelihood': 'laplace',
    'learn_sigma': True,
    'sigma': 0.2,
  }
  config.objective.beta = 1e-6
  config.optimizer.learning_rate = 0.0001
  config.optimizer.average_decay = 0.999
  config.optimizer.clip_norm = 1e5
  config.train.batch_size = 32
  config.train.num_epochs = 20
  return config
