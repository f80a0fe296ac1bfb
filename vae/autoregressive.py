"""A causal transformer over codes, for priors of discrete latents."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


class Transformer(nn.Module):
  """Logits of each code, given those before it (Vaswani et al. 2017).

  Attributes:
    num_codes: values of a code.
    num_layers: blocks of attention and a dense network.
    features: width.
    dtype: of parameters and computation.
  """

  num_codes: int
  num_layers: int = 2
  features: int = 128
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """Logits [batch, positions, num_codes] of codes int [batch, positions]."""
    options = {'dtype': self.dtype, 'param_dtype': self.dtype}
    positions = codes.shape[1]
    # Each position sees the codes before it alone; the first sees none.
    before = jnp.pad(codes[:, :-1] + 1, ((0, 0), (1, 0)))
    x = nn.Embed(self.num_codes + 1, self.features, **options)(before)
    x += self.param(
      'positions',
      nn.initializers.normal(0.02),
      (positions, self.features),
      self.dtype,
    )
    mask = nn.make_causal_mask(codes)
    for _ in range(self.num_layers):
      y = nn.LayerNorm(**options)(x)
      x += nn.MultiHeadDotProductAttention(num_heads=4, **options)(y, mask=mask)
      y = nn.Dense(4 * self.features, **options)(nn.LayerNorm(**options)(x))
      x += nn.Dense(self.features, **options)(nn.gelu(y))
    return nn.Dense(self.num_codes, **options)(nn.LayerNorm(**options)(x))
