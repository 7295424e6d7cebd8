"""NIQE: how far the statistics of an image lie from those of a set of good images; lower is better.

Mittal, Soundararajan and Bovik, IEEE Signal Processing Letters 20(3), 2013. No reference is needed,
but a model: LIVE's of natural images, or one fitted here on real images of the target. Values under
two models, two block sizes or two scalings do not compare. Float64 NumPy, equal to LIVE's code but
for flat areas, where both add up the signs of rounding errors (up to 0.03).

Images are [H, W], volumes [n, H, W]. `data_range` is the top of their scale, which begins at 0: it
stands for grey level 255, and grey levels are rounded and clipped to 0..255 as in LIVE's uint8.
"""

import dataclasses
import functools
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import numpy as np
from scipy import ndimage, special

from medsynth_jax.metrics.similarity import gaussian

FEATURES = 36  # of a block: 18 at each of two scales
SLICES = 16  # at once in memory
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # whose products are looked at
HALF = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256  # MATLAB's imresize(x, 0.5)
SHAPES = np.arange(200, 10001) / 1000  # of the generalised Gaussian
RATIOS = np.exp(2 * special.gammaln(2 / SHAPES) - special.gammaln(1 / SHAPES)
                - special.gammaln(3 / SHAPES))  # E|x|^2 / E[x^2] of each, rising


class TooFewBlocks(ValueError):
  """An image without two blocks that show anything, or too few blocks for a model."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """Features of good images: their mean [36] and covariance [36, 36], and how they were taken.

  `block` pixels a side; of each image the blocks were used whose sharpness exceeds `sharpness`
  times its sharpest block's (0: all that are not flat). `images` were seen, `blocks` used (0 where
  that is not known).
  """
  mean: np.ndarray
  covariance: np.ndarray
  block: int
  sharpness: float
  images: int
  blocks: int = 0


@functools.cache
def live() -> Model:
  """LIVE's model of 125 natural images (assets/NOTICE)."""
  with resources.as_file(resources.files("medsynth_jax.metrics") / "assets/niqe_live.npz") as path:
    return load(path)


def save(model: Model, path: Path) -> None:
  """Writes a model as .npz, so that others can score by it."""
  np.savez_compressed(path, **dataclasses.asdict(model))


def load(path: Path) -> Model:
  """Reads what `save` has written."""
  with np.load(path) as found:
    return Model(**{name: x if x.ndim else x.item() for name, x in found.items()})


def fit(images: Iterable[np.ndarray], block_size: int, sharpness: float, data_range) -> Model:
  """A model of good images (or volumes, whose slices are images), one at a time in memory.

  TooFewBlocks where no more than 36 blocks show anything, which determine no covariance.
  """
  kept, count = [], 0
  for image in images:
    features, sharp = block_features(image, block_size, data_range)
    count += len(features)
    if features.size:
      kept.append(features[sharp > sharpness * sharp.max(1, keepdims=True)])
  rows = np.concatenate([np.zeros((0, FEATURES)), *kept])
  known = _known(rows)
  if len(known) <= FEATURES:
    raise TooFewBlocks(f"a NIQE model needs more than {FEATURES} blocks of {block_size} x"
                       f" {block_size} pixels that show anything; {count} images have {len(known)}")
  return Model(np.nanmean(rows, 0), np.cov(known, rowvar=False), block_size, sharpness, count,
               len(known))


def niqe(image, model: Model, data_range) -> float:
  """NIQE of one image [H, W]. TooFewBlocks (a ValueError) says how large it must be."""
  image = np.asarray(image)
  if image.ndim != 2:
    raise ValueError(f"niqe needs an image [H, W], got {image.shape}")
  return pooled(image[None], model, data_range)


def pooled(volume, model: Model, data_range) -> float:
  """NIQE of a volume [n, H, W] whose slices' blocks are taken as those of one image.

  TooFewBlocks where fewer than two of them show anything.
  """
  features, _ = block_features(volume, model.block, data_range)
  return _found([_score(features.reshape(-1, FEATURES), model)], model, np.shape(volume))


def slice_mean(volume, model: Model, data_range) -> float:
  """The mean of `niqe` over a volume's slices; those with fewer than two blocks are left out.

  A slice's few blocks tell little of its covariance, so that this lies above `pooled`.
  TooFewBlocks where no slice is left.
  """
  features, _ = block_features(volume, model.block, data_range)
  return _found([_score(rows, model) for rows in features], model, np.shape(volume))


def _score(rows: np.ndarray, model: Model) -> float:
  """The distance of blocks [n, 36] from the model; NaN where fewer than two show anything."""
  known = _known(rows)
  if len(known) < 2:
    return float("nan")
  away = model.mean - np.nanmean(rows, 0)
  between = np.linalg.pinv((model.covariance + np.cov(known, rowvar=False)) / 2)
  return float(np.sqrt(away @ between @ away))


def _found(values: list[float], model: Model, shape: tuple[int, ...]) -> float:
  """The mean of the values that are numbers; TooFewBlocks where none is."""
  values = [x for x in values if not np.isnan(x)]
  if not values:
    side, size = model.block, " x ".join(map(str, shape[-2:]))
    raise TooFewBlocks(f"NIQE needs two blocks of {side} x {side} pixels that show anything, as an"
                       f" image of {side} x {2 * side} holds; images of {size} have too few")
  return float(np.mean(values))


def _known(rows: np.ndarray) -> np.ndarray:
  """The blocks without NaN: in a flat block no distribution can be fitted."""
  return rows[~np.isnan(rows).any(1)]


# --- features --------------------------------------------------------------------------------


def block_features(images, block: int, data_range) -> tuple[np.ndarray, np.ndarray]:
  """(features [n, blocks, 36], sharpness [n, blocks]) of images [n, H, W] or one [H, W].

  Images are cut to whole blocks from their first row and column; `blocks` is 0 where none fits.
  NaN features in flat blocks. ValueError for an odd block size or another shape.
  """
  images = np.asarray(images)
  images = images[None] if images.ndim == 2 else images
  if images.ndim != 3 or block % 2:
    raise ValueError(f"NIQE needs images [n, H, W] and an even block, got {images.shape}, {block}")
  rows, columns = (n // block for n in images.shape[1:])
  if not rows * columns or not len(images):
    empty = np.zeros((len(images), 0))
    return np.zeros((*empty.shape, FEATURES)), empty
  images = images[:, :rows * block, :columns * block]
  parts = [_features(images[i:i + SLICES], block, data_range)
           for i in range(0, len(images), SLICES)]
  return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _features(images: np.ndarray, block: int, data_range) -> tuple[np.ndarray, np.ndarray]:
  grey = np.clip(np.rint(images.astype(np.float64) * (255 / data_range)), 0, 255)
  contrast, spread = _normalised(grey)
  small, _ = _normalised(_halved(grey))
  blocks = _cut(contrast, block), _cut(small, block // 2)
  features = np.concatenate([_statistics(b) for b in blocks], -1)
  return (features.reshape(len(images), -1, FEATURES),
          _cut(spread, block).mean((1, 2)).reshape(len(images), -1))


def _cut(images: np.ndarray, block: int) -> np.ndarray:
  """Images [n, H, W] of whole blocks as [n * blocks, block, block]."""
  n, height, width = images.shape
  parts = images.reshape(n, height // block, block, width // block, block)
  return parts.swapaxes(2, 3).reshape(-1, block, block)


def _normalised(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(grey levels less their local mean, by their local deviation + 1; that deviation)."""
  taps = gaussian(7, 7 / 6)
  def local(x):
    for axis in (1, 2):
      x = ndimage.correlate1d(x, taps, axis=axis, mode="nearest")
    return x
  mean = local(grey)
  spread = np.sqrt(np.abs(local(grey * grey) - mean * mean))
  return (grey - mean) / (spread + 1), spread


def _halved(grey: np.ndarray) -> np.ndarray:
  """Images [n, H, W] of even sides at half their size, by MATLAB's antialiased bicubic."""
  for axis in (1, 2):
    x = np.moveaxis(grey, axis, 0)
    n = len(x) // 2
    x = np.pad(x, [(3, 5), (0, 0), (0, 0)], mode="symmetric")
    x = sum(tap * x[i:i + 2 * n:2] for i, tap in enumerate(HALF))
    grey = np.moveaxis(x, 0, axis)
  return grey


def _statistics(blocks: np.ndarray) -> np.ndarray:
  """The 18 features [n, 18] of blocks [n, b, b] at one scale."""
  shape, left, right = _asymmetric(blocks)
  found = [shape, (left + right) / 2]
  for shift in NEIGHBOURS:  # neighbours inside the block, its first row beside its last
    shape, left, right = _asymmetric(blocks * np.roll(blocks, shift, (1, 2)))
    mean = (right - left) * np.exp(special.gammaln(2 / shape) - special.gammaln(1 / shape))
    found += [shape, mean, left, right]
  return np.stack(found, -1)


def _asymmetric(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(shape, left, right scale) [n] of the asymmetric generalised Gaussian of each block's values.

  By matching moments; NaN where the values are not on both sides of zero.
  """
  x = blocks.reshape(len(blocks), -1)
  square = x * x
  with np.errstate(divide="ignore", invalid="ignore"):
    left, right = (np.sqrt((square * side).sum(1) / side.sum(1)) for side in (x < 0, x > 0))
    g = left / right
    ratio = np.abs(x).mean(1) ** 2 / square.mean(1)
    ratio = ratio * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
  above = np.clip(np.searchsorted(RATIOS, ratio), 1, len(RATIOS) - 1)
  nearest = above - (ratio - RATIOS[above - 1] <= RATIOS[above] - ratio)
  shape = np.where(np.isfinite(ratio), SHAPES[nearest], np.nan)
  scale = np.exp((special.gammaln(1 / shape) - special.gammaln(3 / shape)) / 2)
  return shape, left * scale, right * scale
