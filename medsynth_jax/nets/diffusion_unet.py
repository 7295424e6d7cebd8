"""The U-Net of diffusion models: image and noise level in, the predicted quantity out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medsynth_jax.errors import UserError
from medsynth_jax.nets.blocks import (
  ZEROS,
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

MAX_LOG_SNR = 20.0
EMBEDDINGS = ("log_snr", "gamma_1000")


def level_time(level: jax.Array, kind: str) -> jax.Array:
  """The log-SNR [B] as a "time" in 0..1000, which sinusoids of periods 6 to 60,000 resolve.

  "log_snr": linear, of the log-SNR cut to +-20 (so infinite ones are fine). "gamma_1000": 1000
  times the share of the signal's variance. Palette feeds that share itself, 0..1, to the same
  sinusoids, all but a few of which are then constant. Raises UserError for another kind.
  """
  if kind == "log_snr":
    return (jnp.clip(level, -MAX_LOG_SNR, MAX_LOG_SNR) + MAX_LOG_SNR) * (500 / MAX_LOG_SNR)
  if kind == "gamma_1000":
    return 1000 * nn.sigmoid(level)
  raise UserError(f"embedding={kind!r}: choose one of {', '.join(EMBEDDINGS)}")


def sinusoids(time: jax.Array, width: int) -> jax.Array:
  """Cosines and sines [B, width] of `time` at frequencies 1 to 1/10000 (Vaswani et al. 2017)."""
  half = width // 2
  frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
  angle = time.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


class Embedding(nn.Module):
  """The noise level, and the category if there are classes, as one vector [B, 4 * width]."""

  width: int
  kind: str
  classes: int

  @nn.compact
  def __call__(self, level, category):
    y = dense(4 * self.width, jnp.float32, "dense_0")(
      sinusoids(level_time(level, self.kind), self.width))
    y = dense(4 * self.width, jnp.float32, "dense_1")(nn.silu(y))
    if not self.classes:
      return y
    if category is None:
      raise UserError(f"the diffusion U-Net has {self.classes} classes and needs a category")
    table = self.param("classes", nn.initializers.normal(1.0), (self.classes, 4 * self.width))
    # Indexing would clamp a wrong category to the last one without a word.
    return y + table.at[category].get(
      mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class DiffusionUNet(nn.Module):
  """Maps [B, *space, C] at log-SNR [B] to [B, *space, out_channels] (float32).

  The U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233) as Palette has it (Saharia et al. 2021,
  arXiv 2111.05826): with the defaults 62,637,889 parameters 2 -> 1 and 62,641,923 for 7 -> 3. With
  base=128, multiples=(1, 2, 4), attention=(2, 4), resampling="conv", scale_shift=False and
  classes=3 it is MONAI's of latent diffusion: 64,148,611 for 6 -> 3. One attention block always
  stands in the middle. The caller concatenates the noisy image and the condition. The output
  starts at zero.

  Raises UserError for a size that is not a multiple of `factor`, an attention factor that the
  network does not have, a category missing or not expected. A category outside 0..classes-1 gives
  NaN, since compiled code cannot raise.

  Attributes:
    out_channels: channels of the prediction.
    base: channels of the first level, and width of the level's sinusoids (even).
    multiples: channels of each level, in units of `base`.
    blocks: residual blocks a level; one more on the way up.
    attention: downsampling factors at which every block is followed by attention.
    heads: attention heads.
    attention_kernel: "xla", "cudnn" or "plain", see `blocks.attend`.
    groups: of the group norms, see `blocks.GroupNorm`.
    scale_shift: the embedding scales and shifts the norms; otherwise it is added.
    resampling: "residual" (residual blocks that halve and double) or "conv" (convolutions).
    classes: categories, 0 for none.
    dropout: rate inside residual blocks in training (rng "dropout").
    embedding: how the noise level enters, see `level_time`.
    remat: computes blocks again for the gradient: less memory, more time, the same result.
    dtype: computing type; parameters, norm statistics and output are float32.
  """

  out_channels: int = 1
  base: int = 64
  multiples: Sequence[int] = (1, 2, 4, 8)
  blocks: int = 2
  attention: Sequence[int] = ()
  heads: int = 1
  attention_kernel: str = "xla"
  groups: int = 32
  scale_shift: bool = True
  resampling: str = "residual"
  classes: int = 0
  dropout: float = 0.0
  embedding: str = "log_snr"
  remat: bool = False
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return 2 ** (len(self.multiples) - 1)

  def _check(self, x, category):
    check_size("the diffusion U-Net", x.shape[1:-1], self.factor)
    factors = [2**level for level in range(len(self.multiples))]
    for factor in self.attention:
      if factor not in factors:
        raise UserError(f"attention={tuple(self.attention)}: the network has no level of "
                        f"downsampling factor {factor}; choose among {factors}")
    if self.resampling not in ("residual", "conv"):
      raise UserError(f"resampling={self.resampling!r}: choose 'residual' or 'conv'")
    if category is not None and not self.classes:
      raise UserError("a category is given, but the diffusion U-Net has classes=0")

  @nn.compact
  def __call__(self, x, level, category=None, deterministic: bool = True):
    self._check(x, category)
    embedding = Embedding(self.base, self.embedding, self.classes, name="embedding")(
      level, category)
    residual = partial(
      rematerialised(ResidualBlock, self.remat), groups=self.groups, dropout=self.dropout,
      scale_shift=self.scale_shift, deterministic=deterministic, dtype=self.dtype)
    attend = partial(rematerialised(Attention, self.remat), self.heads, self.groups, self.dtype,
                     self.attention_kernel)

    def stage(x, level, index, way):
      name = f"{way}_{level}_{index}"
      x = residual(self.base * self.multiples[level], name=name)(x, embedding)
      return attend(name=f"{name}_attention")(x) if 2**level in self.attention else x

    def resample(x, level, way):
      name = f"{way}_{level}_resample"
      if self.resampling == "residual":
        return residual(x.shape[-1], resample=way, name=name)(x, embedding)
      return (Downsample if way == "down" else Upsample)(dtype=self.dtype, name=name)(x)

    last = len(self.multiples) - 1
    x = Conv(self.base * self.multiples[0], dtype=self.dtype, name="conv_in")(x)
    skips = [x]
    for depth in range(last + 1):
      for index in range(self.blocks):
        x = stage(x, depth, index, "down")
        skips.append(x)
      if depth < last:
        x = resample(x, depth, "down")
        skips.append(x)
    x = residual(x.shape[-1], name="middle_0")(x, embedding)
    x = attend(name="middle_attention")(x)
    x = residual(x.shape[-1], name="middle_1")(x, embedding)
    for depth in range(last, -1, -1):
      for index in range(self.blocks + 1):
        x = stage(jnp.concatenate([x, skips.pop()], -1), depth, index, "up")
      if depth:
        x = resample(x, depth, "up")
    x = nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(x))
    return head(x, self.out_channels, "none", initializer=ZEROS)
