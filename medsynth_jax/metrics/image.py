"""Voxel errors between a reference and a synthetic image.

Every function takes arrays [*space] of the reference's shape, in the same units, is pure JAX and
computes in float32; `mask` (non-zero = counts) has that shape, or is None for all voxels. An empty
mask gives NaN, since a traced function cannot raise; `volume.volume_scores` raises instead.
"""

import math

import jax
import jax.numpy as jnp

NORMALISERS = ("range", "ref_minmax", "ref_max", "ref_mean_abs")
S2_OFFSET_DB = 20 * math.log10(255)  # 48.1308 dB


def pair(reference, image, mask=None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """The arguments as float32 arrays and a boolean mask; ValueError where shapes differ.

  Without this check, broadcasting would score [H, W] against [H, W, 1] and return a number.
  """
  reference, image = jnp.asarray(reference, jnp.float32), jnp.asarray(image, jnp.float32)
  if reference.shape != image.shape:
    raise ValueError(f"reference has shape {reference.shape}, image {image.shape}")
  if mask is None:
    return reference, image, None
  mask = jnp.asarray(mask) != 0
  if mask.shape != reference.shape:
    raise ValueError(f"reference has shape {reference.shape}, mask {mask.shape}")
  return reference, image, mask


def mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """The mean of `values` over the boolean `mask`, in two passes; NaN where the mask is empty.

  The second pass adds the mean of what the first left over: a plain float32 sum of millions of
  voxels of one sign is off by more than the 1e-5 that scores are compared to.
  """
  mask = jnp.ones(values.shape, bool) if mask is None else mask
  count = jnp.sum(mask)  # an integer: float32 counts stop at 2**24
  first = jnp.sum(jnp.where(mask, values, 0)) / count
  return first + jnp.sum(jnp.where(mask, values - first, 0)) / count


def mae(reference, image, mask=None) -> jax.Array:
  """Mean absolute error, in the images' unit."""
  reference, image, mask = pair(reference, image, mask)
  return mean(jnp.abs(reference - image), mask)


def mse(reference, image, mask=None) -> jax.Array:
  """Mean squared error, in the images' unit squared."""
  reference, image, mask = pair(reference, image, mask)
  return mean(jnp.square(reference - image), mask)


def nmae(reference, image, normaliser: str, data_range=None, mask=None) -> jax.Array:
  """MAE divided by a named normaliser; the papers do not agree on one, so none is the default.

  `normaliser`: "range" (the given `data_range`), "ref_minmax", "ref_max" or "ref_mean_abs", the
  last three of the reference inside the mask. NaN where the normaliser is 0 (a flat reference).
  ValueError for an unknown name, and for "range" without `data_range`.
  """
  error = mae(reference, image, mask)
  reference, _, mask = pair(reference, image, mask)
  inside = jnp.ones(reference.shape, bool) if mask is None else mask
  highest = jnp.max(jnp.where(inside, reference, -jnp.inf))
  if normaliser == "range":
    if data_range is None:
      raise ValueError("nmae: normaliser 'range' needs data_range")
    divisor = jnp.asarray(data_range, jnp.float32)
  elif normaliser == "ref_minmax":
    divisor = highest - jnp.min(jnp.where(inside, reference, jnp.inf))
  elif normaliser == "ref_max":
    divisor = highest
  elif normaliser == "ref_mean_abs":
    divisor = mean(jnp.abs(reference), mask)
  else:
    raise ValueError(f"nmae: unknown normaliser {normaliser!r}; known: {', '.join(NORMALISERS)}")
  return jnp.where(divisor == 0, jnp.nan, error / divisor)


def psnr(reference, image, data_range, mask=None) -> jax.Array:
  """Peak signal-to-noise ratio in dB, 20 log10(data_range / RMSE); identical images give +inf.

  `data_range` is the width of the intensity scale (4024 for HU clipped to -1024..3000, 1 for
  [0, 1]); it is never taken from the images, because then scores of two images do not compare.
  """
  error = mse(reference, image, mask)
  return 20 * jnp.log10(jnp.asarray(data_range, jnp.float32)) - 10 * jnp.log10(error)


def psnr_s2(reference, image, data_range, mask=None) -> jax.Array:
  """PSNR as the code of Jin et al. 2019 and Lee et al. 2020 computes it: 48.13 dB above PSNR.

  They score images of 0..255 with MAX = 255 * 255 inside 20 log10(MAX), which squares the peak
  twice. To compare with their tables only. `data_range` is that of the images given here.
  """
  return psnr(reference, image, data_range, mask) + S2_OFFSET_DB


def ncc(reference, image, mask=None, zero_mean: bool = True) -> jax.Array:
  """Normalised cross-correlation: Pearson's r of the voxels, or with zero_mean=False their cosine.

  NaN where either image is flat (or, for the cosine, zero).
  """
  reference, image, mask = pair(reference, image, mask)
  if zero_mean:
    reference, image = reference - mean(reference, mask), image - mean(image, mask)
  # Scaled to unit size first: the product of two fourth powers of HU leaves float32 behind.
  a = reference / jnp.sqrt(mean(jnp.square(reference), mask))
  b = image / jnp.sqrt(mean(jnp.square(image), mask))
  return mean(a * b, mask)
