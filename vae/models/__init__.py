"""Models, one module each, by the name that `config.model.name` gives.

A module has a Flax module class `Model`. Its dataclass fields, but for
`image_shape` and `axis_name`, are the settings of `config.model`, and `setup`
raises ValueError for those that it cannot take. Training, sampling and
evaluation call

  encode(images, train) → a posterior over z,
  decode(z, train) → a likelihood of images,
  prior() → a distribution of z (`vae.distributions`).

`VAE` has these for a latent of real numbers. Images are [batch, height, width,
channels] in [0, 1].
"""

import math
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from vae import (
  conditioning,
  distributions,
  flows,
  likelihoods,
  padding,
  registry,
  second_stage,
)
from vae.layers import at_least_float32, spectrally_normalised

# Layers of a flow, and features of its networks.
_FLOW_LAYERS, _FLOW_FEATURES = 4, 128


class Autoencoder(nn.Module):
  """An encoder, a decoder, and a likelihood of images.

  A subclass has `latent_shape` and makes, in a `setup` that first calls this
  one, `decoder`, z to `num_outputs` for each pixel, called with `train`; and it
  has `encode` and `prior`. What leaves the networks is at least float32,
  whatever `dtype` they compute in.

  Attributes:
    image_shape: (height, width, channels).
    likelihood: of the images, one of `vae.likelihoods`.
    sigma: standard deviation of a Gaussian or Laplace likelihood, or its first
      value.
    learn_sigma: whether one shared σ is learned (Rybkin et al. 2021).
    dtype: of the computation; parameters and statistics are at least float32.
    axis_name: the pmap axis of a global batch, for statistics over it.
    num_classes: of the label that encoder and decoder see (Sohn et al. 2015;
      `vae.conditioning`): an embedding as one more channel of the image, and a
      one-hot vector before z. 0: none; p(z) is the same for all classes.
    spectral_norm: whether each kernel of the decoder is divided by its largest
      singular value (Miyato et al. 2018; Ghosh et al. 2020, section 3.2).
  """

  image_shape: tuple[int, int, int]
  likelihood: likelihoods.Name = 'gaussian'
  sigma: float = 1.0
  learn_sigma: bool = False
  dtype: Literal['float32', 'bfloat16', 'float64'] = 'float32'
  axis_name: str | None = None
  num_classes: int = 0
  spectral_norm: bool = False

  def setup(self):
    registry.check_at_least(0, num_classes=self.num_classes)
    if self.num_classes:
      features = self.image_shape[0] * self.image_shape[1]
      self.label_embedding = nn.Embed(
        self.num_classes,
        features,
        param_dtype=self.param_dtype,
        # As different as images are.
        embedding_init=nn.initializers.normal(0.3),
      )
    # Gradients have 1/σ², and Adam squares them, in float32.
    if not 1e-6 <= self.sigma <= 1e6:
      raise ValueError(
        f'sigma is {self.sigma:g}; it must be from 1e-06 to 1e+06.'
      )
    if self.learn_sigma:
      if self.likelihood not in likelihoods.WITH_SIGMA:
        raise ValueError(
          f'learn_sigma is True; {self.likelihood} has no sigma, only '
          f'{" and ".join(likelihoods.WITH_SIGMA)} have one.'
        )
      initial = nn.initializers.constant(math.log(self.sigma))
      self.log_sigma = self.param('log_sigma', initial, (), self.param_dtype)

  @property
  def param_dtype(self) -> Any:
    """The dtype of parameters, at least float32."""
    return jnp.promote_types(self.dtype, jnp.float32)

  @property
  def latent_shape(self) -> tuple[int, ...]:
    """The shape of z."""
    raise NotImplementedError

  @property
  def num_outputs(self) -> int:
    """The number of the decoder's outputs for each pixel."""
    return likelihoods.num_outputs(self.likelihood, self.image_shape[-1])

  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """p(x|z) of the posterior's mean; makes all parameters."""
    self.prior()
    return self.decode(self.encode(images, train).mean, train)

  def encode(self, images: jax.Array, train: bool = False) -> Any:
    """The posterior q(z|x) over z [batch, *latent_shape]."""
    raise NotImplementedError

  def decode(self, z: jax.Array, train: bool = False) -> Any:
    """The likelihood p(x|z) of images, for z [..., *latent_shape].

    BatchNorm takes its statistics over all of z's leading axes.
    """
    z = z * self.latent_mask()
    leading = z.shape[: z.ndim - len(self.latent_shape)]
    flat = z.reshape(-1, *self.latent_shape)
    if self.num_classes:
      labels = jnp.broadcast_to(self._labels(leading[-1]), leading)
      given = nn.one_hot(labels, self.num_classes, dtype=flat.dtype)
      given = given.reshape(flat.shape[0], *[1] * (flat.ndim - 2), -1)
      given = jnp.broadcast_to(given, (*flat.shape[:-1], self.num_classes))
      # Padding of z is behind it (`vae.padding`).
      flat = jnp.concatenate([given, flat], axis=-1)
    outputs = at_least_float32(self._decoded(flat, train))
    *size, channels = self.image_shape
    outputs = outputs.reshape(*leading, *size, self.num_outputs)
    sigma = jnp.exp(self.log_sigma) if self.learn_sigma else self.sigma
    return likelihoods.from_outputs(self.likelihood, outputs, channels, sigma)

  def prior(self) -> Any:
    """The prior p(z)."""
    raise NotImplementedError

  def encoded(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
    """The encoder's outputs for images and, if it sees them, labels."""
    if self.num_classes:
      given = self.label_embedding(self._labels(images.shape[0]))
      given = given.reshape(*images.shape[:-1], 1)
      images = jnp.concatenate([images, given.astype(images.dtype)], axis=-1)
    return tuple(map(at_least_float32, self.encoder(images, train)))

  def _decoded(self, z: jax.Array, train: bool) -> jax.Array:
    if not self.spectral_norm:
      return self.decoder(z, train)
    apply = nn.map_variables(
      lambda decoder: decoder(z, train),
      'params',
      spectrally_normalised,
      init=self.is_initializing(),
    )
    return apply(self.decoder)

  def _labels(self, batch_size: int) -> jax.Array:
    """The classes of the batch, [batch_size]."""
    if self.is_initializing():
      return jnp.zeros(batch_size, jnp.int32)
    labels: Any = self.get_variable(conditioning.COLLECTION, 'labels')
    if labels is None:
      raise ValueError('the model is conditioned on labels; give it some.')
    return labels

  def latent_mask(self) -> jax.Array | float:
    """1 for the dimensions of the run, 0 for padding (`vae.padding`)."""
    return self.get_variable(padding.COLLECTION, 'mask', 1.0)


class VAE(Autoencoder):
  """A variational autoencoder with a latent of real numbers.

  A subclass also makes `encoder`, images to an array for each of `heads`,
  called with `train`. Heads are layers of their own, so that a population can
  pad them.

  Attributes:
    posterior: a diagonal Gaussian; a Gaussian with all covariances; or a
      diagonal one, transformed by a flow that sees the image (Rezende & Mohamed
      2015), of coupling layers, whose density is known at any z.
    latent_prior: N(0, I); a mixture of the posteriors of learned pseudo-inputs
      (VampPrior; Tomczak & Welling 2018, equation 9); a learned mixture of
      Gaussians; N(0, I), transformed by a flow; or a VAE of z (Dai & Wipf
      2019), which objective `prior_only` trains after the rest.
    prior_components: of a mixture, or pseudo-inputs.
  """

  posterior: Literal['diagonal', 'full', 'flow'] = 'diagonal'
  latent_prior: Literal['normal', 'vamp', 'mixture', 'flow', 'two_stage'] = (
    'normal'
  )
  prior_components: int = 500

  def setup(self):
    super().setup()
    self._check()
    if self.posterior == 'flow':
      self.posterior_flow = self._flow_network()
    normal, zeros = nn.initializers.normal, nn.initializers.zeros
    match self.latent_prior:
      case 'flow':
        self.prior_flow = self._flow_network()
      case 'two_stage':
        self.second_stage = second_stage.SecondStage(
          self.latent_shape[-1], self.param_dtype
        )
      case 'vamp':
        self.pseudo_inputs = self.param(
          'pseudo_inputs',
          # Almost black, as in the paper's code.
          lambda *args: 0.05 + normal(0.01)(*args),
          (self.prior_components, *self.image_shape),
          self.param_dtype,
        )
      case 'mixture':
        shape = self.prior_components, *self.latent_shape
        self.prior_logits, self.prior_means, self.prior_logvars = (
          self.param(f'prior_{name}', initial, own_shape, self.param_dtype)
          for name, initial, own_shape in (
            ('logits', zeros, shape[:1]),
            ('means', normal(1.0), shape),
            ('logvars', zeros, shape),
          )
        )

  def _check(self):
    registry.check_at_least(1, prior_components=self.prior_components)
    if len(self.latent_shape) > 1:
      if self.posterior != 'diagonal':
        raise ValueError(f'posterior is {self.posterior}; z must be a vector.')
      if self.latent_prior in ('flow', 'two_stage'):
        raise ValueError(
          f'latent_prior is {self.latent_prior}; z must be a vector.'
        )
    if self.latent_prior == 'vamp' and self.posterior != 'diagonal':
      raise ValueError(
        f'posterior is {self.posterior}; latent_prior=vamp needs diagonal.'
      )
    if self.latent_prior == 'vamp' and self.num_classes:
      raise ValueError(
        f'num_classes is {self.num_classes}; with latent_prior=vamp it must be '
        '0, as pseudo-inputs have no labels.'
      )

  def _flow_network(self) -> nn.Module:
    return flows.Coupling(_FLOW_LAYERS, _FLOW_FEATURES, self.param_dtype)

  @property
  def heads(self) -> dict[str, int]:
    """The encoder's outputs: names and features, in order."""
    size = self.latent_shape[-1]
    heads = {'mean': size, 'logvar': size}
    if self.posterior == 'full':
      heads['rows'] = size * (size - 1) // 2
    elif self.posterior == 'flow':
      heads['context'] = _FLOW_FEATURES
    return heads

  def encode(self, images: jax.Array, train: bool = False) -> Any:
    """The posterior q(z|x) over z [batch, *latent_shape]."""
    mean, logvar, *others = self.encoded(images, train)
    if self.posterior == 'full':
      return distributions.FullNormal.from_rows(mean, logvar, *others)
    normal = distributions.Normal(mean, logvar)
    if self.posterior == 'flow':
      return self._flow(normal, self.posterior_flow, *others)
    return normal

  def prior(self) -> Any:
    """The prior p(z)."""
    standard = distributions.StandardNormal(self.latent_shape)
    match self.latent_prior:
      case 'flow':
        return self._flow(standard, self.prior_flow)
      case 'two_stage':
        if self.is_initializing():
          self.second_stage(standard.mean)
        network = self.second_stage.unbind()
        return distributions.SecondStage(*network, self.latent_shape[-1])
      case 'vamp':
        of_inputs = self.encode(jnp.clip(self.pseudo_inputs, 0, 1))
        logits = jnp.zeros(self.prior_components, of_inputs.mean.dtype)
        return distributions.Mixture(logits, of_inputs.mean, of_inputs.logvar)
      case 'mixture':
        return distributions.Mixture(
          self.prior_logits, self.prior_means, self.prior_logvars
        )
    return standard

  def _flow(self, base, network: nn.Module, context=None) -> Any:
    if self.is_initializing():
      network(base.mean, context)
    return distributions.Flow(base, *network.unbind(), context)


def find(name: str) -> type[nn.Module]:
  """The model class of a name; raises UserError if there is none."""
  return registry.find('vae.models', name, 'Model')


def from_config(config, axis_name: str | None = None) -> nn.Module:
  """The model of a complete config; its batches are laid over `axis_name`."""
  size = config.data.image_size
  return find(config.model.name)(
    image_shape=(size, size, config.data.channels),
    axis_name=axis_name,
    **registry.settings(config.model),
  )


def check(config) -> None:
  """Raises ValueError if settings do not go with those of other groups."""
  if config.model.get('latent_prior') == 'two_stage' and (
    config.objective.name != 'prior_only'
  ):
    raise ValueError(
      'latent_prior is two_stage; it needs config.objective.name=prior_only '
      'and a trained run in config.init_from.'
    )
  if config.data.label and not config.model.get('num_classes'):
    raise ValueError(
      f'num_classes is 0; config.data.label={config.data.label} needs as many '
      'as that label has.'
    )
  if ('table' in config.model) != ('commitment' in config.objective):
    raise ValueError(
      f'name is {config.model.name}, and config.objective.name='
      f'{config.objective.name}; a model with a codebook needs an objective '
      'with its losses, such as vq, and the other way round.'
    )
