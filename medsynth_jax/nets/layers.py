"""What networks put between convolutions: norms, activations, pooling, upsampling, size checks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import Conv

NORMS = ("none", "instance", "affine_instance")


class InstanceNorm(nn.Module):
  """Zero mean and unit variance of each channel of each example over space, [B, *space, C].

  Statistics are float32 and come from the input alone (nothing is kept between batches), so that
  training and synthesis compute the same function. Raises UserError where the map has a single
  position, because its output would be zero whatever the input.

  Attributes:
    affine: a learned scale and offset for each channel.
    scale_sd: the scale starts at N(1, scale_sd^2).
    epsilon: added to the variance.
    dtype: type of the output.
  """

  affine: bool = True
  scale_sd: float = 0.0
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    axes = tuple(range(1, x.ndim - 1))
    if all(size == 1 for size in x.shape[1:-1]):
      raise UserError(
        "image size: the network shrinks it to one position, over which instance normalisation "
        "gives zeros; use a larger size or fewer levels"
      )
    y = x.astype(jnp.float32)
    y = y - y.mean(axes, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + self.epsilon)
    if self.affine:
      def scale_init(key, shape, dtype):
        return 1 + self.scale_sd * jax.random.normal(key, shape, dtype)

      y = y * self.param("scale", scale_init, x.shape[-1:], jnp.float32)
      y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
    return y.astype(self.dtype)


def norm_layer(kind: str, init: str, dtype) -> Callable:
  """The normalisation called "none", "instance" or "affine_instance".

  With a "normal_<sd>" or "truncated_<sd>" init the scale starts at N(1, sd^2), as pix2pix does.
  """
  if kind not in NORMS:
    raise UserError(f"norm={kind!r}: choose one of {', '.join(NORMS)}")
  if kind == "none":
    return lambda x: x
  name, _, sd = init.partition("_")
  scale_sd = float(sd) if name in ("normal", "truncated") else 0.0
  return InstanceNorm(affine=kind == "affine_instance", scale_sd=scale_sd, dtype=dtype)


def activation(name: str) -> Callable:
  """The function called "none", "relu", "leaky_relu_<slope>", "silu" or "tanh"."""
  known = {"none": lambda x: x, "relu": nn.relu, "silu": nn.silu, "tanh": jnp.tanh}
  if name in known:
    return known[name]
  head, _, slope = name.rpartition("_")
  if head == "leaky_relu":
    try:
      return partial(nn.leaky_relu, negative_slope=float(slope))
    except ValueError:
      pass
  raise UserError(
    f"activation={name!r}: choose 'none', 'relu', 'leaky_relu_<slope>', 'silu' or 'tanh'"
  )


def max_pool(x):
  """Halves every spatial axis of [B, *space, C] by the largest of each 2x2(x2) block."""
  # Not `nn.max_pool`: its gradient (select-and-scatter) is slow on the CPU.
  shape = [x.shape[0]]
  for size in x.shape[1:-1]:
    shape += [size // 2, 2]
  return x.reshape(*shape, x.shape[-1]).max(axis=tuple(range(2, 2 * x.ndim - 3, 2)))


def upsample(x, method: str = "nearest"):
  """Doubles every spatial axis of [B, *space, C]; "nearest" or "linear" (half-pixel centres)."""
  shape = (x.shape[0], *(2 * size for size in x.shape[1:-1]), x.shape[-1])
  return jax.image.resize(x, shape, method)


def head(x, out_channels: int, activation_name: str, **options):
  """The last convolution: computed and returned in float32, whatever the network computes in."""
  x = Conv(out_channels, dtype=jnp.float32, name="head", **options)(x.astype(jnp.float32))
  return activation(activation_name)(x)


def check_size(network: str, space: Sequence[int], factor: int) -> None:
  """Raises UserError unless every spatial size is a positive multiple of `factor`."""
  if any(size < factor or size % factor for size in space):
    shown = "x".join(map(str, space))
    raise UserError(
      f"image size {shown}: {network} needs every side to be a multiple of {factor}; "
      "set data.size accordingly"
    )
