"""Dynamically binarised MNIST with the bounds of Burda et al. 2016.

Table 1, one stochastic layer: -log p(x) of test images is 86.76 nats with
`:vae`, 85.54 with `:iwae5` and 84.78 with `:iwae50`. Layers of 200 with tanh,
50 latent dimensions, batches of 20, Adam with ε = 0.0001; the paper trains for
3280 epochs, at rates from 0.001 down to 0.0001. Rainforth et al. 2018, table 1,
with 64 draws: 84.97 with `:miwae`, 84.46 with `:piwae`, 84.57 with `:ciwae`.
"""

from configs import mnist

MEMBERS = {
  'vae': {'name': 'elbo'},
  'iwae5': {'name': 'iwae', 'num_samples': 5},
  'iwae50': {'name': 'iwae', 'num_samples': 50},
  'miwae': {'name': 'iwae', 'num_samples': 8, 'num_bounds': 8},
  'piwae': {
    'name': 'iwae',
    'num_samples': 8,
    'num_bounds': 8,
    'gradient': 'piwae',
  },
  'ciwae': {'name': 'iwae', 'num_samples': 64, 'elbo_weight': 0.5},
}


def get_config(objective: str = 'vae'):
  """The protocol, with one of the objectives."""
  if objective not in MEMBERS:
    raise ValueError(f'there is no {objective}; there are {", ".join(MEMBERS)}')
  config = mnist.get_config()
  config.data.train, config.data.validation = 'train', 'test'
  config.data.binarize = 'dynamic'
  config.model = {
    'name': 'mlp',
    'latent_dim': 50,
    'hidden_sizes': (200, 200),
    'activation': 'tanh',
    'likelihood': 'bernoulli',
  }
  config.objective = MEMBERS[objective]
  config.optimizer.learning_rate = 0.001
  config.optimizer.epsilon = 0.0001
  config.optimizer.decay_per_epoch = 10 ** (-1 / 7)
  config.optimizer.decay_epochs = (1, 4, 13, 40, 121, 364, 1093)
  config.train.batch_size = 20
  config.train.num_epochs = 3280
  config.train.log_every_steps = 1000
  return config
