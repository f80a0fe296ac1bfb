"""Members of the family of VAEs, on MNIST: configs/family.py:NAME.

Each member is `mnist` with the settings below; docs/family.md has the papers
and tests.
"""

from configs import mnist

_VECTOR = {
  'model.name': 'mlp',
  'model.hidden_sizes': (300, 300),
  'model.likelihood': 'bernoulli',
}
_MAP = {'model.channels': (32, 64), 'model.sigma': 0.1}

# The settings that each changes; the objective is the ELBO by default.
MEMBERS = {
  # Objectives.
  'warmup': {'objective.kl_warmup_epochs': 5.0},
  'cyclical': {'objective.name': 'cyclical', 'objective.cycle_epochs': 2.5},
  'free_bits': {'objective.name': 'free_bits', 'objective.free_nats': 0.25},
  'capacity': {'objective.name': 'capacity', 'objective.capacity': 25.0},
  'beta_tcvae': {'objective.name': 'total_correlation'},
  'factor': {'objective.name': 'factor', 'objective.critic_sizes': (256,) * 4},
  'dip_1': {'objective.name': 'dip'},
  'dip_2': {'objective.name': 'dip', 'objective.covariance_of': 'z'},
  'info': {'objective.name': 'mmd'},
  'iwae': {'objective.name': 'iwae', 'objective.num_samples': 10},
  'dreg': {'objective.name': 'iwae', 'objective.gradient': 'dreg'},
  'miwae': {'objective.name': 'iwae', 'objective.num_bounds': 4},
  'piwae': {
    'objective.name': 'iwae',
    'objective.num_bounds': 4,
    'objective.gradient': 'piwae',
  },
  'ciwae': {'objective.name': 'iwae', 'objective.elbo_weight': 0.5},
  'rae': {'objective.name': 'rae'},
  'rae_gradient': {
    'objective.name': 'rae',
    'objective.regulariser': 'gradient',
  },
  'rae_spectral': {
    'objective.name': 'rae',
    'objective.regulariser_weight': 0.0,
    'model.spectral_norm': True,
  },
  # Conditional on the digit.
  'conditional': {'model.num_classes': 10},
  # Priors.
  'vamp': {**_VECTOR, 'model.latent_prior': 'vamp'},
  'mixture': {**_VECTOR, 'model.latent_prior': 'mixture'},
  'flow_prior': {**_VECTOR, 'model.latent_prior': 'flow'},
  # Posteriors.
  'full_covariance': {**_VECTOR, 'model.posterior': 'full'},
  'flow_posterior': {**_VECTOR, 'model.posterior': 'flow'},
  # Likelihoods.
  'binary': {'data.binarize': 'dynamic'},
  'continuous_bernoulli': {'model.likelihood': 'continuous_bernoulli'},
  'laplace': {'model.likelihood': 'laplace', 'model.learn_sigma': True},
  'sigma_of_pixels': {'model.likelihood': 'gaussian_per_pixel'},
  'logistic': {'model.likelihood': 'logistic'},
  'logistic_mixture': {'model.likelihood': 'logistic_mixture'},
  # Discrete latents, and networks.
  'vq': {'model.name': 'vq', 'objective.name': 'vq', **_MAP},
  'vq_prior': {
    'model.name': 'vq',
    'objective.name': 'vq',
    'model.latent_prior': 'autoregressive',
    **_MAP,
  },
  'fsq': {'model.name': 'fsq', **_MAP},
  'gated': {**_VECTOR, 'model.activation': 'gated'},
  'residual': {'model.name': 'residual', **_MAP},
  'kl_autoencoder': {
    'model.name': 'residual',
    'model.spatial': True,
    'model.latent_dim': 4,
    'model.attention': True,
    'optimizer.average_decay': 0.999,
    **_MAP,
  },
}


def get_config(member: str = 'warmup'):
  """Settings of a member."""
  if member not in MEMBERS:
    raise ValueError(f'there is no {member}; there are {", ".join(MEMBERS)}')
  config = mnist.get_config()
  settings = MEMBERS[member]
  for group in ('model', 'objective'):
    # Another class has other settings, and its own defaults.
    if f'{group}.name' in settings:
      config[group] = {}
  with config.unlocked():
    config.update_from_flattened_dict(settings)
  return config
