"""The autoencoder of latent diffusion, with a Gaussian posterior over the latents."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from medsynth_jax.nets.blocks import (
  Attention,
  Downsample,
  GroupNorm,
  ResidualBlock,
  Upsample,
  dense,
  rematerialised,
)
from medsynth_jax.nets.conv import Conv
from medsynth_jax.nets.layers import check_size, head


class _Side(nn.Module):
  """What encoder and decoder share: their fields and blocks."""

  channels: Sequence[int]
  blocks: int
  latent_channels: int
  attention: bool
  attention_kernel: str
  groups: int
  remat: bool
  dtype: Any

  def residual(self, x, features, name):
    block = rematerialised(ResidualBlock, self.remat)
    return block(features, self.groups, dtype=self.dtype, name=name)(x)

  def middle(self, x):
    if not self.attention:
      return x
    x = self.residual(x, x.shape[-1], "middle_0")
    attend = rematerialised(Attention, self.remat)
    x = attend(groups=self.groups, dtype=self.dtype, kernel=self.attention_kernel,
               name="middle_attention")(x)
    return self.residual(x, x.shape[-1], "middle_1")

  def last(self, x, features):
    return head(GroupNorm(self.groups, self.dtype, name="norm_out")(x), features, "none")


class Encoder(_Side):
  """[B, *space, 1] to mean and log-variance [B, *space / factor, latent_channels]."""

  @nn.compact
  def __call__(self, x):
    x = Conv(self.channels[0], dtype=self.dtype, name="conv_in")(x)
    for level, width in enumerate(self.channels):
      for index in range(self.blocks):
        x = self.residual(x, width, f"down_{level}_{index}")
      if level < len(self.channels) - 1:
        x = Downsample("same", self.dtype, name=f"down_{level}_resample")(x)
    x = self.last(self.middle(x), self.latent_channels)
    return tuple(
      dense(self.latent_channels, jnp.float32, name)(x) for name in ("mean", "log_variance"))


class Decoder(_Side):
  """Latents to the image [B, *space, 1]."""

  @nn.compact
  def __call__(self, z):
    x = dense(self.latent_channels, jnp.float32, "latent")(z)
    x = Conv(self.channels[-1], dtype=self.dtype, name="conv_in")(x)
    x = self.middle(x)
    for level in range(len(self.channels) - 1, -1, -1):
      for index in range(self.blocks):
        x = self.residual(x, self.channels[level], f"up_{level}_{index}")
      if level:
        x = Upsample(dtype=self.dtype, name=f"up_{level}_resample")(x)
    return self.last(x, 1)


class AutoencoderKL(nn.Module):
  """Images [B, *space, 1] to Gaussians over latents [B, *space / factor, latent_channels] and back.

  Rombach et al. 2022 (arXiv 2112.10752) in MONAI's layout: 7,040,232 parameters with the defaults
  (factor 4); 49,095,080 with channels (128, 256, 512) and attention; 72,710,593 with (128, 256,
  512, 512), attention and 4 latent channels (factor 8). Raises UserError for an image size that is
  not a multiple of `factor`.

  Attributes:
    channels: channels of each level; the image shrinks by 2 between levels.
    blocks: residual blocks a level.
    latent_channels: channels of the latents.
    attention: one attention block between two residual ones at the coarsest level.
    attention_kernel: "xla", "cudnn" or "plain", see `blocks.attend`.
    groups: of the group norms, see `blocks.GroupNorm`.
    remat: computes blocks again for the gradient: less memory, more time, the same result.
    dtype: computing type; parameters, moments and image are float32.
  """

  channels: Sequence[int] = (64, 128, 256)
  blocks: int = 2
  latent_channels: int = 3
  attention: bool = False
  attention_kernel: str = "xla"
  groups: int = 32
  remat: bool = False
  dtype: Any = jnp.float32

  def setup(self):
    fields = (self.channels, self.blocks, self.latent_channels, self.attention,
              self.attention_kernel, self.groups, self.remat, self.dtype)
    self.encoder, self.decoder = Encoder(*fields), Decoder(*fields)

  @property
  def factor(self) -> int:
    return 2 ** (len(self.channels) - 1)

  def encode(self, x):
    """Mean and standard deviation of the latents; the log-variance is clipped to -30..20."""
    check_size("the autoencoder", x.shape[1:-1], self.factor)
    mean, log_variance = self.encoder(x)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))

  def decode(self, z):
    """The image of latents, without a final activation: the caller clips to [-1, 1]."""
    return self.decoder(z)

  def __call__(self, x):
    """The image decoded from the posterior's mean."""
    mean, _ = self.encode(x)
    return self.decode(mean)
