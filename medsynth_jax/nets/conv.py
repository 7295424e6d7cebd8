"""Convolution layers for 2-D and 3-D with PyTorch's geometry, initialisers by name, and the cure.

The cure is `conv_ops.cured_conv` and `cured_conv_transpose`, which are much faster on the CPU and
change rounding only; they have no forward-mode derivative.
"""

import contextlib
import contextvars
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv_ops import (
  SPLIT_CHANNELS,
  cured_conv,
  cured_conv_transpose,
  enlarging,
  plain_conv,
  plain_conv_transpose,
)

_cure = contextvars.ContextVar("cure", default="auto")


@contextlib.contextmanager
def cure_setting(setting: str):
  """Sets "auto", "on" or "off" for all convolutions traced inside (compiled code keeps its own)."""
  if setting not in ("auto", "on", "off"):
    raise UserError(f"conv_cure={setting!r}: choose 'auto', 'on' or 'off'")
  token = _cure.set(setting)
  try:
    yield
  finally:
    _cure.reset(token)


def cured(setting: str | None = None) -> bool:
  """Whether the cure is on: a layer's own setting, else `cure_setting`; "auto" means on the CPU.

  The devices of the mesh in use count: a pod's code can be compiled on a CPU (`pods`).
  """
  setting = setting or _cure.get()
  if setting != "auto":
    return setting == "on"
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device.platform if device else jax.default_backend()) == "cpu"


def kernel_init(name: str):
  """Initialiser by name: "normal_<sd>", "truncated_<sd>" (cut at 2 sd), "torch" or "kaiming".

  Raises UserError for any other name.
  """
  kind, _, sd = name.partition("_")
  try:
    if kind == "normal":
      return nn.initializers.normal(float(sd))
    if kind == "truncated":
      return nn.initializers.truncated_normal(float(sd))
  except ValueError:
    pass
  if name == "torch":
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
  if name == "kaiming":
    return nn.initializers.variance_scaling(2.0, "fan_in", "normal")
  raise UserError(
    f"initializer={name!r}: choose 'normal_<sd>', 'truncated_<sd>', 'torch' or 'kaiming'"
  )


def _bias_init(name: str, kernel_shape: Sequence[int]):
  if name != "torch":
    return nn.initializers.zeros
  fan_in = 1
  for size in kernel_shape[:-1]:
    fan_in *= size
  bound = fan_in**-0.5
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _each(value, rank: int, what: str) -> tuple[int, ...]:
  values = (value,) * rank if isinstance(value, int) else tuple(value)
  if len(values) != rank:
    raise UserError(f"{what}={value}: give one number or {rank}, one for each spatial axis")
  return values


def enlarge(x):
  """Doubles every spatial axis of [B, *space, C] by repetition."""
  # A broadcast: faster on the CPU than `jax.image.resize`, whose gradient scatters.
  shape, out = [x.shape[0]], [x.shape[0]]
  for size in x.shape[1:-1]:
    shape += [size, 2]
    out.append(2 * size)
  x = jnp.expand_dims(x, tuple(range(2, 2 * x.ndim - 3, 2)))
  return jnp.broadcast_to(x, (*shape, x.shape[-1])).reshape(*out, x.shape[-1])


def _parameters(module, x, kernel_shape):
  """Float32 kernel and bias (or None), and x, all in the layer's computing type."""
  kernel = module.param("kernel", kernel_init(module.initializer), kernel_shape, jnp.float32)
  bias = None
  if module.bias:
    init = _bias_init(module.initializer, kernel_shape)
    bias = module.param("bias", init, (module.features,), jnp.float32).astype(module.dtype)
  return x.astype(module.dtype), kernel.astype(module.dtype), bias


class Conv(nn.Module):
  """Convolution of [B, *space, I] to [B, *out, features], 2-D or 3-D by the input's rank.

  Attributes:
    features: output channels.
    kernel_size, stride: one number, or one for each spatial axis.
    padding: pixels on each side (PyTorch's meaning), or "same" (output = ceil(size / stride), the
      odd pixel at the end).
    padding_mode: "zero" or "reflect".
    enlarged: convolves what `enlarge` makes of the input; only with the defaults of those above.
    bias: adds a bias.
    initializer: see `kernel_init`; "torch" also draws the bias from U(+-1/sqrt(fan_in)).
    dtype: computing type; parameters are float32.
    cure: "auto", "on" or "off"; None follows `cure_setting`.
  """

  features: int
  kernel_size: int | Sequence[int] = 3
  stride: int | Sequence[int] = 1
  padding: int | str = "same"
  padding_mode: str = "zero"
  enlarged: bool = False
  bias: bool = True
  initializer: str = "torch"
  dtype: Any = jnp.float32
  cure: str | None = None

  @nn.compact
  def __call__(self, x):
    rank = x.ndim - 2
    k = _each(self.kernel_size, rank, "kernel_size")
    stride = _each(self.stride, rank, "stride")
    x, kernel, bias = _parameters(self, x, (*k, x.shape[-1], self.features))
    if self.enlarged:
      if (*k, *stride, self.padding, self.padding_mode) != (3,) * rank + (1,) * rank + (
          "same", "zero"):
        raise ValueError("enlarged: only a 3x3 convolution of stride 1 with 'same' zero padding")
      if cured(self.cure) and self.features >= SPLIT_CHANNELS:
        y = cured_conv_transpose(x, enlarging(kernel), (2,) * rank, ((2, 2),) * rank)
        return y if bias is None else y + bias
      x = enlarge(x)
    if self.padding == "same":
      pads = lax.padtype_to_pads(x.shape[1:-1], k, stride, "SAME")
    else:
      pads = ((self.padding, self.padding),) * rank
    if self.padding_mode == "reflect":
      x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="reflect")
      pads = ((0, 0),) * rank
    elif self.padding_mode != "zero":
      raise UserError(f"padding_mode={self.padding_mode!r}: choose 'zero' or 'reflect'")
    conv = cured_conv if cured(self.cure) else plain_conv
    y = conv(x, kernel, stride, tuple((int(low), int(high)) for low, high in pads))
    return y if bias is None else y + bias


class ConvTranspose(nn.Module):
  """Transposed convolution equal to PyTorch's, 2-D or 3-D by the input's rank.

  The size becomes (n - 1) * stride - 2 * padding + kernel_size + output_padding. The kernel is
  stored as that of the strided convolution that it transposes, [*k, features, I].

  Attributes: as `Conv`, but for `padding` and `output_padding`, which are PyTorch's.
  """

  features: int
  kernel_size: int | Sequence[int] = 4
  stride: int | Sequence[int] = 2
  padding: int = 1
  output_padding: int = 0
  bias: bool = True
  initializer: str = "torch"
  dtype: Any = jnp.float32
  cure: str | None = None

  @nn.compact
  def __call__(self, x):
    rank = x.ndim - 2
    k = _each(self.kernel_size, rank, "kernel_size")
    stride = _each(self.stride, rank, "stride")
    x, kernel, bias = _parameters(self, x, (*k, self.features, x.shape[-1]))
    starts = [size - 1 - self.padding for size in k]
    pads = tuple((start, start + self.output_padding) for start in starts)
    transpose = cured_conv_transpose if cured(self.cure) else plain_conv_transpose
    y = transpose(x, kernel, stride, pads)
    return y if bias is None else y + bias
