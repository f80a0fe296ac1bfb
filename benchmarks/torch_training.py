"""Trains PyTorch-VAE's VanillaVAE by the article's schedule, for comparison.

  python benchmarks/torch_training.py --config=configs/celeba.py \
    --config.data.dir=FOLDER --config.train.num_epochs=20 --seeds=0,1,2

Network, loss, optimiser and schedule are PyTorch-VAE's; the images are those of
`main.py` with the same config. Each epoch prints the validation loss in the
article's units, MSE + kld_weight · KL with z drawn.

With `initialisation=pca` in the config the network begins as this codebase's
does, without the Tanh, which is not linear. It sees the images turned by 180°,
as its convolutions are padded at the other end (same_network.py).
"""

from collections.abc import Callable
import pathlib
import sys

from absl import flags
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import same_network, torch_vae
import input_pipeline
from runs import command_line, schema

command_line.define_config('configs/celeba.py')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'One run each.')
_COMPILE = flags.DEFINE_bool('compile', False, 'Train by torch.compile.')

_KLD_WEIGHT = 0.00025
_VALIDATION_BATCH = 100


def main() -> None:
  """Trains a run for each seed, and prints its losses."""
  config = flags.FLAGS.config
  schema.validate(config)
  data = input_pipeline.load(config)
  train, validation = (
    _as_tensor(split) for split in (data.train, data.validation)
  )
  is_pca = config.model.initialisation == 'pca'
  if is_pca:
    train, validation = train.flip(2, 3), validation.flip(2, 3)
  for seed in map(int, _SEEDS.value):
    torch.manual_seed(seed)
    model = torch_vae.model_from_config(config)
    if is_pca:
      same_network.initialise(model, config, seed, data.train)
    else:
      model.decoder.append(nn.Tanh())
    optimizer = torch.optim.Adam(
      model.parameters(),
      config.optimizer.learning_rate,
      # None: PyTorch's default.
      fused=_COMPILE.value or None,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(
      optimizer, config.optimizer.decay_per_epoch
    )
    terms = torch.compile(_terms, dynamic=False) if _COMPILE.value else _terms
    print('Training …', flush=True)
    for epoch in range(1, config.train.num_epochs + 1):
      _train_epoch(model, terms, optimizer, train, config.train.batch_size)
      schedule.step()
      mse, kl = _validate(model, validation)
      print(
        f'seed {seed}, epoch {epoch}: loss {mse + _KLD_WEIGHT * kl:.5f} '
        f'(mse {mse:.5f}, kl {kl:.2f} nats)',
        flush=True,
      )


def _as_tensor(split) -> torch.Tensor:
  """The images of a split, [n, channels, height, width] in [0, 1]."""
  (images,) = split.batches(np.arange(split.num_examples), split.num_examples)
  return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _terms(model: nn.Module, images: torch.Tensor):
  """Mean squared error and KL in nats per image of a batch."""
  outputs, mean, logvar = model(images)
  kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
  return F.mse_loss(outputs, images), kl


def _train_epoch(
  model: nn.Module,
  terms: Callable,
  optimizer: torch.optim.Optimizer,
  images: torch.Tensor,
  batch_size: int,
) -> None:
  model.train()
  order = torch.randperm(len(images))
  for indices in order.split(batch_size)[: len(images) // batch_size]:
    batch = images[indices]
    mirrored = torch.rand(len(batch), 1, 1, 1) < 0.5
    mse, kl = terms(model, torch.where(mirrored, batch.flip(3), batch))
    optimizer.zero_grad()
    (mse + _KLD_WEIGHT * kl).backward()
    optimizer.step()


@torch.no_grad()
def _validate(model: nn.Module, images: torch.Tensor) -> tuple[float, float]:
  """Mean squared error and KL over the split, every image once."""
  model.eval()
  totals = torch.zeros(2)
  for batch in images.split(_VALIDATION_BATCH):
    totals += len(batch) * torch.stack(_terms(model, batch))
  return tuple((totals / len(images)).tolist())


if __name__ == '__main__':
  command_line.run(main)
