"""PyTorch-VAE's VanillaVAE on CelebA, with the schedule that the article uses.

The article takes its model from PyTorch-VAE, and lists it with the channels
reversed and ReLU; `configs/article.py` is that listing. Here are PyTorch-VAE's
channels and its LeakyReLU, but not the Tanh behind its last layer.

The article minimises MSE + kld_weight · KL with kld_weight = 0.00025 and the
MSE a mean over pixels. Here losses are in nats per image; multiplied by D/2,
D = 64 · 64 · 3 = 12,288, the article's loss is ½‖x - x̂‖² + 1.536 · KL: a
Gaussian likelihood with σ = 1 and

  beta = kld_weight · D / 2 = 0.00025 · 12,288 / 2 = 1.536.

For another image size, another beta stands for the same kld_weight. In the
same way PyTorch-VAE's weight_decay is D/2 = 6,144 times as much here. The
article's loss is val/mse + 0.00025 · val/kl. docs/article.md has results.
"""

from configs import default


def get_config():
  """The article's settings; unnamed ones are those of `default`."""
  config = default.get_config()
  config.seed = 1265
  config.data.source = 'celeba'
  config.data.image_size = 64
  config.model.latent_dim = 128
  config.model.hidden_channels = (32, 64, 128, 256, 512)
  config.model.likelihood = 'gaussian'
  config.model.sigma = 1.0
  config.objective.beta = 1.536
  config.optimizer.learning_rate = 0.005
  config.optimizer.decay_per_epoch = 0.95
  config.train.batch_size = 64
  config.train.num_epochs = 100
  config.train.flip = True
  return config
