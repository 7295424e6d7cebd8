"""Discriminators that judge overlapping patches: each output value sees one patch of the input."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import Conv
from medsynth_jax.nets.layers import head, norm_layer


def receptive_field(kernel_size: int, strides: Sequence[int]) -> int:
  """Pixels of the input, along one axis, that one output value of stacked convolutions sees."""
  field = 1
  for stride in reversed(strides):
    field = (field - 1) * stride + kernel_size
  return field


class PatchGAN(nn.Module):
  """pix2pix's discriminator (arXiv 1611.07004, appendix 6.1.2): [B, *space, C] to patch logits.

  The default sees 70x70 patches and turns 256x256 into 30x30x1 float32 values; parameters:
  2,764,609 for two input channels, 2,766,657 for four (affine), 2,762,689 for one (not affine).
  Raises UserError where the image is too small for one patch value.

  Attributes:
    base: channels of the first level; they double at each level up to 8 * base.
    n_layers: number of strided convolutions.
    norm: "affine_instance" (convolutions under it have no bias), "instance" or "none".
    pooled: the logits are averaged to one for each example, [B, 1, .., 1], as RegGAN does.
    initializer: see `conv.kernel_init`.
    dtype: computing type; parameters and output are float32.
  """

  base: int = 64
  n_layers: int = 3
  norm: str = "affine_instance"
  pooled: bool = False
  initializer: str = "normal_0.02"
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return 1  # any size down to `min_size` will do

  @property
  def strides(self) -> tuple[int, ...]:
    return (2,) * self.n_layers + (1, 1)

  @property
  def receptive_field(self) -> int:
    return receptive_field(4, self.strides)

  @property
  def min_size(self) -> int:
    """The smallest side that leaves an output: 3 positions after the strided convolutions."""
    return 3 * 2**self.n_layers

  @nn.compact
  def __call__(self, x):
    if min(x.shape[1:-1]) < self.min_size:
      raise UserError(
        f"image side {min(x.shape[1:-1])}: a PatchGAN of {self.n_layers} strided layers needs "
        f"{self.min_size} or more; set a larger data.size or fewer layers"
      )
    bias = self.norm != "affine_instance"
    for level, stride in enumerate(self.strides[:-1]):
      width = self.base * min(2**level, 8)
      x = Conv(width, kernel_size=4, stride=stride, padding=1, bias=bias or level == 0,
               initializer=self.initializer, dtype=self.dtype, name=f"conv_{level}")(x)
      if level:
        x = norm_layer(self.norm, self.initializer, self.dtype)(x)
      x = nn.leaky_relu(x, 0.2)
    logits = head(x, 1, "none", kernel_size=4, padding=1, initializer=self.initializer)
    return logits.mean(range(1, x.ndim - 1), keepdims=True) if self.pooled else logits


class MultiScalePatchGAN(nn.Module):
  """A PatchGAN for the image and one for each smaller centre crop: a tuple of their logits.

  As in CTA-GAN, the crops have half the side of the one before and are not shrunk: the image's
  middle counts more. `over_scales` sums a loss over the logits by `weights`. Raises UserError where
  the smallest crop is too small for one patch value.

  Attributes:
    weights: one for each scale, the full image first.
    base, n_layers, norm, pooled, initializer, dtype: of each `PatchGAN`.
  """

  weights: Sequence[float] = (1.8, 0.2)
  base: int = 64
  n_layers: int = 3
  norm: str = "instance"
  pooled: bool = False
  initializer: str = "torch"
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return 1

  @property
  def min_size(self) -> int:
    """The smallest side whose smallest crop leaves an output."""
    return PatchGAN(n_layers=self.n_layers).min_size * 2 ** (len(self.weights) - 1)

  @nn.compact
  def __call__(self, x):
    if min(x.shape[1:-1]) < self.min_size:
      raise UserError(
        f"image side {min(x.shape[1:-1])}: a PatchGAN of {len(self.weights)} scales with "
        f"{self.n_layers} strided layers needs {self.min_size} or more; set a larger data.size, "
        "fewer layers or fewer weights"
      )
    logits = []
    for scale in range(len(self.weights)):
      net = PatchGAN(self.base, self.n_layers, self.norm, self.pooled, self.initializer, self.dtype,
                     name=f"scale_{scale}")
      logits.append(net(x))
      middle = (slice((n - n // 2) // 2, (n - n // 2) // 2 + n // 2) for n in x.shape[1:-1])
      x = x[(slice(None), *middle)]
    return tuple(logits)


class SpineDiscriminator(nn.Module):
  """The patch discriminator of Lee et al. 2020 (spine CT to MR): [B, *space, C] to patch logits.

  Two unstrided and five strided 4x4 convolutions with "same" padding; the paper gives this count,
  kernel and widths are chosen here. 7,027,073 parameters for two input channels; sees 193 pixels;
  256x256 gives 8x8x1 float32 values. Convolutions keep their bias beside the affine norm.

  Attributes:
    base: channels of the first level.
    multiples: channels of the strided levels, in units of `base`.
    initializer: see `conv.kernel_init`.
    dtype: computing type; parameters and output are float32.
  """

  base: int = 64
  multiples: Sequence[int] = (1, 2, 4, 8, 8)
  initializer: str = "truncated_0.02"
  dtype: Any = jnp.float32

  @property
  def factor(self) -> int:
    return 1

  @property
  def strides(self) -> tuple[int, ...]:
    return (1, *(2 for _ in self.multiples), 1)

  @property
  def receptive_field(self) -> int:
    return receptive_field(4, self.strides)

  @nn.compact
  def __call__(self, x):
    options = {"kernel_size": 4, "padding": "same", "initializer": self.initializer}
    for level, multiple in enumerate((1, *self.multiples)):
      x = Conv(self.base * multiple, stride=self.strides[level], dtype=self.dtype,
               name=f"conv_{level}", **options)(x)
      if level:
        x = norm_layer("affine_instance", self.initializer, self.dtype)(x)
      x = nn.leaky_relu(x, 0.2)
    return head(x, 1, "none", **options)


def over_scales(discriminator: nn.Module, logits, loss: Callable) -> jax.Array:
  """`loss` of a discriminator's logits: of several scales the sum, weighted by its `weights`."""
  weights = getattr(discriminator, "weights", None)
  if weights is None:
    return loss(logits)
  return sum(weight * loss(scale) for weight, scale in zip(weights, logits, strict=True))
