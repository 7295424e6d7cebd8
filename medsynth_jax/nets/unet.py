"""Plain U-Net and Attention U-Net for regression."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from medsynth_jax.nets.conv import Conv, ConvTranspose
from medsynth_jax.nets.layers import check_size, head, max_pool, norm_layer

INIT = "kaiming"


class DoubleConv(nn.Module):
  """Twice: 3x3 convolution (no bias), affine instance norm, leaky ReLU (0.01)."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    for index in (0, 1):
      x = Conv(self.features, padding=1, bias=False, initializer=INIT, dtype=self.dtype,
               name=f"conv_{index}")(x)
      x = nn.leaky_relu(norm_layer("affine_instance", INIT, self.dtype)(x), 0.01)
    return x


class AttentionGate(nn.Module):
  """skip * sigmoid(psi(relu(Wx skip + Wg g))): one weight in 0..1 for each position.

  Oktay et al. 2018 (arXiv 1804.03999), with 1x1 convolutions and both inputs at one size. Wx and
  Wg carry an affine instance norm; psi has none, which would fix the mean of its map.
  """

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, skip, g):
    def project(y, name):
      y = Conv(self.features, kernel_size=1, bias=False, initializer=INIT, dtype=self.dtype,
               name=name)(y)
      return norm_layer("affine_instance", INIT, self.dtype)(y)

    y = nn.relu(project(skip, "skip") + project(g, "gate"))
    weight = nn.sigmoid(Conv(1, kernel_size=1, initializer=INIT, dtype=self.dtype, name="psi")(y))
    return skip * weight


class UNet(nn.Module):
  """Maps [B, *space, C] to [B, *space, out_channels] (float32).

  Ronneberger et al. 2015 (arXiv 1505.04597) with padded convolutions, instance norm and leaky
  ReLU: two 3x3 convolutions a level, 2x2 max pooling, 2x2 transposed convolutions, 1x1 head.
  With the defaults: 31,036,481 parameters 1 -> 1. Raises UserError for a size that is not a
  multiple of 2^(levels - 1).

  Attributes:
    out_channels: channels of the image made.
    channels: channels of each level.
    activation: of the head, "none" or "tanh"; with "none" the caller clips to [-1, 1].
    dropout: rate at the bottleneck in training (rng "dropout"), 0 for none.
    dtype: computing type; parameters and output are float32.
  """

  out_channels: int = 1
  channels: Sequence[int] = (64, 128, 256, 512, 1024)
  activation: str = "none"
  dropout: float = 0.0
  dtype: Any = jnp.float32

  attention = False

  @property
  def factor(self) -> int:
    return 2 ** (len(self.channels) - 1)

  @nn.compact
  def __call__(self, x, deterministic: bool = True):
    check_size("the U-Net", x.shape[1:-1], self.factor)
    skips = []
    for level, width in enumerate(self.channels):
      x = DoubleConv(width, self.dtype, name=f"down_{level}")(max_pool(x) if level else x)
      skips.append(x)
    x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
    for level in range(len(self.channels) - 2, -1, -1):
      width = self.channels[level]
      x = ConvTranspose(width, kernel_size=2, stride=2, padding=0, initializer=INIT,
                        dtype=self.dtype, name=f"upsample_{level}")(x)
      skip = skips[level]
      if self.attention:
        skip = AttentionGate(max(1, width // 2), self.dtype, name=f"gate_{level}")(skip, x)
      x = DoubleConv(width, self.dtype, name=f"up_{level}")(jnp.concatenate([skip, x], -1))
    return head(x, self.out_channels, self.activation, kernel_size=1, initializer=INIT)


class AttentionUNet(UNet):
  """`UNet` whose skip connections pass an attention gate; fields and errors as there."""

  attention = True
