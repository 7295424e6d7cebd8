"""Visual information fidelity (VIF): the share of the reference's information that an image keeps.

Sheikh and Bovik, IEEE TIP 15(2), 2006. Papers that report "VIF" mean one of two codes of its
authors, whose values differ by up to 0.1: `vifp` in the pixel domain, `vif_wavelet` as published.
Both are defined on grey levels of 0..255, so that the images' range has to be told: on [0, 1] taken
as grey levels a noisy image scores 0.996 instead of 0.353. Neither is symmetric: reference first.
"""

import functools
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from medsynth_jax.metrics.image import mean, pair
from medsynth_jax.metrics.similarity import filtered, gaussian

SCALES = 4
LEAST = 41  # pixels a side for `vifp`: a window of 3 at the last scale
LEAST_WAVELET = 65  # for `vif_wavelet`: three blocks of 3 at the last scale
BLOCK = 3  # coefficients along each side of the wavelet code's vectors
NOISE, NOISE_WAVELET = 2.0, 0.4  # variance of the eye's noise, in grey levels squared
FLAT, FLAT_WAVELET = 1e-10, 1e-15  # below these a variance counts as none


def vifp(reference, image, data_range) -> jax.Array:
  """VIF in the pixel domain (LIVE's vifp_mscale) of two images [H, W]; 1 for equal ones.

  Four scales, Gaussian windows of 17, 9, 5 and 3 pixels, whole windows only. Pure JAX, float32.
  `data_range` is the width of the images' scale, which stands for 255 grey levels; where it begins
  has no influence. ValueError for unequal shapes, a side below LEAST and a constant reference;
  under a trace, where nothing can be raised, a constant reference gives NaN.
  """
  reference, image, _ = pair(reference, image)
  _check(reference.shape, LEAST, "vifp")
  if not isinstance(reference, jax.core.Tracer):
    _check_varies(reference)
  return _vifp(reference, image, data_range)


@jax.jit
def _vifp(reference: jax.Array, image: jax.Array, data_range) -> jax.Array:
  # E[x^2] - E[x]^2 cancels in float32 unless the images are first moved near zero.
  both = (jnp.stack([reference, image]) - mean(reference)) * (255 / data_range)
  kept = total = jnp.zeros(())
  for scale in range(SCALES):
    size = 2 ** (SCALES - scale) + 1
    taps = gaussian(size, size / 5)
    if scale:
      both = filtered(both, taps)[:, ::2, ::2]
    x, y = both
    mx, my, xx, yy, xy = filtered(jnp.stack([x, y, x * x, y * y, x * y]), taps)
    vx = jnp.maximum(xx - mx * mx, 0)
    gain, noise = _channel(vx, jnp.maximum(yy - my * my, 0), xy - mx * my, FLAT, jnp)
    vx = jnp.where(vx < FLAT, 0, vx)
    kept += jnp.sum(jnp.log1p(gain * gain * vx / (noise + NOISE)))
    total += jnp.sum(jnp.log1p(vx / NOISE))
  return kept / total


def vif_wavelet(reference, image, data_range) -> float:
  """VIF as published (LIVE's vifvec) of two images [H, W]; 1 for equal ones.

  Vectors of 3 x 3 neighbours in the horizontal and the vertical band at each of the four levels of
  a steerable pyramid. Float64 NumPy: its covariances are inverted, which float32 does not bear.
  `data_range` as in `vifp`. ValueError for unequal shapes, a side below LEAST_WAVELET, and a
  constant reference.
  """
  reference, image = np.asarray(reference, np.float64), np.asarray(image, np.float64)
  if reference.shape != image.shape:
    raise ValueError(f"reference has shape {reference.shape}, image {image.shape}")
  _check(reference.shape, LEAST_WAVELET, "vif_wavelet")
  _check_varies(reference)
  scale = 255 / data_range
  bands = zip(_bands(reference * scale), _bands(image * scale), strict=True)
  parts = [_band(x, y, 2 ** (SCALES - number // 2) + 1) for number, (x, y) in enumerate(bands)]
  kept, total = np.sum(parts, 0)
  if total == 0:
    raise ValueError("VIF is not defined for a reference without structure in any band")
  return float(kept / total)


def _check(shape: tuple[int, ...], least: int, name: str) -> None:
  if len(shape) != 2 or min(shape) < least:
    raise ValueError(f"{name} needs an image [H, W] of {least} pixels or more a side, got {shape}")


def _check_varies(reference) -> None:
  if reference.max() == reference.min():
    raise ValueError("VIF is not defined for a constant image: the reference has no information")


def _channel(vx, vy, vxy, flat: float, xp) -> tuple:
  """(gain, variance of the noise) by which the image is a distortion of the reference.

  From local variances and covariance; `xp` is numpy or jax.numpy, `flat` the variance that counts
  as none. Where the image is flat or runs against the reference nothing is kept.
  """
  gain = vxy / (vx + flat)
  noise = vy - gain * vxy
  gain, noise = xp.where(vx < flat, 0, gain), xp.where(vx < flat, vy, noise)
  gain, noise = xp.where(vy < flat, 0, gain), xp.where(vy < flat, 0, noise)
  noise, gain = xp.where(gain < 0, vy, noise), xp.maximum(gain, 0)
  return gain, xp.maximum(noise, flat)


# --- wavelet domain --------------------------------------------------------------------------


@functools.cache
def _pyramid() -> dict[str, np.ndarray]:
  """Filters of the steerable pyramid sp5 (assets/NOTICE): lo0, lo and the band of one direction."""
  with resources.as_file(resources.files("medsynth_jax.metrics") / "assets/sp5.npz") as path:
    with np.load(path) as found:
      return dict(found)


def _bands(image: np.ndarray) -> list[np.ndarray]:
  """Two of the six bands of each level, from the finest; edges mirrored about their pixels."""
  filters = _pyramid()
  low, found = ndimage.correlate(image, filters["lo0"], mode="mirror"), []
  for level in range(SCALES):
    if level:
      low = ndimage.correlate(low, filters["lo"], mode="mirror")[::2, ::2]
    found += [ndimage.correlate(low, band, mode="mirror")
              for band in (filters["band"], filters["band"].T)]
  return found


def _local(x: np.ndarray, window: int) -> np.ndarray:
  """The mean of x in the window around the centre of each block."""
  blocks = x.shape[0] // BLOCK, x.shape[1] // BLOCK
  return ndimage.uniform_filter(x, window, mode="mirror")[
    BLOCK // 2::BLOCK, BLOCK // 2::BLOCK][:blocks[0], :blocks[1]]


def _band(x: np.ndarray, y: np.ndarray, window: int) -> tuple[float, float]:
  """(information kept, information of the reference) of a band [h, w]."""
  rows, columns = (n // BLOCK for n in x.shape)
  x, y = (a[:rows * BLOCK, :columns * BLOCK] for a in (x, y))
  mx, my = _local(x, window), _local(y, window)
  vx, vy = (np.maximum(_local(a * a, window) - m * m, 0) for a, m in ((x, mx), (y, my)))
  gain, noise = _channel(vx, vy, _local(x * y, window) - mx * my, FLAT_WAVELET, np)
  # the reference as a Gaussian scale mixture: covariance of all neighbourhoods, size of each block
  around = np.lib.stride_tricks.sliding_window_view(x, (BLOCK, BLOCK)).reshape(-1, BLOCK**2)
  values, vectors = np.linalg.eigh(np.cov(around, rowvar=False, bias=True))
  known = values > FLAT_WAVELET * max(values[-1], FLAT_WAVELET)
  values, vectors = values[known], vectors[:, known]
  blocks = x.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).reshape(rows, columns, BLOCK**2)
  size = ((blocks @ vectors) ** 2 / values).sum(-1) / BLOCK**2
  edge = -(-(window // 2) // BLOCK)  # blocks whose window reaches over the edge
  inner = (slice(edge, -edge),) * 2
  size, gain, noise = (a[inner][..., None] for a in (size, gain, noise))
  size = size * values
  return (np.log1p(gain * gain * size / (noise + NOISE_WAVELET)).sum(),
          np.log1p(size / NOISE_WAVELET).sum())
