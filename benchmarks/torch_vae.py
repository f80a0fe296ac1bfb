"""Contenders in PyTorch: the same network and training step.

The network is PyTorch-VAE's (convolutions padded by one on both sides,
transposed convolutions with output padding), with the same parameters as this
codebase's. A variant is a list of words:

  eager            PyTorch as installed, without any other word
  TF32             matrix products in TF32 (cuDNN's convolutions are anyhow)
  bf16             autocast to bfloat16, convolutions too
  channels-last    images and kernels in that memory layout
  compiled         `torch.compile` of the loss, and so of its gradient
  reduce-overhead  with the CUDA graphs of `torch.compile`
  max-autotune     with kernels chosen by trying them, which takes minutes
  graph            the whole step, optimiser included, as one CUDA graph

All but eager have the fused Adam and, on a GPU, let cuDNN choose its algorithms
by trying them.
"""

from collections.abc import Callable
import math

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import jax_vae, rounds

WORDS = (
  'eager',
  'TF32',
  'bf16',
  'channels-last',
  'compiled',
  'reduce-overhead',
  'max-autotune',
  'graph',
)
CPU_VARIANTS = (
  'eager',
  'channels-last',
  'compiled',
  'channels-last compiled',
)
GPU_VARIANTS = (
  'eager',
  'TF32 channels-last',
  'TF32 compiled',
  'TF32 channels-last compiled',
  'TF32 channels-last compiled graph',
  'bf16 channels-last',
  'bf16 channels-last compiled',
  'bf16 channels-last compiled reduce-overhead',
  'bf16 channels-last compiled graph',
)


class VAE(nn.Module):
  """Images [batch, channels, size, size] to outputs, mean and logvar."""

  def __init__(self, size, channels, latent_dim, hidden_channels):
    super().__init__()
    layers, inputs = [], channels
    for outputs in hidden_channels:
      layers.append(_block(nn.Conv2d(inputs, outputs, 3, 2, 1)))
      inputs = outputs
    self.encoder = nn.Sequential(*layers)
    self.start = (inputs, *[size // 2 ** len(hidden_channels)] * 2)
    flat = math.prod(self.start)
    self.mean = nn.Linear(flat, latent_dim)
    self.logvar = nn.Linear(flat, latent_dim)
    self.dense = nn.Linear(latent_dim, flat)
    layers = []
    backwards = hidden_channels[::-1]
    for outputs in (*backwards[1:], backwards[-1]):
      conv = nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1)
      layers.append(_block(conv))
      inputs = outputs
    layers.append(nn.Conv2d(inputs, channels, 3, padding=1))
    self.decoder = nn.Sequential(*layers)

  def forward(self, images, sample=True):
    """Through the encoder, a draw of z (or its mean), and the decoder."""
    h = self.encoder(images).flatten(1)
    mean, logvar = self.mean(h), self.logvar(h)
    z = mean
    if sample:
      z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    return self.decoder(self.dense(z).unflatten(1, self.start)), mean, logvar


def _block(conv):
  return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU())


def model_from_config(config) -> VAE:
  """The network of a config."""
  return VAE(
    config.data.image_size,
    config.data.channels,
    config.model.latent_dim,
    tuple(config.model.hidden_channels),
  )


def loss_fn(images, outputs, mean, logvar, sigma, beta):
  """-log p(x|z) + β · KL, nats per image, mean over the batch."""
  dimensions = images[0].numel()
  squares = F.mse_loss(outputs.float(), images, reduction='sum') / len(images)
  constant = dimensions * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
  mean, logvar = mean.float(), logvar.float()
  kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
  return squares / (2 * sigma**2) + constant + beta * kl


def set_precision(matmul: bool, convolutions: bool, autotune: bool) -> None:
  """Sets PyTorch's global switches: TF32 in both, and cuDNN's choice."""
  torch.set_float32_matmul_precision('high' if matmul else 'highest')
  torch.backends.cudnn.allow_tf32 = convolutions
  torch.backends.cudnn.benchmark = autotune


def contender(variant: str, device: str, config) -> rounds.Contender:
  """The training step of a variant.

  Args:
    variant: words of `WORDS`.
    device: 'cpu' or 'cuda'.
    config: of the run.
  """
  words = variant.split()
  step = _make_step(words, device, config)
  count = jax_vae.NUM_BATCHES * config.train.batch_size
  pixels = torch.from_numpy(jax_vae.random_images(config, count)).to(device)
  # Laid out once, and not at each step.
  batches = [
    batch.permute(0, 3, 1, 2).contiguous(memory_format=_memory_format(words))
    for batch in pixels.chunk(jax_vae.NUM_BATCHES)
  ]
  if 'graph' in words:
    _set_switches(words)
    step = _captured(step, batches[0])

  def run(num_steps):
    _set_switches(words)
    for index in range(num_steps):
      step(batches[index % len(batches)])
    if device == 'cuda':
      torch.cuda.synchronize()

  dtype = 'bfloat16' if 'bf16' in words else 'float32'
  return rounds.Contender(f'PyTorch, {variant}', len(batches[0]), dtype, run)


def _memory_format(words: list[str]) -> torch.memory_format:
  if 'channels-last' in words:
    return torch.channels_last
  return torch.contiguous_format


def _set_switches(words: list[str]) -> None:
  # They belong to the process, so the variant before has set its own.
  set_precision('TF32' in words, convolutions=True, autotune=words != ['eager'])


def _make_step(
  words: list[str], device: str, config
) -> Callable[[torch.Tensor], torch.Tensor]:
  """A function of a batch that makes an update and returns the loss."""
  model = model_from_config(config)
  model = model.to(device, memory_format=_memory_format(words))
  optimizer = torch.optim.Adam(
    model.parameters(),
    config.optimizer.learning_rate,
    # None: PyTorch's default.
    fused=None if words == ['eager'] else True,
    capturable='graph' in words,
  )
  # Read once: as a config's values they would be compiled at each step.
  bf16, flip = 'bf16' in words, config.train.flip
  sigma, beta = config.model.sigma, config.objective.beta

  def loss_of(pixels):
    images = pixels.float() / 255
    if flip:
      mirrored = torch.rand(len(images), 1, 1, 1, device=device) < 0.5
      images = torch.where(mirrored, images.flip(3), images)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
      results = model(images)
    return loss_fn(images, *results, sigma, beta)

  if 'compiled' in words:
    # `max-autotune` alone would add CUDA graphs, which have their own words.
    mode = 'default'
    if 'max-autotune' in words:
      mode = 'max-autotune-no-cudagraphs'
    if 'reduce-overhead' in words:
      mode = 'reduce-overhead'
    # Code for one batch size, as XLA's.
    loss_of = torch.compile(loss_of, mode=mode, dynamic=False)

  def step(pixels):
    if 'reduce-overhead' in words:
      torch.compiler.cudagraph_mark_step_begin()
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(pixels)
    loss.backward()
    optimizer.step()
    return loss.detach()

  return step


def _captured(
  step: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
  """The step as a CUDA graph, replayed on a copy of the images."""
  static = example.clone()
  # Compilation and the choice of kernels come before the capture, on a stream
  # of their own (PyTorch's manual).
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    for _ in range(3):
      step(static)
  torch.cuda.current_stream().wait_stream(stream)
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    loss = step(static)

  def replay(pixels):
    static.copy_(pixels)
    graph.replay()
    return loss

  return replay
