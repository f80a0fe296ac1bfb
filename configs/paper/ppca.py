"""MNIST in grey values: the linear VAE and the exact likelihood of pPCA.

Lucas et al. 2019: at the optimum the ELBO of a linear VAE with a learned σ is
the likelihood of probabilistic PCA (Tipping & Bishop 1999), which is known in
closed form. docs/published.md compares them on the training split.
"""

from configs import mnist


def get_config():
  """A linear model of 10 latent dimensions."""
  config = mnist.get_config()
  config.model = {
    'name': 'mlp',
    'latent_dim': 10,
    'hidden_sizes': (),
    'learn_sigma': True,
    'sigma': 0.3,
  }
  config.optimizer.learning_rate = 0.01
  config.optimizer.decay_per_epoch = 0.98
  config.train.batch_size = 500
  config.train.num_epochs = 300
  config.eval.every_epochs = 20
  return config
