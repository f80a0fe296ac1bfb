"""A prior for a trained model: ex-post density estimation (Ghosh et al. 2020).

  loss = KL(q(z|x) ‖ p(z)), with a gradient in p(z) alone

Encoder and decoder stay as they are, and the model's prior is fitted to the
aggregate posterior: `config.init_from` is the trained run, and
`config.model.latent_prior` the prior that it gets. With `two_stage` it is the
second stage of Dai & Wipf 2019, whose ELBO stands for log p(z).
"""

from flax import struct
import jax
from jax import lax

from vae import distributions, numerics
from vae.objectives import Batch, static

# Priors that can be learned without the rest of the model.
PRIORS = 'mixture', 'flow', 'two_stage'


@struct.dataclass
class Objective:
  """KL(q(z|x) ‖ p(z)), nats per image, in the prior alone.

  Attributes:
    sample_posterior: whether z is drawn from q(z|x), or is its mean.
  """

  sample_posterior: bool = static(default=True)

  def check(self, config) -> None:
    """Raises ValueError for settings that do not go together."""
    if config.model.get('latent_prior') not in PRIORS:
      raise ValueError(
        'name is prior_only; it needs config.model.latent_prior='
        f'{" or ".join(PRIORS)}.'
      )
    if not config.init_from:
      raise ValueError(
        'name is prior_only, and config.init_from is empty; it must be the '
        'workdir of a trained run.'
      )
    if config.optimizer.weight_decay:
      raise ValueError(
        'name is prior_only; config.optimizer.weight_decay would change the '
        'rest of the model, so it must be 0.'
      )

  def __call__(self, model, batch: Batch) -> dict[str, jax.Array]:
    """`loss`, `elbo`, `distortion` and `kl`, nats per image, [batch]."""
    frozen = lax.stop_gradient
    posterior = jax.tree.map(frozen, model.encode(batch.images, train=False))
    z = posterior.mean[None]
    if self.sample_posterior:
      z = posterior.sample(batch.keys, 1)
    likelihood = jax.tree.map(frozen, model.decode(frozen(z), train=False))
    keys = numerics.fold_in(batch.keys, 1)  # Other draws than those of z.
    log_prior = distributions.log_prior(model.prior(), frozen(z), keys)
    # The posterior's part has no gradient, and cancels that of padding.
    kl = (posterior.log_prob(z) - log_prior)[0]
    distortion = -likelihood.log_prob(batch.images)[0]
    return {
      'loss': kl,
      'elbo': -distortion - kl,
      'distortion': distortion,
      'kl': kl,
    }
