"""The residual generator of Johnson et al. 2016 (arXiv 1603.08155) as CycleGAN uses it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import Conv, ConvTranspose
from medsynth_jax.nets.layers import check_size, head, norm_layer


class ResidualBlock(nn.Module):
  """x + norm(conv(relu(norm(conv(x))))), 3x3 convolutions."""

  norm: str
  padding: str
  initializer: str
  dropout: float
  deterministic: bool
  dtype: Any
  bias: bool = True

  @nn.compact
  def __call__(self, x):
    options = {"padding": 1, "padding_mode": self.padding, "bias": self.bias,
               "initializer": self.initializer, "dtype": self.dtype}
    y = Conv(x.shape[-1], name="conv_0", **options)(x)
    y = nn.relu(norm_layer(self.norm, self.initializer, self.dtype)(y))
    y = nn.Dropout(self.dropout, deterministic=self.deterministic)(y)
    y = Conv(x.shape[-1], name="conv_1", **options)(y)
    return x + norm_layer(self.norm, self.initializer, self.dtype)(y)


class ResNetGenerator(nn.Module):
  """Maps [B, *space, C] to [B, *space, out_channels] in [-1, 1] (float32).

  A 7x7 convolution, two strided ones, residual blocks at a quarter of the size, two transposed
  ones, a 7x7 head. With the defaults: 11,365,633 parameters 1 -> 1 (11,376,129 with
  norm="affine_instance"). Convolutions keep their bias. Raises UserError for a size that is not a
  multiple of 4, and with `residual` for a source of other channels than the image made.

  Attributes:
    out_channels: channels of the image made.
    base: channels at full size.
    blocks: number of residual blocks.
    norm: "instance", "affine_instance" or "none".
    padding: "reflect" or "zero" (where label maps are input: reflection and instance norm would
      cancel them), for the 7x7 convolutions and the blocks.
    dropout: rate inside the blocks in training (rng "dropout"), 0 for none.
    residual: the network makes the change of its source, which starts at zero, and the image is the
      source plus it, cut to [-1, 1]: for a target in the source's units and range, as a CT
      angiogram is of a CT (not in the published systems).
    initializer: see `conv.kernel_init`.
    dtype: computing type; parameters and output are float32.
  """

  out_channels: int = 1
  base: int = 64
  blocks: int = 9
  norm: str = "instance"
  padding: str = "reflect"
  dropout: float = 0.0
  residual: bool = False
  initializer: str = "normal_0.02"
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return 4

  @nn.compact
  def __call__(self, x, deterministic: bool = True):
    check_size("the ResNet generator", x.shape[1:-1], self.factor)
    if self.residual and x.shape[-1] != self.out_channels:
      raise UserError(f"generator.residual=True changes the source itself, which has {x.shape[-1]}"
                      f" channels, and the image made {self.out_channels}: set residual=False, or"
                      " one source without neighbouring slices")
    source = x
    wide = {"kernel_size": 7, "padding": 3, "padding_mode": self.padding,
            "initializer": self.initializer}
    strided = {"kernel_size": 3, "stride": 2, "padding": 1, "initializer": self.initializer,
               "dtype": self.dtype}

    def normed(y):
      return nn.relu(norm_layer(self.norm, self.initializer, self.dtype)(y))

    x = normed(Conv(self.base, dtype=self.dtype, name="stem", **wide)(x))
    for level in (1, 2):
      x = normed(Conv(self.base * 2**level, name=f"down_{level}", **strided)(x))
    # Not `nn.scan`: it saves no compile time here (measured), and XLA:CPU runs gradients in a loop
    # body many times slower unless the cure is on.
    for index in range(self.blocks):
      x = ResidualBlock(self.norm, self.padding, self.initializer, self.dropout, deterministic,
                        self.dtype, name=f"block_{index}")(x)
    for level in (1, 0):
      x = ConvTranspose(self.base * 2**level, output_padding=1, name=f"up_{level}", **strided)(x)
      x = normed(x)
    if not self.residual:
      return head(x, self.out_channels, "tanh", **wide)
    change = head(x, self.out_channels, "tanh", **{**wide, "initializer": "normal_1e-5"})
    return jnp.clip(source + change, -1.0, 1.0)
