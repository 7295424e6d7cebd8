"""Scores of one volume: voxels pooled over the mask, in batches of slices of bounded memory.

Slice means are not volume scores (slices of one brain range over 8 dB), so they are only offered
under the name of the paper that reports them. Images of several channels (a fusion image) are
[n, H, W, C]: errors are pooled over the channels, SSIM is the mean of theirs.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from medsynth_jax.metrics import image as voxel
from medsynth_jax.metrics import similarity

SLICES = 8  # at once in memory
VOLUMETRIC = ("synthrad",)  # protocols whose window is 3-D; the others slide over each slice


@partial(jax.jit, static_argnames="protocols")
def _slice_parts(reference, image, mask, data_range, protocols):
  """Per slice: voxels in the mask, their mean |d| and d^2, and for each protocol windows, mean."""

  def one(reference, image, mask):
    parts = [jnp.sum(mask), voxel.mae(reference, image, mask), voxel.mse(reference, image, mask)]
    for name in protocols:
      m = similarity.margin(name)
      parts.append(jnp.sum(mask[tuple(slice(m, n - m) for n in mask.shape)]))
      parts.append(similarity.ssim(reference, image, data_range, mask, name))
    return parts

  return jax.vmap(one)(reference, image, mask)


@partial(jax.jit, static_argnames="protocol")
def _slab_parts(reference, image, mask, data_range, protocol):
  """Windows of a slab whose centre is in the mask, and their mean SSIM."""
  m = similarity.margin(protocol)
  mask = mask[tuple(slice(m, n - m) for n in mask.shape)]
  values = similarity.ssim_map(reference, image, data_range, protocol)
  return jnp.sum(mask), voxel.mean(values, mask)


def _take(array: np.ndarray, start: int, count: int) -> np.ndarray:
  """Slices start .. start + count, zeros (False) beyond the last: one shape, one compilation."""
  part = array[start : start + count]
  return np.pad(part, [(0, count - len(part))] + [(0, 0)] * (array.ndim - 1))


def _pooled(counts, means) -> float:
  """The mean over all voxels from per-part counts and means, in float64; NaN if there are none."""
  counts, means = np.asarray(counts, np.float64), np.asarray(means, np.float64)
  used = counts > 0
  return float((counts * means)[used].sum() / counts.sum()) if used.any() else float("nan")


def _per_slice(reference, image, mask, data_range, protocols) -> np.ndarray:
  """The columns of `_slice_parts` for all slices, [columns, n] float64."""
  batches = [
    jax.device_get(
      _slice_parts(
        *(_take(a, i, SLICES) for a in (reference, image, mask)), data_range, protocols
      )
    )
    for i in range(0, len(reference), SLICES)
  ]
  return np.concatenate([np.asarray(b, np.float64) for b in batches], axis=1)[:, : len(reference)]


def _ssim_3d(reference, image, mask, data_range, protocol, background) -> float:
  """SSIM with a 3-D window, in slabs that overlap by the window."""
  m = similarity.margin(protocol)
  counts, means = [], []
  for start in range(0, len(reference) - 2 * m, SLICES):
    r, i, k = (_take(a, start, SLICES + 2 * m) for a in (reference, image, mask))
    if similarity.protocol_of(protocol).blank:
      r, i = np.where(k, r, np.float32(background)), np.where(k, i, np.float32(background))
    # A window that reaches past the last slice belongs to no voxel of the volume.
    k[len(reference) - start - m :] = False
    count, value = jax.device_get(_slab_parts(r, i, k, data_range, protocol))
    counts.append(count)
    means.append(value)
  return _pooled(counts, means)


def _checked(reference, image, mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  reference, image = np.asarray(reference, np.float32), np.asarray(image, np.float32)
  mask = np.ones(reference.shape[:3], bool) if mask is None else np.asarray(mask) != 0
  alike = reference.shape == image.shape and reference.shape[:3] == mask.shape
  if reference.ndim not in (3, 4) or not alike:
    raise ValueError(
      f"scores need one shape [n, H, W] or [n, H, W, C]; reference {reference.shape}, image"
      f" {image.shape}, mask {mask.shape}"
    )
  if not mask.any():
    raise ValueError("scores need a voxel in the mask; it is empty")
  for name, array in (("reference", reference), ("image", image)):
    if not np.isfinite(array[mask]).all():
      raise ValueError(f"scores need finite voxels; the {name} has NaN or Inf in the mask")
  return reference, image, mask


def _channels(*images: np.ndarray) -> list[tuple[np.ndarray, ...]]:
  """Images of several channels [n, H, W, C] as one tuple of [n, H, W] a channel."""
  return list(zip(*(np.moveaxis(i, -1, 0) if i.ndim == 4 else i[None] for i in images),
                  strict=True))


def volume_scores(
  reference,
  image,
  mask=None,
  *,
  data_range: float,
  protocols: Sequence[str] = ("wang",),
  background: float | None = None,
) -> dict[str, float]:
  """The scores of one volume [n, H, W] in its physical unit, pooled over the mask's voxels.

  [n, H, W, C] under the same mask [n, H, W]: pooled over channels, SSIM their mean.

  Returns mae, mse, nmae (by `data_range`), psnr, and for each SSIM protocol `ssim_<protocol>`
  ("wang" is plain `ssim`): 2-D windows on the n slices, 3-D ones for "synthrad", which needs
  `background`; the map is averaged over the windows centred in the mask. An SSIM is NaN where no
  window fits, as in a lesion on the border or a volume of five slices. ValueError for an empty
  mask, unequal shapes, or NaN or Inf in the mask.
  """
  reference, image, mask = _checked(reference, image, mask)
  data_range = float(data_range)
  if reference.ndim == 4:
    each = [volume_scores(r, i, mask, data_range=data_range, protocols=protocols,
                          background=background) for r, i in _channels(reference, image)]
    scores = {name: float(np.mean([s[name] for s in each])) for name in each[0]}
    return scores | {"psnr": float(_psnr(data_range, scores["mse"]))}
  fitting = {
    p: similarity.fits(p, reference.shape if p in VOLUMETRIC else reference.shape[1:])
    for p in protocols
  }
  for p in protocols:
    similarity.check_range(p, data_range)
    if similarity.protocol_of(p).blank and background is None:
      raise ValueError(f"ssim: {p!r} with a mask needs background (-1024 for HU)")
  flat = tuple(p for p in protocols if p not in VOLUMETRIC and fitting[p])
  parts = _per_slice(reference, image, mask, data_range, flat)
  mae, mse = _pooled(parts[0], parts[1]), _pooled(parts[0], parts[2])
  psnr = float(_psnr(data_range, mse))
  scores = {"mae": mae, "mse": mse, "nmae": mae / data_range, "psnr": psnr}
  for p in protocols:
    name = "ssim" if p == "wang" else f"ssim_{p}"
    if not fitting[p]:
      scores[name] = float("nan")
    elif p in VOLUMETRIC:
      scores[name] = _ssim_3d(reference, image, mask, data_range, p, background)
    else:
      k = 3 + 2 * flat.index(p)
      scores[name] = _pooled(parts[k], parts[k + 1])
  return scores


def slice_scores(reference, image, mask, *, data_range: float) -> dict[str, np.ndarray]:
  """Scores of each slice in its own mask, [n] each: mae, mse, psnr, ssim (Wang) and its `voxels`.

  [n, H, W] or, channels pooled, [n, H, W, C]. NaN where the mask is empty or no window fits. To see
  how an error goes with what a slice shows: means over slices are no scores of a volume.
  ValueError as `volume_scores`.
  """
  reference, image, mask = _checked(reference, image, mask)
  protocols = ("wang",) if similarity.fits("wang", reference.shape[1:3]) else ()
  voxels, mae, mse, ssim = _slices(reference, image, mask, float(data_range), protocols)
  return {"mae": mae, "mse": mse, "psnr": _psnr(data_range, mse), "ssim": ssim, "voxels": voxels}


def _slices(reference, image, mask, data_range, protocols) -> tuple[np.ndarray, ...]:
  """Per slice: voxels in the mask, MAE, MSE and SSIM (NaN without a protocol), over channels."""
  parts = np.mean([_per_slice(r, i, mask, data_range, protocols)
                   for r, i in _channels(reference, image)], 0)
  return (*parts[:3], parts[4] if protocols else np.full(len(reference), np.nan))


def paper_scores(reference, image, mask=None, *, paper: str) -> dict[str, float]:
  """The scores of one volume by a paper's own rule: per slice, then the mean over its slices.

  `reference` and `image` [n, H, W] are in model units [-1, 1]; slices with no voxel in `mask` are
  left out, and the mask is used for nothing else. Names end in the paper's.

  "s0" (spine MR to PET/MR fusion): whole slice on [0, 1]: mae, mse, psnr, ssim; also of images of
  several channels [n, H, W, C].
  "s2" (spine CT to MR): whole slice on 0..255: mae, psnr with the doubled MAX (+48.13 dB).
  "reggan" (Reg-GAN, CTA-GAN): mae and psnr on [0, 1] where the reference is not -1, SSIM of the
  whole slice on [-1, 1]; PSNR at most 100 dB as in their code.

  A slice that equals its reference makes the mean PSNR infinite ("reggan": 100). ValueError as
  `volume_scores`, and for an unknown paper.
  """
  if paper not in PAPERS:
    raise ValueError(f"unknown paper {paper!r}; known: {', '.join(PAPERS)}")
  reference, image, mask = _checked(reference, image, mask)
  if reference.ndim == 4 and paper not in COLOUR_PAPERS:
    raise ValueError(f"{paper!r} scores images of one channel, got {reference.shape}")
  used = mask.any(axis=(1, 2))
  return {
    f"{name}_{paper}": float(np.mean(values)) if len(values) else float("nan")
    for name, values in PAPERS[paper](reference[used], image[used]).items()
  }


def _psnr(data_range, mse):
  with np.errstate(divide="ignore"):
    return 20 * np.log10(data_range) - 10 * np.log10(mse)


def _s0(reference, image):
  everywhere = np.ones(reference.shape[:3], bool)
  protocols = ("wang",) if similarity.fits("wang", reference.shape[1:3]) else ()
  _, mae, mse, ssim = _slices((reference + 1) / 2, (image + 1) / 2, everywhere, 1.0, protocols)
  return {"mae": mae, "mse": mse, "psnr": _psnr(1.0, mse), "ssim": ssim}


def _s2(reference, image):
  everywhere = np.ones(reference.shape, bool)
  parts = _per_slice((reference + 1) * 127.5, (image + 1) * 127.5, everywhere, 255.0, ())
  return {"mae": parts[1], "psnr": _psnr(255.0, parts[2]) + voxel.S2_OFFSET_DB}


def _reggan(reference, image):
  body = reference > -1
  parts = _per_slice((reference + 1) / 2, (image + 1) / 2, body, 1.0, ())
  seen = parts[0] > 0
  scores = {"mae": parts[1][seen], "psnr": np.minimum(_psnr(1.0, parts[2][seen]), 100)}
  if similarity.fits("reggan", reference.shape[1:]):
    scores["ssim"] = _per_slice(reference, image, np.ones_like(body), 2.0, ("reggan",))[4]
  return scores


PAPERS = {"s0": _s0, "s2": _s2, "reggan": _reggan}
COLOUR_PAPERS = ("s0",)  # that score images of several channels
