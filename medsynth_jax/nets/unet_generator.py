"""The U-Net generator of pix2pix (Isola et al., CVPR 2017, arXiv 1611.07004, appendix 6.1.1)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import Conv, ConvTranspose
from medsynth_jax.nets.layers import check_size, norm_layer

MIN_DEPTH = 3
MAX_DEPTH = 8


def factor(depth: int) -> int:
  """Every spatial size must be a multiple of this."""
  return 2**depth


def depth_for(space: Sequence[int], max_depth: int = MAX_DEPTH) -> int:
  """How many times 2 divides every spatial size, at most `max_depth`; 8 at 256x256.

  Raises UserError below 3, where so shallow a network would see little of the image.
  """
  depth = 0
  while depth < max_depth and all(size > 0 and size % factor(depth + 1) == 0 for size in space):
    depth += 1
  if depth < MIN_DEPTH:
    check_size("the U-Net generator", space, factor(MIN_DEPTH))
    raise UserError(f"max_depth={max_depth}: the U-Net generator needs at least {MIN_DEPTH}")
  return depth


class UNetGenerator(nn.Module):
  """Maps [B, *space, C] to [B, *space, out_channels] in [-1, 1] (float32).

  Strided 4x4 convolutions down to a bottleneck, transposed ones back up, each level joined to its
  mirror. With the defaults at 256x256: 54,407,809 parameters 1 -> 1. Batch norm is replaced by
  affine instance norm, which keeps no statistics; innermost and outermost levels have none.
  Dropout (rng "dropout") acts on up to three decoder blocks after the innermost, those of full
  width. Raises UserError for a size that is not a multiple of 2^depth.

  Attributes:
    out_channels: channels of the image made.
    base: channels of the first level; they double at each level up to base * max_multiple.
    max_multiple: see `base`.
    depth: number of levels; None: `depth_for` the input, at most `max_depth`.
    max_depth: see `depth`.
    dropout: rate in training, 0 for none.
    norm: "affine_instance" (convolutions under it have no bias), "instance" or "none".
    initializer: see `conv.kernel_init`.
    dtype: computing type; parameters and output are float32.
  """

  out_channels: int = 1
  base: int = 64
  max_multiple: int = 8
  depth: int | None = None
  max_depth: int = MAX_DEPTH
  dropout: float = 0.5
  norm: str = "affine_instance"
  initializer: str = "normal_0.02"
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return factor(self.depth or MIN_DEPTH)

  @nn.compact
  def __call__(self, x, deterministic: bool = True):
    space = x.shape[1:-1]
    depth = self.depth or depth_for(space, self.max_depth)
    check_size("the U-Net generator", space, factor(depth))
    widths = [self.base * min(2**level, self.max_multiple) for level in range(depth)]
    options = {"kernel_size": 4, "stride": 2, "padding": 1, "initializer": self.initializer}
    bias = self.norm != "affine_instance"

    skips = []
    for level, width in enumerate(widths):
      y = nn.leaky_relu(x, 0.2) if level else x
      x = Conv(width, bias=bias, dtype=self.dtype, name=f"down_{level}", **options)(y)
      if 0 < level < depth - 1:
        x = norm_layer(self.norm, self.initializer, self.dtype)(x)
      skips.append(x)

    for level in range(depth - 1, 0, -1):
      x = nn.relu(x if level == depth - 1 else jnp.concatenate([skips[level], x], -1))
      width = widths[level - 1]
      x = ConvTranspose(width, bias=bias, dtype=self.dtype, name=f"up_{level}", **options)(x)
      x = norm_layer(self.norm, self.initializer, self.dtype)(x)
      if depth - 4 <= level < depth - 1 and width == widths[-1]:
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)

    x = nn.relu(jnp.concatenate([skips[0], x], -1)).astype(jnp.float32)
    return jnp.tanh(ConvTranspose(self.out_channels, dtype=jnp.float32, name="head", **options)(x))
