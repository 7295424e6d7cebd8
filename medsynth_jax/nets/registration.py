"""The network that registers a made image to a measured one, as a field of displacements."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medsynth_jax.nets.conv import Conv
from medsynth_jax.nets.layers import head, max_pool
from medsynth_jax.nets.resnet_generator import ResidualBlock

INIT = "kaiming"


class RegistrationResUNet(nn.Module):
  """Maps an image and its reference, joined as [B, *space, 2C], to a flow [B, *space, rank].

  The flow is in pixels (float32), channel 0 along the first spatial axis: `warp.warp(image, flow)`
  looks like the reference. It starts within about 1e-3 of zero. The U-Net of RegGAN (Kong et al.,
  NeurIPS 2021, arXiv 2110.06465) after NeMAR (arXiv 2003.08073): at each level a 3x3 convolution, a
  residual block and max pooling; residual blocks at the bottom; linear upsampling, joined with the
  level's map, and a 3x3 convolution on the way back. Leaky ReLU (0.2); instance norm in the
  residual blocks alone. With the defaults: 2,058,018 parameters in 2-D for two channels.

  Any size is taken. The bottom needs two positions along each axis (instance norm and reflection
  are void over one), so smaller images are padded by their edge and the flow cropped: to 256 with
  the seven default levels, which wastes time on a small image or a volume of few slices; give
  `channels` fewer levels there (three: 16 or more). Odd sizes lose their last line in pooling.

  Attributes:
    channels: channels of each level.
    blocks: number of residual blocks at the bottom, with twice the channels of the last level.
    dtype: computing type; parameters and output are float32.
  """

  channels: Sequence[int] = (32, 64, 64, 64, 64, 64, 64)
  blocks: int = 3
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return 1  # padded inside

  @property
  def min_size(self) -> int:
    """Sides below this are padded to it."""
    return 2 ** (len(self.channels) + 1)

  @nn.compact
  def __call__(self, x):
    space = x.shape[1:-1]
    rank = len(space)
    missing = [max(0, self.min_size - size) for size in space]
    before = [pad // 2 for pad in missing]
    pads = [(low, pad - low) for low, pad in zip(before, missing, strict=True)]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="edge")

    def conv(y, features, name, kernel_size=3):
      y = Conv(features, kernel_size, padding=kernel_size // 2, initializer=INIT, dtype=self.dtype,
               name=name)(y)
      return nn.leaky_relu(y, 0.2)

    def block(y, name):
      return ResidualBlock("instance", "reflect", INIT, 0.0, True, self.dtype, name=name)(y)

    skips = []
    for level, width in enumerate(self.channels):
      skips.append(block(conv(x, width, f"down_{level}"), f"down_block_{level}"))
      even = tuple(slice(size // 2 * 2) for size in skips[-1].shape[1:-1])
      x = max_pool(skips[-1][(slice(None), *even)])

    x = conv(x, 2 * width, "widen", kernel_size=1)
    for index in range(self.blocks):
      x = block(x, f"block_{index}")
    x = conv(x, width, "narrow", kernel_size=1)

    for level in reversed(range(len(self.channels))):
      skip = skips[level]
      x = jax.image.resize(x, (*skip.shape[:-1], x.shape[-1]), "linear")
      x = conv(jnp.concatenate([x, skip], -1), self.channels[level], f"up_{level}")
    x = conv(block(x, "refine_block"), x.shape[-1], "refine", kernel_size=1)

    flow = head(x, rank, "none", padding=1, initializer="normal_1e-5")
    inside = (slice(low, low + size) for low, size in zip(before, space, strict=True))
    return flow[(slice(None), *inside)]
