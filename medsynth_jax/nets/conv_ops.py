"""Convolution as XLA has it, and the same function rewritten for speed on the CPU.

Measured with jax 0.10.2 on 2 cores (tests/peers/bench_conv.py), XLA:CPU runs a 2-D convolution at
about the speed of a matrix product, except for:
  3x3 convolutions of many channels, made without Winograd's rule (up to 2.3 times slower, their
    weight gradients 1.5 to 3 times);
  transposed ones, most of whose products are with zeros (up to 2.5 times): phase by phase;
  repetition and 3x3 convolution (1.6 times): as a transposed one, which has fewer products;
  convolutions without any padding, such as those after reflection (2 to 4 times slower): one more
    row of zeros, its output cut away;
  maps of fewer positions than channels, whose kernels are large for what they do (2 to 30 times
    slower, transposed ones most): one matrix product, without a copy of the kernel in other order;
  weight gradients over more than about 1000 positions (3 to 5 times slower): summed over strips,
    or of 1x1, strided and other wide ones one product a tap (up to 5 times faster yet);
  weight gradients of transposed convolutions (20 times): written as those of the strided
    convolution that they transpose;
  convolutions to few channels and their weight gradients (2 to 30 times): one matrix product for
    all taps, then shifted sums;
  gradients inside `lax.cond` and `scan` (20 to 60 times; so too in 0.12): presumably XLA reorders
    their dimensions in the main computation only; here all operands are in order already;
  3-D convolutions (3 to 50 times): sums of 2-D ones over the depth taps.

`stride` and `pads` are tuples with one entry for each spatial axis; a pad is (low, high).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FEW_CHANNELS = 16
WIDE_CHANNELS = 128  # of input and output: 3x3 by Winograd's rule, other weight gradients by taps
WINOGRAD_TAPS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
WINOGRAD = np.kron(WINOGRAD_TAPS, WINOGRAD_TAPS).astype(np.float32)  # [16, 9]
SPLIT_CHANNELS = 32  # of the output of a transposed convolution that is made phase by phase
STRIP = 1024  # output positions (times batch) in one strip of a weight gradient
MAX_STRIPS = 32  # bounds the size of the compiled program


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


def transpose_pads(size, out, k, stride, pads):
  """Pads of the transposed convolution that maps `out` back to `size`, for a convolution's pads."""
  result = []
  for n, m, tap, step, (low, _) in zip(size, out, k, stride, pads, strict=True):
    start = tap - 1 - low
    result.append((start, n + tap - 2 - (m - 1) * step - start))
  return tuple(result)


def conv_pads(size, out, k, stride, pads):
  """Pads of the convolution that the transposed one from `size` to `out` transposes."""
  result = []
  for n, m, tap, step, (low, _) in zip(size, out, k, stride, pads, strict=True):
    start = tap - 1 - low
    result.append((start, (n - 1) * step + tap - m - start))
  return tuple(result)


def _pad(x, config):
  """Pads [B, H, W, C] by (low, high, interior) a spatial axis; negative numbers cut."""
  return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


def _padded_conv(x, kernel, stride, pads):
  """`plain_conv`, whose window passes the image's edge somewhere."""
  if any(map(any, pads)) or 1 in (x.shape[-1], *kernel.shape[:2]):
    return plain_conv(x, kernel, stride, pads)
  rows = (x.shape[1] - kernel.shape[0]) // stride[0] + 1
  return plain_conv(x, kernel, stride, ((0, stride[0]), (0, 0)))[:, :rows]


def _is_small(positions, kernel_shape) -> bool:
  """Whether a map (batch and space) has fewer positions than channels."""
  return math.prod(positions) <= min(kernel_shape[-2:])


def _patches(x, out, k, stride, pads):
  """What a 2-D convolution of `out` positions sees: [B * out, k * k * I], in the kernel's order."""
  ends = [(m - 1) * step + 1 for m, step in zip(out, stride, strict=True)]
  x = _pad(x, [
    (low, end + tap - 1 - n - low, 0)
    for n, end, tap, (low, _) in zip(x.shape[1:3], ends, k, pads, strict=True)
  ])
  x = jnp.concatenate([x[:, :, j:j + ends[1]:stride[1]] for j in range(k[1])], -1)
  x = jnp.concatenate([x[:, i:i + ends[0]:stride[0]] for i in range(k[0])], -1)
  return x.reshape(-1, x.shape[-1])


def _small_forward(x, kernel, out, stride, pads):
  """2-D convolution to a small map."""
  patches = _patches(x, out, kernel.shape[:2], stride, pads)
  return (patches @ kernel.reshape(-1, kernel.shape[-1])).reshape(len(x), *out, -1)


def _small_transpose(x, kernel, stride, pads):
  """2-D transposed convolution of a small map: products for all taps, stretched, shifted, added."""
  y = jnp.einsum("bhwi,klOi->klbhwO", x, kernel)
  for taps, step, (low, high) in zip(kernel.shape[:2], stride, pads, strict=True):
    total = 0
    for i in range(taps):
      # The first product of a tap lands at low + i + 1 - taps; the ends may be cut.
      config = [(0, 0, 0)] * (y.ndim - 1)
      config[2] = (low + i + 1 - taps, high - i, step - 1)
      total += lax.pad(y[i], jnp.zeros((), y.dtype), config)
    y = total
  return y


def enlarging(kernel):
  """The transposed convolution of stride 2 that repeating each pixel, then [3, .., I, O], equals.

  Of an axis of taps (a, b, c) it has (c, b + c, a + b, a): less than half of the products.
  """
  for axis in range(kernel.ndim - 2):
    a, b, c = jnp.split(kernel, 3, axis)
    kernel = jnp.concatenate([c, b + c, a + b, a], axis)
  return kernel.swapaxes(-1, -2)


def _split_transpose(x, kernel, stride, pads):
  """2-D transposed convolution: the outputs of each phase are a convolution with every s-th tap."""
  k = kernel.shape[:2]
  flipped = jnp.flip(kernel, (0, 1)).swapaxes(-1, -2)
  out = [(n - 1) * step + low + high - tap + 2
         for n, tap, step, (low, high) in zip(x.shape[1:3], k, stride, pads, strict=True)]
  count = [-(-m // step) for m, step in zip(out, stride, strict=True)]

  def phase(*remainders):
    first = [(low - r) % step for r, step, (low, _) in zip(remainders, stride, pads, strict=True)]
    part = flipped[first[0]::stride[0], first[1]::stride[1]]
    # Output q * step + r begins at input q - start.
    starts = [(low - r - tap) // step
              for r, tap, step, (low, _) in zip(remainders, first, stride, pads, strict=True)]
    ends = [q - start + taps - 1 - n for q, start, taps, n in zip(
      count, starts, part.shape, x.shape[1:3], strict=False)]
    return plain_conv(x, part, (1, 1), tuple(zip(starts, ends, strict=True)))

  rows = [jnp.stack([phase(i, j) for j in range(stride[1])], 3) for i in range(stride[0])]
  y = jnp.stack(rows, 2).reshape(len(x), count[0] * stride[0], count[1] * stride[1], -1)
  return y[:, :out[0], :out[1]]


def _is_few(kernel_shape, stride) -> bool:
  *k, inputs, outputs = kernel_shape
  few = outputs <= FEW_CHANNELS and 8 * outputs <= inputs
  return few and all(step == 1 for step in stride) and k != [1] * len(k)


def _taps(k):
  return [(i, j) for i in range(k[0]) for j in range(k[1])]


def _few_forward(x, kernel, pads):
  """2-D convolution to few channels: the products are small, so they are shifted, not the input."""
  k = kernel.shape[:2]
  rows, columns = (
    n + sum(pad) - tap + 1 for n, pad, tap in zip(x.shape[1:3], pads, k, strict=True)
  )
  products = jnp.einsum("bhwi,tio->tbhwo", x, kernel.reshape(-1, *kernel.shape[2:]))
  total = 0
  for (i, j), product in zip(_taps(k), products, strict=True):
    product = _pad(product, [(low, high, 0) for low, high in pads])
    total += product[:, i:i + rows, j:j + columns]
  return total


def _few_weight_gradient(x, g, k, pads):
  """Its weight gradient: the output's gradient g is small, so it is shifted, not the input."""
  rows, columns = x.shape[1:3]
  g = _pad(g, [(*pad, 0) for pad in transpose_pads(x.shape[1:3], g.shape[1:3], k, (1, 1), pads)])
  shifted = jnp.stack([
    g[:, k[0] - 1 - i:k[0] - 1 - i + rows, k[1] - 1 - j:k[1] - 1 - j + columns]
    for i, j in _taps(k)
  ])
  gradient = jnp.einsum("bhwi,tbhwo->tio", x, shifted)
  return gradient.reshape(*k, x.shape[-1], g.shape[-1])


def _is_winograd(x, kernel_shape, stride) -> bool:
  wide = min(kernel_shape[2:]) >= WIDE_CHANNELS
  return wide and kernel_shape[:2] == (3, 3) and stride == (1, 1) and x.dtype == jnp.float32


def _winograd(x, kernel, pads):
  """2-D convolution of 3x3 taps in tiles of 2x2 outputs: 16 products a tile instead of 36.

  F(2x2, 3x3) of Lavin and Gray 2016, arXiv 1509.09308; its float32 rounding is that of XLA's. The
  latent diffusion U-Net of configs/cldm.py:paper compiles in 45 s with it, in 12 s without.
  """
  kernel = (WINOGRAD @ kernel.reshape(9, -1)).reshape(16, *kernel.shape[2:])
  return _winograd_products(x, [kernel[i] for i in range(16)], pads)


def _winograd_weight_gradient(x, g, pads):
  """Weight gradient of `_winograd`, which has as few products."""
  shape = x.shape[-1], g.shape[-1]
  transpose = jax.linear_transpose(lambda kernels: _winograd_products(x, kernels, pads),
                                   [jax.ShapeDtypeStruct(shape, x.dtype)] * 16)
  (kernels,) = transpose(g)
  return (WINOGRAD.T @ jnp.stack(kernels).reshape(16, -1)).reshape(3, 3, *shape)


def _winograd_products(x, kernels, pads):
  """`_winograd` from the 16 transformed kernels [I, O]."""
  rows, columns = (n + sum(pad) - 2 for n, pad in zip(x.shape[1:3], pads, strict=True))
  count = -(-rows // 2), -(-columns // 2)
  x = _pad(x, [(low, 2 * tiles + 2 - n - low, 0)
               for n, tiles, (low, _) in zip(x.shape[1:3], count, pads, strict=True)])

  def tiles(x, axis):
    """The transformed inputs of all tiles along an axis."""
    size = 2 * count[axis - 1] - 1
    a, b, c, d = (lax.slice_in_dim(x, i, i + size, 2, axis) for i in range(4))
    return a - c, b + c, c - b, b - d

  def outputs(a, b, c, d):
    """Of each tile the first and the second."""
    return a + b + c, b - c - d
  products = [
    outputs(*((tile.reshape(-1, x.shape[-1]) @ kernels[4 * i + j]).reshape(len(x), *count, -1)
              for j, tile in enumerate(tiles(row, 2))))
    for i, row in enumerate(tiles(x, 1))]
  (a, b), (c, d) = (outputs(*column) for column in zip(*products, strict=True))
  y = jnp.stack([jnp.stack([a, c], 3), jnp.stack([b, d], 3)], 2)
  return y.reshape(len(x), 2 * count[0], 2 * count[1], -1)[:, :rows, :columns]


def _is_by_taps(kernel_shape, stride) -> bool:
  """Whether one product a tap makes a weight gradient, or one pass over strips for all taps."""
  *k, inputs, outputs = kernel_shape
  narrow = WIDE_CHANNELS // 2 if max(stride) > 1 or max(k) == 1 else WIDE_CHANNELS
  return min(inputs, outputs) >= narrow


def _weight_gradient_by_taps(x, g, k, stride, pads):
  """Weight gradient of a 2-D convolution: the product of g and what each tap sees."""
  ends = [(m - 1) * step + 1 for m, step in zip(g.shape[1:3], stride, strict=True)]
  x = _pad(x, [(low, end + tap - 1 - n - low, 0)
               for n, end, tap, (low, _) in zip(x.shape[1:3], ends, k, pads, strict=True)])
  products = [
    jnp.einsum("bhwi,bhwo->io", x[:, i:i + ends[0]:stride[0], j:j + ends[1]:stride[1]], g)
    for i, j in _taps(k)]
  return jnp.stack(products).reshape(*k, x.shape[-1], g.shape[-1])


def _weight_gradient(x, g, k, stride, pads):
  """Weight gradient of a 2-D convolution, in the way that is fast for its size."""
  shape = (*k, x.shape[-1], g.shape[-1])
  if _is_small(g.shape[:3], shape):
    patches = _patches(x, g.shape[1:3], k, stride, pads)
    return (patches.T @ g.reshape(-1, g.shape[-1])).reshape(shape)
  if _is_winograd(x, shape, stride):
    return _winograd_weight_gradient(x, g, pads)
  if _is_by_taps(shape, stride):
    return _weight_gradient_by_taps(x, g, k, stride, pads)
  return _weight_gradient_in_strips(x, g, k, stride, pads)


def _weight_gradient_in_strips(x, g, k, stride, pads):
  """Weight gradient of a 2-D convolution, as a convolution summed over strips of rows."""
  batch, rows, columns = g.shape[:3]
  strips = min(rows, MAX_STRIPS, -(-batch * rows * columns // STRIP))
  height = -(-rows // strips)
  vertical, (left, right) = (
    (low, (m - 1) * step + tap - n - low) for n, m, tap, step, (low, _) in zip(
      x.shape[1:3], g.shape[1:3], k, stride, pads, strict=True))
  # Columns of zeros are left to the convolution, which is faster with them, most for batches.
  x = _pad(x, [(*vertical, 0), (0, min(right, 0), 0)])
  x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
  total = 0
  for top in range(0, rows, height):
    part = g[top:top + height]
    seen = x[:, top * stride[0]:(top + part.shape[0] - 1) * stride[0] + k[0]]
    total += lax.conv_general_dilated(
      seen, part, (1, 1), ((0, 0), (left, max(right, 0))), rhs_dilation=stride,
      dimension_numbers=_dimension_numbers(2)
    )
  return total.transpose(1, 2, 0, 3)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, stride, pads):
  if _is_few(kernel.shape, stride):
    return _few_forward(x, kernel, pads)
  out = tuple(
    (n + sum(pad) - tap) // step + 1
    for n, tap, step, pad in zip(x.shape[1:3], kernel.shape[:2], stride, pads, strict=True)
  )
  if _is_small((len(x), *out), kernel.shape):
    return _small_forward(x, kernel, out, stride, pads)
  if _is_winograd(x, kernel.shape, stride):
    return _winograd(x, kernel, pads)
  return _padded_conv(x, kernel, stride, pads)


def _conv_forward(x, kernel, stride, pads):
  return _conv(x, kernel, stride, pads), (x, kernel)


def _conv_backward(stride, pads, saved, g):
  x, kernel = saved
  k = kernel.shape[:2]
  back = transpose_pads(x.shape[1:3], g.shape[1:3], k, stride, pads)
  if _is_few(kernel.shape, stride):
    gradient = _few_weight_gradient(x, g, k, pads)
  else:
    gradient = _weight_gradient(x, g, k, stride, pads)
  return _conv_transpose(g, kernel, stride, back), gradient


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_transpose(x, kernel, stride, pads):
  if _is_small(x.shape[:3], kernel.shape):
    return _small_transpose(x, kernel, stride, pads)
  if _is_winograd(x, kernel.shape, stride):
    return _winograd(x, jnp.flip(kernel, (0, 1)).swapaxes(-1, -2), pads)
  if kernel.shape[-2] >= SPLIT_CHANNELS and min(kernel.shape[:2]) > max(stride) > 1:
    return _split_transpose(x, kernel, stride, pads)
  return plain_conv_transpose(x, kernel, stride, pads)


def _conv_transpose_forward(x, kernel, stride, pads):
  return _conv_transpose(x, kernel, stride, pads), (x, kernel)


def _conv_transpose_backward(stride, pads, saved, g):
  # <g, transpose(x, w)> = <conv(g, w), x>: both gradients are those of the strided convolution.
  x, kernel = saved
  k = kernel.shape[:2]
  back = conv_pads(x.shape[1:3], g.shape[1:3], k, stride, pads)
  return _conv(g, kernel, stride, back), _weight_gradient(g, x, k, stride, back)


_conv.defvjp(_conv_forward, _conv_backward)
_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


def _merge(x):
  """[B, D, H, W, C] -> [B * D, H, W, C]."""
  return x.reshape(-1, *x.shape[2:])


def cured_conv(x, kernel, stride, pads):
  """`plain_conv`, fast on the CPU; equal but for rounding; no forward-mode derivative."""
  if x.ndim == 4:
    return _conv(x, kernel, stride, pads)
  taps, step = kernel.shape[0], stride[0]
  x = jnp.pad(x, ((0, 0), pads[0], (0, 0), (0, 0), (0, 0)))
  depth = (x.shape[1] - taps) // step + 1
  total = 0
  for tap in range(taps):
    planes = lax.slice_in_dim(x, tap, tap + (depth - 1) * step + 1, step, axis=1)
    total += _conv(_merge(planes), kernel[tap], stride[1:], pads[1:])
  return total.reshape(x.shape[0], depth, *total.shape[1:])


def cured_conv_transpose(x, kernel, stride, pads):
  """`plain_conv_transpose`, fast on the CPU; as `cured_conv`."""
  if x.ndim == 4:
    return _conv_transpose(x, kernel, stride, pads)
  taps, step, (low, high) = kernel.shape[0], stride[0], pads[0]
  total = 0
  for tap in range(taps):
    planes = _conv_transpose(_merge(x), kernel[tap], stride[1:], pads[1:])
    planes = planes.reshape(*x.shape[:2], *planes.shape[1:])
    # The first input plane lands at low + tap + 1 - taps; the ends may be cut.
    start = low + tap + 1 - taps
    end = low + high + 1 - taps - start
    config = [(0, 0, 0), (start, end, step - 1)] + [(0, 0, 0)] * 3
    total += lax.pad(planes, jnp.zeros((), planes.dtype), config)
  return total
