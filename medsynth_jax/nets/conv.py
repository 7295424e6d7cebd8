"""Convolutions in 2-D and 3-D with PyTorch's geometry, and with fast weight gradients on the CPU.

XLA on the CPU runs 2-D convolutions at about the speed of a matrix product, with two exceptions:
the weight gradient of a transposed convolution and that of a convolution to few channels; and its
3-D convolutions are slow altogether. The cure rewrites those cases: `cured_conv`,
`cured_conv_transpose`. It changes rounding only, but has no forward-mode derivative.
"""

import contextlib
import contextvars
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from medsynth_jax.errors import UserError

FEW_CHANNELS = 16  # at or below this many outputs XLA's weight gradient is the slow one

_cure = contextvars.ContextVar("cure", default="auto")


@contextlib.contextmanager
def cure_setting(setting: str):
  """Sets "auto", "on" or "off" for all convolutions traced inside (compiled code keeps its own)."""
  if setting not in ("auto", "on", "off"):
    raise UserError(f"cure={setting!r}: choose 'auto', 'on' or 'off'")
  token = _cure.set(setting)
  try:
    yield
  finally:
    _cure.reset(token)


def cured(setting: str | None = None) -> bool:
  """Whether the cure is on: a layer's own setting, else `cure_setting`; "auto" means on the CPU."""
  setting = setting or _cure.get()
  return jax.default_backend() == "cpu" if setting == "auto" else setting == "on"


# ---- The operations. `pads` and `stride` are tuples with one entry for each spatial axis. ----


def _dimension_numbers(rank: int):
  space = "DHW"[-rank:]
  return f"N{space}C", f"{space}IO", f"N{space}C"


def plain_conv(x, kernel, stride, pads):
  """Cross-correlation of x [B, *space, I] with kernel [*k, I, O], zeros around it."""
  return lax.conv_general_dilated(
    x, kernel, stride, pads, dimension_numbers=_dimension_numbers(x.ndim - 2)
  )


def plain_conv_transpose(x, kernel, stride, pads):
  """The adjoint of a strided convolution: x [B, *space, I] and kernel [*k, O, I] give O channels.

  `pads` pad the stretched input: (k - 1 - p, k - 1 - p + op) in PyTorch's padding p and output
  padding op.
  """
  rank = x.ndim - 2
  flipped = jnp.flip(kernel, range(rank)).swapaxes(-1, -2)
  return lax.conv_general_dilated(
    x, flipped, (1,) * rank, pads, lhs_dilation=stride,
    dimension_numbers=_dimension_numbers(rank),
  )


def _few_channel_weight_gradient(x, g, k, stride, pads):
  """Weight gradient of a 2-D convolution to few channels, as one matrix product for all taps.

  Output gradients g are small, so they (not the input) are copied once for each tap, shifted.
  """
  config = [(0, 0, 0)]
  for size, out, tap, step, (low, _) in zip(x.shape[1:3], g.shape[1:3], k, stride, pads,
                                             strict=True):
    stretched = (out - 1) * step + 1
    config.append((tap - 1 - low, size + low - stretched, step - 1))
  g = lax.pad(g, jnp.zeros((), g.dtype), config + [(0, 0, 0)])
  rows, columns = x.shape[1:3]
  shifted = jnp.stack([
    g[:, k[0] - 1 - i:k[0] - 1 - i + rows, k[1] - 1 - j:k[1] - 1 - j + columns]
    for i in range(k[0]) for j in range(k[1])
  ], axis=3)
  gradient = jnp.einsum("bhwi,bhwto->tio", x, shifted, preferred_element_type=jnp.float32)
  return gradient.reshape(*k, x.shape[-1], g.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_to_few(x, kernel, stride, pads):
  return plain_conv(x, kernel, stride, pads)


def _conv_to_few_forward(x, kernel, stride, pads):
  return plain_conv(x, kernel, stride, pads), (x, kernel)


def _conv_to_few_backward(stride, pads, saved, g):
  x, kernel = saved
  _, pull = jax.vjp(lambda a: plain_conv(a, kernel, stride, pads), x)
  gradient = _few_channel_weight_gradient(x, g, kernel.shape[:2], stride, pads)
  return pull(g)[0], gradient.astype(kernel.dtype)


_conv_to_few.defvjp(_conv_to_few_forward, _conv_to_few_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_transpose(x, kernel, stride, pads):
  return plain_conv_transpose(x, kernel, stride, pads)


def _conv_transpose_forward(x, kernel, stride, pads):
  return plain_conv_transpose(x, kernel, stride, pads), (x, kernel)


def _conv_transpose_backward(stride, pads, saved, g):
  # <g, transpose(x, w)> = <conv(g, w), x>: both gradients are those of the strided convolution.
  x, kernel = saved
  k = kernel.shape[:-2]
  adjoint = []
  for size, out, tap, step, (low, _) in zip(x.shape[1:-1], g.shape[1:-1], k, stride, pads,
                                             strict=True):
    start = tap - 1 - low
    adjoint.append((start, (size - 1) * step + tap - out - start))
  conv = partial(plain_conv, stride=stride, pads=tuple(adjoint))
  forward, pull = jax.vjp(lambda w: conv(g, w), kernel)
  return forward, pull(x)[0]


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


def _merge(x):
  """[B, D, H, W, C] -> [B * D, H, W, C]."""
  return x.reshape(-1, *x.shape[2:])


def cured_conv(x, kernel, stride, pads):
  """`plain_conv` with the CPU's fast gradients; in 3-D a sum of 2-D ones over the depth taps."""
  if x.ndim == 4:
    few = kernel.shape[-1] <= FEW_CHANNELS
    return (_conv_to_few if few else plain_conv)(x, kernel, stride, pads)
  taps, step = kernel.shape[0], stride[0]
  x = jnp.pad(x, ((0, 0), pads[0], (0, 0), (0, 0), (0, 0)))
  depth = (x.shape[1] - taps) // step + 1
  total = 0
  for tap in range(taps):
    planes = lax.slice_in_dim(x, tap, tap + (depth - 1) * step + 1, step, axis=1)
    total += cured_conv(_merge(planes), kernel[tap], stride[1:], pads[1:])
  return total.reshape(x.shape[0], depth, *total.shape[1:])


def cured_conv_transpose(x, kernel, stride, pads):
  """`plain_conv_transpose` with the CPU's fast gradients; in 3-D a sum over the depth taps."""
  if x.ndim == 4:
    return _conv_transpose(x, kernel, stride, pads)
  (batch, depth), taps, step = x.shape[:2], kernel.shape[0], stride[0]
  low, high = pads[0]
  out = (depth - 1) * step + 1 + low + high - taps + 1
  total = 0
  for tap in range(taps):
    planes = cured_conv_transpose(_merge(x), kernel[tap], stride[1:], pads[1:])
    planes = planes.reshape(batch, depth, *planes.shape[1:])
    start = tap - (taps - 1 - low)  # where this tap puts the first input plane
    end = out - start - ((depth - 1) * step + 1)
    config = [(0, 0, 0), (start, end, step - 1)] + [(0, 0, 0)] * 3
    total += lax.pad(planes, jnp.zeros((), planes.dtype), config)
  return total


# ---- The layers. ----


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
