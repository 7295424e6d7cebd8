"""StarGAN's networks (Choi et al., CVPR 2018, arXiv 1711.09020): one pair for all modalities."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import Conv, ConvTranspose, kernel_init
from medsynth_jax.nets.layers import check_size, head, norm_layer
from medsynth_jax.nets.resnet_generator import ResidualBlock


class StarGANGenerator(nn.Module):
  """Maps [B, *space, C] and target labels [B] int32 to [B, *space, out_channels] in -1..1.

  The label enters as one-hot maps beside the image; a label outside 0..labels-1 gives zero maps.
  Convolutions pad with zeros: under reflection the constant maps add a constant to each channel,
  which instance norm subtracts, and the label is lost. No bias, affine instance norm. With the
  defaults: 8,414,848 parameters 1 -> 1. The output is float32. Raises UserError for a size that is
  not a multiple of 4 and labels of another shape.

  Attributes:
    out_channels: channels of the image made.
    labels: number of modalities.
    base: channels at full size.
    blocks: number of residual blocks.
    upsampling: "transposed" (as published), or "resize": repetition and a 3x3 convolution, against
      checkerboard patterns.
    initializer: see `conv.kernel_init`.
    dtype: computing type; parameters and output are float32.
  """

  out_channels: int = 1
  labels: int = 4
  base: int = 64
  blocks: int = 6
  upsampling: str = "transposed"
  initializer: str = "torch"
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return 4

  @nn.compact
  def __call__(self, x, label):
    check_size("the StarGAN generator", x.shape[1:-1], self.factor)
    if label.shape != x.shape[:1]:
      raise UserError(f"labels of shape {label.shape} for {len(x)} images: give one for each image")
    wide = {"kernel_size": 7, "padding": 3, "bias": False, "initializer": self.initializer}
    strided = {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False,
               "initializer": self.initializer, "dtype": self.dtype}

    def normed(y):
      return nn.relu(norm_layer("affine_instance", self.initializer, self.dtype)(y))

    maps = jax.nn.one_hot(label, self.labels, dtype=x.dtype)
    maps = maps.reshape(len(x), *(1,) * (x.ndim - 2), self.labels)
    x = jnp.concatenate([x, jnp.broadcast_to(maps, (*x.shape[:-1], self.labels))], -1)
    x = normed(Conv(self.base, dtype=self.dtype, name="stem", **wide)(x))
    for level in (1, 2):
      x = normed(Conv(self.base * 2**level, name=f"down_{level}", **strided)(x))
    for index in range(self.blocks):
      x = ResidualBlock("affine_instance", "zero", self.initializer, 0.0, True, self.dtype,
                        bias=False, name=f"block_{index}")(x)
    for level in (1, 0):
      width = self.base * 2**level
      if self.upsampling == "transposed":
        x = ConvTranspose(width, name=f"up_{level}", **strided)(x)
      elif self.upsampling == "resize":
        x = Conv(width, enlarged=True, bias=False, initializer=self.initializer, dtype=self.dtype,
                 name=f"up_{level}")(x)
      else:
        raise UserError(f"upsampling={self.upsampling!r}: choose 'transposed' or 'resize'")
      x = normed(x)
    return head(x, self.out_channels, "tanh", **wide)


class StarGANDiscriminator(nn.Module):
  """Maps [B, *space, C] to patch logits [B, *small, 1] and class logits [B, labels].

  Strided 4x4 convolutions, leaky ReLU (0.01), no norm, so that a gradient penalty judges each
  example alone. The class head sees the whole remaining map, so its parameters fit the size of the
  image that they were made for. Parameters for one channel and four labels: 44,751,808 at 128x128,
  44,792,768 at 240x240 (a 3x3 map), 44,850,112 at 256x256. Both heads compute in float32. Raises
  UserError where nothing of the map would be left.

  Attributes:
    labels: number of modalities.
    base: channels of the first level; they double at each level.
    layers: number of strided convolutions.
    initializer: see `conv.kernel_init`.
    dtype: computing type; parameters and output are float32.
  """

  labels: int = 4
  base: int = 64
  layers: int = 6
  initializer: str = "torch"
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return 1  # any size down to `min_size` will do

  @property
  def min_size(self) -> int:
    """The smallest side that leaves an output: each convolution halves, rounding down."""
    return 2**self.layers

  @nn.compact
  def __call__(self, x):
    if min(x.shape[1:-1]) < self.min_size:
      raise UserError(
        f"image side {min(x.shape[1:-1])}: a StarGAN discriminator of {self.layers} strided layers "
        f"needs {self.min_size} or more; set a larger data.size or fewer layers"
      )
    for level in range(self.layers):
      x = Conv(self.base * 2**level, kernel_size=4, stride=2, padding=1, dtype=self.dtype,
               initializer=self.initializer, name=f"conv_{level}")(x)
      x = nn.leaky_relu(x, 0.01)
    x = x.astype(jnp.float32)
    # A convolution over the whole map is one matrix product.
    classes = nn.Dense(self.labels, use_bias=False, kernel_init=kernel_init(self.initializer),
                       name="class_head")(x.reshape(len(x), -1))
    return head(x, 1, "none", padding=1, bias=False, initializer=self.initializer), classes
