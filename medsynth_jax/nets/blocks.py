"""What the diffusion U-Net and the autoencoder share: group norm, residual block, attention.

All take [B, *space, C], 2-D or 3-D by the rank of the input.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import Conv, enlarge, kernel_init

ZEROS = "normal_0"  # the initialiser of layers that start without effect


def shrink(x):
  """Halves every spatial axis of [B, *space, C] by the mean of each 2x2(x2) block."""
  shape = [x.shape[0]]
  for size in x.shape[1:-1]:
    shape += [size // 2, 2]
  return x.reshape(*shape, x.shape[-1]).mean(tuple(range(2, 2 * x.ndim - 3, 2)))


def groups_for(channels: int, groups: int) -> int:
  """The greatest common divisor of both: `groups` itself for the usual widths."""
  return math.gcd(channels, groups)


class GroupNorm(nn.Module):
  """Group normalisation (Wu and He 2018, arXiv 1803.08494) with float32 statistics.

  Channels that `groups` does not divide are split into gcd(groups, channels) groups, so that
  narrow networks work with the usual 32. With as many groups as channels the norm erases each
  channel's mean (it is an instance norm); narrow networks are better with fewer groups.

  `scale` and `shift` [B, C], where given, modulate the result: y * (1 + scale) + shift. Raises
  UserError where a group has one value, because its output would not depend on the input.

  Attributes:
    groups: groups wanted.
    dtype: type of the output; the computation is float32.
  """

  groups: int = 32
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, scale=None, shift=None):
    channels = x.shape[-1]
    groups = groups_for(channels, self.groups)
    weight = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    y, space = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
    if math.prod(x.shape[1:]) == groups:
      raise UserError(
        f"image size: the network shrinks it to one position, where group norm of {channels} "
        f"channels in {groups} groups gives zeros; use a larger size or fewer groups"
      )

    def per_channel(values):
      """[B, C], or [C] for all, beside [B, *space, C]."""
      return values.reshape(-1, *(1 for _ in space), channels)

    # Space is not flattened: on the CPU XLA sums products of a [1, positions, C] ten times slower.
    def average(z):
      """Over space, then over each group. A quarter faster than both at once."""
      z = z.mean(space).reshape(len(z), groups, -1).mean(-1)
      return per_channel(jnp.repeat(z, channels // groups, axis=-1))

    y = y - average(y)
    weight = weight * jax.lax.rsqrt(average(jnp.square(y)) + 1e-5)
    if scale is not None:
      weight = weight * (1 + per_channel(scale))
      bias = bias * (1 + per_channel(scale)) + per_channel(shift)
    return (y * weight + bias).astype(self.dtype)


def dense(features: int, dtype, name: str, initializer: str = "torch") -> nn.Dense:
  """A matrix over channels: the 1x1 convolution, whose weight gradient is faster this way."""
  return nn.Dense(features, dtype=dtype, kernel_init=kernel_init(initializer), name=name)


class ResidualBlock(nn.Module):
  """shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))), the second convolution starting at zero.

  The shortcut is a 1x1 convolution where the channels change. An embedding [B, E] enters between
  the convolutions: added, or as scale and shift of the second norm.

  Attributes:
    features: channels of the output.
    groups: see `GroupNorm`.
    resample: "none", or "up" or "down" by 2 (nearest, mean) before the first convolution and in
      the shortcut.
    scale_shift: the embedding modulates the norm instead of being added.
    dropout: rate before the second convolution (rng "dropout").
    deterministic: no dropout.
    dtype: computing type.
  """

  features: int
  groups: int = 32
  resample: str = "none"
  scale_shift: bool = False
  dropout: float = 0.0
  deterministic: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, embedding=None):
    y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm_0")(x))
    y = shrink(y) if self.resample == "down" else y
    y = Conv(self.features, enlarged=self.resample == "up", dtype=self.dtype, name="conv_0")(y)
    modulation = ()
    if embedding is not None:
      width = self.features * (2 if self.scale_shift else 1)
      code = dense(width, jnp.float32, "embedding")(nn.silu(embedding))
      if self.scale_shift:
        modulation = jnp.split(code, 2, axis=-1)
      else:
        y = y + code.reshape(len(y), *(1,) * (y.ndim - 2), -1).astype(y.dtype)
    y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm_1")(y, *modulation))
    y = nn.Dropout(self.dropout, deterministic=self.deterministic)(y)
    y = Conv(self.features, initializer=ZEROS, dtype=self.dtype, name="conv_1")(y)
    x = {"none": lambda x: x, "up": enlarge, "down": shrink}[self.resample](x).astype(self.dtype)
    if x.shape[-1] != self.features:
      x = dense(self.features, self.dtype, "shortcut")(x)
    return x + y


KERNELS = ("xla", "cudnn", "plain")


def attend(q, k, v, kernel: str):
  """Attention of [B, positions, heads, channels]; all kernels agree up to rounding.

  "xla" is `jax.nn.dot_product_attention`, "cudnn" its flash kernel on a GPU (elsewhere "xla"),
  "plain" the formula written out. All but cuDNN's keep positions^2 weights for the gradient.

  Raises UserError for another kernel, and for float32 or heads that cuDNN does not take: checked on
  every machine, so that a run made on one opens on all.
  """
  if kernel not in KERNELS:
    raise UserError(f"attention_kernel={kernel!r}: choose one of {', '.join(KERNELS)}")
  if kernel == "plain":
    logits = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = nn.softmax(logits / math.sqrt(q.shape[-1])).astype(v.dtype)
    return jnp.einsum("bhqk,bkhc->bqhc", weights, v)
  if kernel == "cudnn":
    if q.dtype == jnp.float32:
      raise UserError("attention_kernel='cudnn' computes in bfloat16: set config.dtype=bfloat16")
    if q.shape[-1] > 128 or q.shape[-1] % 8:
      raise UserError(f"attention_kernel='cudnn' takes heads of at most 128 channels, a multiple of"
                      f" 8, not {q.shape[-1]}: set the network's heads higher")
  use = "cudnn" if kernel == "cudnn" and jax.default_backend() == "gpu" else "xla"
  return jax.nn.dot_product_attention(q, k, v, implementation=use)


class Attention(nn.Module):
  """x + self-attention of all positions, the output projection starting at zero.

  Raises UserError where `heads` does not divide the channels, or `kernel` cannot do it.

  Attributes: as `ResidualBlock`, and
    heads: the number of attention heads.
    kernel: see `attend`.
  """

  heads: int = 1
  groups: int = 32
  dtype: Any = jnp.float32
  kernel: str = "xla"

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    if channels % self.heads:
      raise UserError(f"heads={self.heads} does not divide the {channels} channels under attention")
    y = GroupNorm(self.groups, self.dtype, name="norm")(x)
    y = dense(3 * channels, self.dtype, "qkv")(y.reshape(len(x), -1, channels))
    y = y.reshape(*y.shape[:2], 3, self.heads, channels // self.heads)
    y = attend(y[:, :, 0], y[:, :, 1], y[:, :, 2], self.kernel)
    y = dense(channels, self.dtype, "out", ZEROS)(y.reshape(*y.shape[:2], channels))
    return x + y.reshape(x.shape)


class Downsample(nn.Module):
  """Halves every spatial axis by a 3x3 convolution of stride 2; `padding` as in `conv.Conv`."""

  padding: int | str = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    return Conv(x.shape[-1], stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
  """Doubles every spatial axis by repetition and a 3x3 convolution."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    return Conv(x.shape[-1], enlarged=True, dtype=self.dtype, name="conv")(x)


def rematerialised(block: type[nn.Module], on: bool) -> type[nn.Module]:
  """The block, whose inner values are computed again for the gradient instead of kept if `on`."""
  return nn.remat(block) if on else block
