"""The floor: predictions without a network, which a synthesis must beat to have learnt anything.

Fitted on the training volumes' voxels inside the mask, one volume in memory at a time, in float64
NumPy. A network that loses to `lut2` has learnt less than two numbers a voxel tell.
"""

import numpy as np
from scipy import ndimage

BINS = 128  # of the source's intensity, over [-1, 1]
BINS_2D = 64  # along each axis of (intensity, blurred intensity)
BLUR_MM = 3.0  # the Gaussian's standard deviation
ROWS = ("constant", "lut", "lut2", "mean_image")


def _bin(x: np.ndarray, bins: int) -> np.ndarray:
  """The bin of each model unit; -1 and 1 fall in the first and last, as does all beyond."""
  return np.clip(((np.asarray(x, np.float64) + 1) / 2 * bins).astype(np.int64), 0, bins - 1)


def blurred(source: np.ndarray, spacing, blur_mm: float = BLUR_MM) -> np.ndarray:
  """The source [n, H, W] under a 3-D Gaussian of `blur_mm` SD; spacing in mm, in the same order.

  Edges are replicated. ValueError for a spacing that is not three positive numbers.
  """
  spacing = np.asarray(spacing, np.float64)
  if spacing.shape != (3,) or not (spacing > 0).all():
    raise ValueError(f"spacing must be three positive millimetres, got {spacing}")
  return ndimage.gaussian_filter(source, blur_mm / spacing, mode="nearest", output=np.float32)


class Table:
  """E[target | bin], added up from many volumes."""

  def __init__(self, bins: int):
    self.total, self.count = np.zeros(bins), np.zeros(bins, np.int64)

  def add(self, index: np.ndarray, target: np.ndarray) -> None:
    self.total += np.bincount(index, weights=target, minlength=len(self.total))
    self.count += np.bincount(index, minlength=len(self.count))

  def means(self) -> np.ndarray:
    """The mean target of each bin, NaN where no training voxel fell."""
    return np.where(self.count > 0, self.total / np.maximum(self.count, 1), np.nan)


class Centred:
  """A running mean over volumes of any size, laid over each other by their centres."""

  def __init__(self):
    self.total = np.zeros((0, 0, 0))
    self.count = np.zeros((0, 0, 0), np.int32)

  def add(self, target: np.ndarray, mask: np.ndarray) -> None:
    shape = tuple(np.maximum(self.total.shape, target.shape))
    if shape != self.total.shape:
      self.total, self.count = centred(self.total, shape, 0), centred(self.count, shape, 0)
    self.total += centred(np.where(mask, target, 0), shape, 0)
    self.count += centred(mask, shape, False)

  def means(self, shape, fill: float) -> np.ndarray:
    """The mean on a grid of this shape, `fill` where no training voxel lies."""
    total, count = centred(self.total, shape, 0), centred(self.count, shape, 0)
    return np.where(count > 0, total / np.maximum(count, 1), fill)


def centred(array: np.ndarray, shape, fill) -> np.ndarray:
  """The array cropped or padded with `fill` to `shape`, its centre voxel (n // 2) kept."""
  out = np.full(shape, fill, array.dtype)
  into, of = [], []
  for have, want in zip(array.shape, shape, strict=True):
    shift = want // 2 - have // 2
    first, last = max(0, -shift), min(have, want - shift)
    of.append(slice(first, max(first, last)))
    into.append(slice(first + shift, max(first, last) + shift))
  out[tuple(into)] = array[tuple(of)]
  return out


class Floor:
  """The baselines of one source -> target pair: `add` each training volume, `fit`, `predict`.

  constant    the mean target
  lut         E[target | source intensity], 128 bins
  lut2        E[target | source intensity, its 3 mm blur], 64 x 64 bins; `lut` in empty ones
  mean_image  the mean target at this place; only where grids are anatomical or crops are centred
              on the lesion (`common_grid`)

  `channel` names the channel of a multi-channel source that is looked up.
  """

  def __init__(self, common_grid: bool = False, channel: int = 0, blur_mm: float = BLUR_MM):
    self.channel, self.blur_mm = channel, blur_mm
    self.lut, self.lut2 = Table(BINS), Table(BINS_2D**2)
    self.image = Centred() if common_grid else None
    self.fitted = None

  def add(self, source, target, mask, spacing) -> None:
    """Adds a training volume.

    `source` [n, H, W] or [n, H, W, C] in model units, `target` [n, H, W] in the unit of scores,
    `mask` [n, H, W], `spacing` in mm for the axes (slice, row, column). ValueError for unequal
    shapes and for NaN or Inf in the mask.
    """
    source, target, mask = self._plain(source), np.asarray(target), np.asarray(mask) != 0
    if not source.shape == target.shape == mask.shape:
      raise ValueError(
        f"the floor needs one shape; source {source.shape}, target {target.shape},"
        f" mask {mask.shape}"
      )
    values = target[mask].astype(np.float64)
    if not (np.isfinite(values).all() and np.isfinite(source[mask]).all()):
      raise ValueError("the floor needs finite voxels; there is NaN or Inf in the mask")
    index = self._bin_2d(source, spacing)[mask]  # refuses a bad spacing before anything is added
    self.lut.add(_bin(source[mask], BINS), values)
    self.lut2.add(index, values)
    if self.image is not None:
      self.image.add(target, mask)
    self.fitted = None

  def fit(self) -> "Floor":
    """Turns the sums into tables; ValueError where no training voxel was added."""
    count = self.lut.count.sum()
    if not count:
      raise ValueError("the floor needs training voxels inside a mask; there are none")
    lut = self.lut.means()
    known = np.flatnonzero(self.lut.count)
    # Intensities that training never showed take what lies between their neighbours.
    lut = np.interp(np.arange(BINS), known, lut[known])
    self.fitted = {"constant": self.lut.total.sum() / count, "lut": lut, "lut2": self.lut2.means()}
    return self

  def predict(self, source, spacing) -> dict[str, np.ndarray]:
    """{row: image [n, H, W] float32 in the unit of scores}; `mean_image` if `common_grid`.

    ValueError before `fit`.
    """
    if self.fitted is None:
      raise ValueError("the floor is not fitted: call fit() after the last add()")
    source = self._plain(source)
    constant = self.fitted["constant"]
    lut = self.fitted["lut"][_bin(source, BINS)]
    lut2 = self.fitted["lut2"][self._bin_2d(source, spacing)]
    rows = {
      "constant": np.full(source.shape, constant),
      "lut": lut,
      "lut2": np.where(np.isnan(lut2), lut, lut2),
    }
    if self.image is not None:
      rows["mean_image"] = self.image.means(source.shape, constant)
    return {name: row.astype(np.float32) for name, row in rows.items()}

  def _plain(self, source) -> np.ndarray:
    source = np.asarray(source, np.float32)
    return source[..., self.channel] if source.ndim == 4 else source

  def _bin_2d(self, source: np.ndarray, spacing) -> np.ndarray:
    blur = blurred(source, spacing, self.blur_mm)
    return _bin(source, BINS_2D) * BINS_2D + _bin(blur, BINS_2D)
