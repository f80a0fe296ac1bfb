"""Checks that contenders compute the same, before they are measured.

With a stride of 2 and an even side Flax pads at the end and PyTorch at the
beginning: output i sees the inputs 2i, 2i + 1, 2i + 2 in the one and 2i - 1,
2i, 2i + 1 in the other, which is the same counted from the other end of the
image. So PyTorch's network, with the convolutions' kernels turned by 180°,
makes of turned images what this codebase makes of the images; the transposed
convolutions turn by themselves.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import jax_vae
from vae import initialisation, models, objectives, steps

# Largest differences: absolute of the outputs, relative of the loss and of each
# parameter's gradient (Euclidean norms). They are float32's rounding; gradients
# amplify it if a rectifier's input falls on the other side of zero.
_OUTPUTS, _LOSS, _GRADIENTS = 1e-4, 1e-5, 0.03


def check(config, with_torch: bool) -> dict[str, dict[str, float]]:
  """Compares this codebase with plain Flax and PyTorch, for equal parameters.

  In float32 without TF32, in training (BatchNorm takes the batch's statistics)
  with z = mean: the outputs, the loss, and its gradient for each parameter. The
  biases before a BatchNorm are left out, as their gradient is zero.

  Returns:
    The differences, by the other's name.

  Raises:
    SystemExit: if the networks differ.
  """
  config = config.copy_and_resolve_references()
  config.model.dtype = 'float32'
  images = jax_vae.random_images(config, 16).astype(np.float32) / 255
  with jax.default_matmul_precision('highest'):
    variables, ours = _ours(config, images)
    others = {'plain Flax': _plain(config, variables, images)}
  if with_torch:
    others['PyTorch'] = _torch(config, variables['params'], images)
  differences = {name: _compare(ours, other) for name, other in others.items()}
  count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  for name, values in differences.items():
    print(
      f'Same network as in {name}: {count:,} parameters; differences: outputs '
      f'{values["outputs"]:.1e}, loss {values["loss"]:.1e}, gradients '
      f'{values["gradients"]:.1e}.'
    )
    if not (
      values['outputs'] < _OUTPUTS
      and values['loss'] < _LOSS
      and values['gradients'] < _GRADIENTS
    ):
      raise SystemExit(f'{name} computes another network.')
  return differences


def _ours(config, images):
  model = models.from_config(config)
  objective = objectives.from_config(config).replace(sample_posterior=False)
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  batch = objectives.Batch(
    images=images,
    mask=jnp.ones(len(images), bool),
    keys=None,
    noise_keys=None,
    epoch=0.0,
    train=True,
    num_train_examples=len(images),
    axis_name=None,
  )

  @jax.jit
  def run(params):
    def loss_fn(params):
      def terms(model):
        # Twice, as the objective does not return the outputs; XLA runs it once.
        loss = objective(model, batch)['loss'].mean()
        mean = model.encode(images, train=True).mean
        return loss, model.decode(mean, train=True).mean

      return model.apply(
        {**variables, 'params': params}, method=terms, mutable='batch_stats'
      )[0]

    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  (loss, outputs), gradients = run(variables['params'])
  return variables, (outputs, loss, to_torch(gradients))


def _plain(config, variables, images):
  model = jax_vae.plain_model(config)
  epsilon = jnp.zeros((len(images), config.model.latent_dim))

  @jax.jit
  def run(params):
    def loss_fn(params):
      found, _ = model.apply(
        {**variables, 'params': params}, images, epsilon, mutable='batch_stats'
      )
      return jax_vae.plain_loss(config, images, *found), found[0]

    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  (loss, outputs), gradients = run(variables['params'])
  return outputs, loss, to_torch(gradients)


def _torch(config, params, images):
  import torch

  from benchmarks import torch_vae

  device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
  torch_vae.set_precision(matmul=False, convolutions=False, autotune=False)
  model = torch_vae.model_from_config(config).to(device)
  own = dict(model.named_parameters())
  given = to_torch(params)
  shapes = [
    {name: tuple(value.shape) for name, value in values.items()}
    for values in (own, given)
  ]
  if shapes[0] != shapes[1]:
    raise SystemExit('PyTorch has other parameters.')
  with torch.no_grad():
    for name, value in given.items():
      own[name].copy_(torch.tensor(value))
  turned = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).flip(2, 3)
  outputs, mean, logvar = model(turned, sample=False)
  loss = torch_vae.loss_fn(
    turned, outputs, mean, logvar, config.model.sigma, config.objective.beta
  )
  loss.backward()
  outputs = outputs.detach().flip(2, 3).permute(0, 2, 3, 1).cpu().numpy()
  gradients = {name: value.grad.cpu().numpy() for name, value in own.items()}
  return outputs, loss.item(), gradients


def initialise(model, config, seed: int, split) -> None:
  """Gives PyTorch's network the first variables of this codebase's.

  Args:
    model: for turned images.
    config: of the run.
    seed: of the run.
    split: the training images.
  """
  import torch

  config = config.copy_and_resolve_references()
  config.seed = seed
  program = steps.program_from_config(config, split.num_examples)
  state = initialisation.first_state(
    config, program.model, steps.create_state(program, seed), split
  )
  arrays = to_torch(state.params)
  for part, layers in state.collections['batch_stats'].items():
    for index, layer in enumerate(layers.values()):
      for name, own in (('mean', 'running_mean'), ('var', 'running_var')):
        arrays[f'{part}.{index}.1.{own}'] = np.asarray(layer[name])
  own = dict(model.state_dict())
  with torch.no_grad():
    for name, value in arrays.items():
      own[name].copy_(torch.tensor(value))


def to_torch(params) -> dict[str, np.ndarray]:
  """Parameters or gradients in the layout of the turned PyTorch network."""
  params = jax.device_get(params)
  encoder, decoder = params['encoder'], params['decoder']
  depth = sum(name.startswith('Conv_') for name in encoder)
  channels = encoder[f'Conv_{depth - 1}']['kernel'].shape[-1]
  start = _start(encoder['mean']['kernel'].shape[0], channels)
  result = {}
  for i in range(depth):
    result |= _parameters(f'encoder.{i}.0', _conv(encoder[f'Conv_{i}']))
    result |= _parameters(f'encoder.{i}.1', _norm(encoder[f'BatchNorm_{i}']))
    layer = decoder[f'ConvTranspose_{i}']
    transposed = layer['kernel'].transpose(2, 3, 0, 1), layer['bias']
    result |= _parameters(f'decoder.{i}.0', transposed)
    result |= _parameters(f'decoder.{i}.1', _norm(decoder[f'BatchNorm_{i}']))
  result |= _parameters(f'decoder.{depth}', _conv(decoder['Conv_0']))
  for name in ('mean', 'logvar'):
    layer = encoder[name]
    weight = _turned(layer['kernel'].T, start)
    result |= _parameters(name, (weight, layer['bias']))
  layer = decoder['Dense_0']
  weight = _turned(layer['kernel'], start).T
  bias = _turned(layer['bias'], start)
  return result | _parameters('dense', (weight, bias))


def _parameters(name, pair):
  weight, bias = (np.ascontiguousarray(array) for array in pair)
  return {f'{name}.weight': weight, f'{name}.bias': bias}


def _conv(layer):
  kernel = layer['kernel'][::-1, ::-1]
  return kernel.transpose(3, 2, 0, 1), layer['bias']


def _norm(layer):
  return layer['scale'], layer['bias']


def _start(size: int, channels: int) -> tuple[int, int, int]:
  side = round((size // channels) ** 0.5)
  return side, side, channels


def _turned(array: np.ndarray, start: tuple[int, int, int]) -> np.ndarray:
  """Turns the images that the last axis, pixels and channels, holds."""
  images = array.reshape(*array.shape[:-1], *start)[..., ::-1, ::-1, :]
  return np.moveaxis(images, -1, -3).reshape(array.shape)


def _compare(ours, other) -> dict[str, float]:
  outputs = np.abs(np.asarray(ours[0]) - np.asarray(other[0])).max()
  loss = abs(float(ours[1]) - float(other[1])) / abs(float(ours[1]))
  errors = [
    np.linalg.norm(ours[2][name] - other[2][name])
    / np.linalg.norm(ours[2][name])
    for name in ours[2]
    if ours[2][name].any()
  ]
  return {
    'outputs': float(outputs),
    'loss': loss,
    'gradients': float(max(errors)),
  }
